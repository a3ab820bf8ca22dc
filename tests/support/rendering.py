"""Tokenizers and label texts for tests of rendered rows."""

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_train.data.types import Example
from tests.support.pico import CORPUS


def metaspace_tokenizer() -> Any:
    """Return a SentencePiece-like tokenizer: spaces are part of words, and every segment is prefixed by one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "[INST] [/INST] user assistant"], trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    tokenizer = Tokenizer.from_str(json.dumps(content))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return fast


def label_texts(tokenizer: Any, example: Example) -> list[str]:
    """Return the text of each run of labels."""
    runs, before = [], False
    for token, label in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if label:
            runs.append([*runs.pop(), token] if before else [token])
        before = label
    return [tokenizer.decode(run) for run in runs]
