"""Pico models: real Transformers models of every supported family, small enough to build in a fraction of a second.

Each is a folder as a user would have it: config.json, bfloat16 safetensors, generation_config.json, and a fast
byte-level BPE tokenizer with a ChatML template. Weights are random but wide (`STD`), so that logits are not flat and
a wrong merge or a lost gradient shows in the numbers.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

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

_TIED_GEMMA: dict[str, Any] = {"head_dim": 16, "tie_word_embeddings": True}
_EXPERTS: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    "head_dim": 16,
}
"""A mixture of four experts under the names of all families."""
_LATENT: dict[str, Any] = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    "num_key_value_heads": 4,
}
"""Attention with keys and values made of a smaller vector."""
_LATENT_EXPERTS = {**{key: value for key, value in _EXPERTS.items() if key != "head_dim"}, **_LATENT}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 128}
_MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_chunk_size": 16}
_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "ministral": {"head_dim": 16},
    "ministral3": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
    "gemma": _TIED_GEMMA,
    "gemma2": {**_TIED_GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3_text": {**_TIED_GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "vaultgemma": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "phi3": {"original_max_position_embeddings": 256, "sliding_window": None},
    "cohere": {"logit_scale": 1.0, "tie_word_embeddings": True},
    "cohere2": {"logit_scale": 1.0, "tie_word_embeddings": True, "head_dim": 16},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128, "alibi": False},
    "starcoder2": {"sliding_window": None, "tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 8},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "internlm3": {"head_dim": 16},
    "exaone4": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    # mixtures of experts
    **dict.fromkeys(
        (
            "afmoe",
            "cohere2_moe",
            "dots1",
            "ernie4_5_moe",
            "exaone_moe",
            "flex_olmo",
            "glm4_moe",
            "gpt_oss",
            "granitemoe",
            "hunyuan_v1_moe",
            "jetmoe",
            "llama4_text",
            "mellum",
            "minimax_m2",
            "mixtral",
            "olmoe",
            "phimoe",
            "qwen2_moe",
            "qwen3_moe",
            "solar_open",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _LATENT_EXPERTS),
    # recurrent layers
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128, "head_dim": 16},
    "falcon_mamba": {"state_size": 8, "hidden_size": 128},
    "granitemoehybrid": {**_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "jamba": {**_EXPERTS, **_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 8, "hidden_size": 128},
    "minimax": {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {
        **_EXPERTS,
        "mamba_head_dim": 32,
        "mamba_num_heads": 4,
        "ssm_state_size": 8,
        "n_groups": 2,
        "layers_block_type": ["mamba", "moe", "attention"],
        "num_hidden_layers": 3,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 64,
    },
    "olmo_hybrid": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA},
    "qwen3_next": {**_EXPERTS, **_DELTA},
    "recurrent_gemma": {"head_dim": 16, "block_types": ["recurrent", "attention"], "lru_width": 64},
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
    save_pico_tokenizer(folder)
    return folder


def save_pico_tokenizer(folder: Path) -> None:
    """Save the tokenizer beside a config, as the class that Transformers insists on for some model types (Qwen 2)."""
    build_tokenizer().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if type(tokenizer) is not PreTrainedTokenizerFast:
        tokenizer.save_pretrained(folder)
