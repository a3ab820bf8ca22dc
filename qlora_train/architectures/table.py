"""The table of architectures: what config.json omits, what is otherwise known only after a download, and what no file says.

`tests/architectures/test_families.py` trains, resumes, merges and reloads every row; docs/architectures.md is generated.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: as in config.json.
        linear_names: last names of the linear layers except the head, for an early check of `lora.target_modules`.
        default_positions: number of positions if config.json has none: the default of the config class.
        chat_template: for a base model whose vocabulary has no turn tokens.
        attention: implementation for `model.attn_implementation: auto`.
        attention_reason: why `attention` is not sdpa, which is then refused.
        unlimited_key: key of config.json whose true value means that positions are unlimited.
        linear_classes: subclasses of nn.Linear with an ordinary forward, which Transformers does not quantize.
        packing_error: why packed documents would attend to each other.
        keep_16bit: last names of linear layers whose weight is read outside their forward.
        lora_unsupported: last names of linear layers that cannot have LoRA.
        lora_unsupported_reason: why they cannot.
        known: False for the generic row.
    """

    model_type: str
    linear_names: tuple[str, ...]
    default_positions: int | None
    chat_template: str = "chatml"
    attention: str = "sdpa"
    attention_reason: str = ""
    unlimited_key: str | None = None
    linear_classes: tuple[str, ...] = ()
    packing_error: str = ""
    keep_16bit: tuple[str, ...] = ()
    lora_unsupported: tuple[str, ...] = ()
    lora_unsupported_reason: str = ""
    known: bool = True


