"""What the tests of loss masks share: a Jinja environment of their own, tokenizers, and the text of the labels."""

import datetime
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import trl
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_train.data.types import Example
from tests.support.pico import CORPUS

DATE = datetime.date(2024, 2, 29)
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
OWN_TEMPLATES = Path(__file__).parents[1] / "files" / "chat_templates"
BLOCK = re.compile(r"(\{%[-+]?)\s*(end)?generation\s*([-+]?%\})")


def environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": refuse, "strftime_now": DATE.strftime}
    return environment


def without_blocks(template: str) -> str:
    """Replace generation blocks by `if` blocks, which leave the same white space."""
    return BLOCK.sub(lambda tag: f"{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}", template)


@cache
def compiled(template: str) -> Any:
    return environment().from_string(without_blocks(template))


def label_texts(tokenizer: Any, example: Example) -> list[str]:
    """Return the text of each run of labels."""
    runs, before = [], False
    for token, label in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if label:
            runs.append([*runs.pop(), token] if before else [token])
        before = label
    return [tokenizer.decode(run) for run in runs]


def metaspace_tokenizer() -> Any:
    """Return a SentencePiece-like tokenizer: spaces are part of words, and each segment begins with one."""
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
