"""Pico models: real Transformers models of every supported family, small enough to build in a fraction of a second.

Each is a folder as a user would have it: config.json, bfloat16 safetensors, generation_config.json, and a fast
byte-level BPE tokenizer with a ChatML template. Weights are random but wide (`STD`), so that logits are not flat and
a wrong merge or a lost gradient shows in the numbers.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, TURN_START, TURN_END, TEXT_END = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "user assistant system",
    "What is the capital of France? The capital of France is Paris.",
    '{"number": "12", "street": "Main", "city": "Springfield", "state": "IL", "zip": "62704"}',
    "one two three four five six seven eight nine ten",
)
VOCAB_SIZE = 320
STD = 0.08

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": STD,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "use_cache": True,
}
"""What every family is given; token ids follow the order of the tokenizer's special tokens."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True},
    "phi3": {"original_max_position_embeddings": 256, "sliding_window": None},
    "phi": {},
    "gpt_neox": {},
    "olmo2": {},
    "granite": {},
    "cohere": {"logit_scale": 1.0, "tie_word_embeddings": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128, "alibi": False},
    "starcoder2": {"sliding_window": None, "tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True},
}
"""Differences from COMMON, a row a family."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most VOCAB_SIZE tokens: 4 special ones, 256 bytes, some merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, TURN_START, TURN_END, TEXT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, TEXT_END],
        model_max_length=COMMON["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    return fast


def build_config(model_type: str = "llama", **config_overrides: Any) -> Any:
    """Return the Transformers config of a pico model."""
    return AutoConfig.for_model(model_type, **{**COMMON, **FAMILIES.get(model_type, {}), **config_overrides})


def build_pico(
    folder: Path, model_type: str = "llama", *, seed: int = 0, dtype: str = "bfloat16", **config_overrides: Any
) -> Path:
    """Save a pico model of `model_type` with its tokenizer under `folder`, and return the folder.

    Args:
        folder: made when missing.
        model_type: a key of FAMILIES.
        seed: of the random weights; the global generator is left as it was.
        dtype: of the saved weights.
        config_overrides: go to the config class, over the family's own values.
    """
    config = build_config(model_type, **config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