_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_MLP2 = ("up_proj", "down_proj")
_FUSED_MLP = ("gate_up_proj", "down_proj")
LLAMA = _SPLIT + _MLP
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_MIXER = ("in_proj", "out_proj")
_MAMBA1 = ("in_proj", "x_proj", "dt_proj", "out_proj")
_DELTA = ("out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_GPT2 = ("c_attn", "c_proj", "c_fc")

_SOFT_CAPPED = "its attention scores are soft-capped, which sdpa does not support"
NO_POSITIONS = "Transformers ignores position ids in its attention mask"
_COUNTED = "it counts positions along the row, across documents"
_STATE = "its recurrent state continues from one document into the next"
_OWN_ATTENTION = "its attention has no per-document implementation"
_PAST_ADAPTERS = "its mixer reads the weight directly and would ignore an adapter"


def _recurrent(
    model_type: str, linear_names: tuple[str, ...], default_positions: int | None, **rest: Any
) -> Architecture:
    return Architecture(
        model_type,
        linear_names,
        default_positions,
        packing_error=_STATE,
        lora_unsupported_reason=_PAST_ADAPTERS if rest.get("lora_unsupported") else "",
        **rest,
    )


_ROWS = (
    # dense
    Architecture("apertus", (*_SPLIT, *_MLP2), 65536),
    Architecture("arcee", (*_SPLIT, *_MLP2), 4096),
    Architecture("biogpt", (*_OUT, "fc1", "fc2"), 1024, packing_error=_COUNTED),
    Architecture("bloom", _NEOX, None, packing_error=NO_POSITIONS),
    Architecture("codegen", ("qkv_proj", "out_proj", "fc_in", "fc_out"), 2048, packing_error=_OWN_ATTENTION),
    Architecture("cohere", LLAMA, 8192),
    Architecture("cohere2", LLAMA, 8192),
    Architecture("diffllama", LLAMA, 2048),
    Architecture("ernie4_5", LLAMA, 131072),
    Architecture("exaone4", LLAMA, 2048),
    Architecture(
        "falcon",
        _NEOX,
        2048,
        unlimited_key="alibi",
        linear_classes=("FalconLinear",),
        packing_error=NO_POSITIONS,
    ),
    Architecture("gemma", LLAMA, 8192, chat_template="gemma"),
    Architecture("gemma2", LLAMA, 8192, chat_template="gemma", attention="eager", attention_reason=_SOFT_CAPPED),
    Architecture("gemma3_text", LLAMA, 131072, chat_template="gemma"),
    Architecture("glm", (*_SPLIT, *_FUSED_MLP), 131072),
    Architecture("glm4", (*_SPLIT, *_FUSED_MLP), 131072),
    Architecture("gpt2", _GPT2, 1024),
    Architecture("gpt_bigcode", _GPT2, 1024),
    Architecture("gpt_neox", _NEOX, 2048),
    Architecture("gptj", (*_OUT, "fc_in", "fc_out"), 2048, packing_error=_OWN_ATTENTION),
    Architecture("granite", LLAMA, 2048),
    Architecture("helium", LLAMA, 4096),
    Architecture("hunyuan_v1_dense", LLAMA, 2048),
    Architecture("hyperclovax", LLAMA, 2048),
    Architecture("internlm3", LLAMA, 32768),
    Architecture("jais2", (*_SPLIT, *_MLP2), 8192),
    Architecture("llama", LLAMA, 2048, chat_template="llama2"),
    Architecture("minicpm3", (*_LATENT, *_MLP), 32768),
    Architecture("ministral", LLAMA, 131072, chat_template="mistral"),
    Architecture("ministral3", LLAMA, 262144, chat_template="mistral"),
    Architecture("mistral", LLAMA, 131072, chat_template="mistral"),
    Architecture("mpt", ("Wqkv", "out_proj", *_MLP2), 2048, packing_error=NO_POSITIONS),
    Architecture("nanochat", (*_SPLIT, "fc1", "fc2"), 2048),
    Architecture("nemotron", (*_SPLIT, *_MLP2), 4096),
    Architecture("olmo", LLAMA, 2048),
    Architecture("olmo2", LLAMA, 2048),
    Architecture("olmo3", LLAMA, 2048),
    Architecture("opt", (*_OUT, "fc1", "fc2"), 2048, packing_error=_COUNTED),
    Architecture("persimmon", _NEOX, 16384),
    Architecture("phi", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), 2048),
    Architecture("phi3", ("qkv_proj", "o_proj", *_FUSED_MLP), 4096),
    Architecture("qwen2", LLAMA, 32768),
    Architecture("qwen3", LLAMA, 32768),
    Architecture("seed_oss", LLAMA, 524288),
    Architecture("smollm3", LLAMA, 32768),
    Architecture("stablelm", LLAMA, 4096),
    Architecture("starcoder2", (*_SPLIT, "c_fc", "c_proj"), 4096),
    Architecture("vaultgemma", LLAMA, 8192, chat_template="gemma"),
    Architecture("xglm", (*_OUT, "fc1", "fc2"), 2048, packing_error=_COUNTED),
    Architecture("youtu", (*_LATENT, *_MLP), 131072),
    # mixtures of experts
    Architecture("afmoe", LLAMA, 16384, packing_error=NO_POSITIONS),
    Architecture("cohere2_moe", LLAMA, 8192),
    Architecture("deepseek_v2", (*_LATENT, *_MLP), 2048),
    Architecture("deepseek_v3", (*_LATENT, *_MLP), 4096),
    Architecture("dots1", LLAMA, 2048),
    Architecture("ernie4_5_moe", LLAMA, 131072),
    Architecture("exaone_moe", LLAMA, 2048),
    Architecture("flex_olmo", _SPLIT, 4096),
    Architecture("glm4_moe", LLAMA, 131072),
    Architecture("glm4_moe_lite", (*_LATENT, *_MLP), 202752),
    Architecture("gpt_oss", _SPLIT, 131072, packing_error=_OWN_ATTENTION),
    Architecture("granitemoe", _SPLIT, 2048),
    Architecture("hunyuan_v1_moe", LLAMA, 2048),
    Architecture("jetmoe", ("kv_proj",), 4096),
    Architecture("llama4_text", LLAMA, 131072),
    Architecture("mellum", _SPLIT, 131072),
    Architecture("minimax_m2", _SPLIT, 196608),
    Architecture("mixtral", _SPLIT, 131072, chat_template="mistral"),
    Architecture("olmoe", _SPLIT, 4096),
    Architecture("phimoe", _SPLIT, 131072),
    Architecture("qwen2_moe", LLAMA, 32768),
    Architecture("qwen3_moe", _SPLIT, 32768),
    Architecture("solar_open", LLAMA, 131072),
    # recurrent layers, alone or beside attention
    _recurrent("bamba", (*LLAMA, *_MIXER), 262144, lora_unsupported=("out_proj",)),
    _recurrent("falcon_h1", (*LLAMA, *_MIXER), 8192, lora_unsupported=("out_proj",)),
    _recurrent("falcon_mamba", _MAMBA1, None, keep_16bit=("dt_proj",), lora_unsupported=_MAMBA1[1:]),
    _recurrent(
        "granitemoehybrid", (*_SPLIT, "input_linear", "output_linear", *_MIXER), 2048, lora_unsupported=("out_proj",)
    ),
    _recurrent("jamba", (*LLAMA, *_MAMBA1), 262144, keep_16bit=("dt_proj",), lora_unsupported=("dt_proj",)),
    _recurrent("lfm2", (*_OUT, "in_proj", "w1", "w2", "w3"), 128000),
    _recurrent("mamba", _MAMBA1, None, keep_16bit=("dt_proj",), lora_unsupported=_MAMBA1[1:]),
    _recurrent("minimax", (*_SPLIT, "qkv_proj", "out_proj", "output_gate"), 131072),
    _recurrent("nemotron_h", (*_SPLIT, *_MLP2, *_MIXER), 4096, lora_unsupported=("out_proj",)),
    _recurrent("olmo_hybrid", (*LLAMA, "a_proj", "b_proj", "g_proj"), 65536),
    _recurrent("qwen3_5_text", (*LLAMA, *_DELTA), 32768),
    _recurrent("qwen3_5_moe_text", (*LLAMA, *_DELTA), 32768),
    _recurrent("qwen3_next", (*LLAMA, "out_proj", "in_proj_qkvz", "in_proj_ba"), 32768),
    _recurrent("recurrent_gemma", (*LLAMA, "linear_y", "linear_x", "linear_out"), None, chat_template="gemma"),
)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
EVERY_LINEAR_NAME = frozenset(name for row in _ROWS for name in row.linear_names)
