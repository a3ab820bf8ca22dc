"""Which type llama.cpp's quantizer gives each tensor of a GGUF file.

A mix such as q4_k_m has a type of its own for the head, for values and for down projections of some layers, and other types
for matrices whose rows are no whole number of blocks. The rules are those of `llama-quantize` without an importance matrix;
tests compare whole files with its own, byte by byte.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qlora_train.utils.errors import ExportError

BASE_TYPES = {
    "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k_m": "Q5_K", "q5_k_s": "Q5_K", "q5_0": "Q5_0", "q4_k_m": "Q4_K", "q4_k_s": "Q4_K",
    "q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS", "q3_k_l": "Q3_K", "q3_k_m": "Q3_K", "q3_k_s": "Q3_K",
    "q2_k": "Q2_K",
}  # fmt: skip
"""Type of most matrices."""
NARROW_TYPES = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
"""Types with blocks of 256, and what rows get that are no multiple of it."""
SUPER_BLOCK, BLOCK = 256, 32
_CATEGORIES = {
    "attn_qkv.weight": "value", "attn_kv_b.weight": "value", "attn_v.weight": "value", "attn_k.weight": "key",
    "attn_output.weight": "attention output", "ffn_down": "down",
}  # fmt: skip
"""Parts of names, in the order in which they are looked for."""
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_HEAD = "output.weight"
_NOT_QUANTIZED = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    ".position_embd", ".rel_pos", ".patch_embd", ".patch_merger", "sam.pos_embd", "sam.neck.", "sam.net_",
    "a.rvq.codebook", "mm.a.code_embd",
    *(f"time_mix_{name}.weight" for name in ("first", "lerp_fused", "decay_w1", "decay_w2", "w0", "w1", "w2")),
    *(f"time_mix_{name}.weight" for name in ("v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
)  # fmt: skip
"""Parts of the names of matrices that keep their type: norms, routers, small ones."""
_NOT_QUANTIZED_NAMES = ("position_embd.weight", "token_types.weight")
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
"""Layers of the models that llama.cpp takes for one of 70B, whose small value matrices get more bits."""
_FIVE_BITS_IN_8_EXPERTS = {"q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "iq4_xs", "q4_k_s", "q4_k_m"}

Rules = tuple[tuple[str, str], ...]
"""Names of layers in `_LAYERS` and their type; the first that applies, else the base type."""
_LAYERS: Mapping[str, Callable[[int, int], bool]] = {
    "all": lambda _index, _count: True,
    "first two": lambda index, _count: index < 2,
    "first four": lambda index, _count: index < 4,
    "first sixteenth": lambda index, count: index < count // 16,
    "first eighth": lambda index, count: index < count // 8,
    "outer eighths and every third": lambda index, count: (
        index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
    ),
}
_MORE = "outer eighths and every third"
_VALUES: dict[str, Rules] = {
    "q5_k_m": ((_MORE, "Q6_K"),),
    "q4_k_m": ((_MORE, "Q6_K"),),
    "q4_k_s": (("first four", "Q5_K"),),
    "q3_k_l": (("all", "Q5_K"),),
    "q3_k_m": (("first two", "Q5_K"), ("all", "Q4_K")),
    "q2_k": (("all", "Q3_K"),),
}
_VALUES_OF_SHARED_HEADS: dict[str, Rules] = {
    "iq4_nl": (("all", "Q5_K"),),
    "iq4_xs": (("all", "Q5_K"),),
    "q2_k": (("all", "Q4_K"),),
}
"""Where at least four query heads share one key-value head."""
_DOWN: dict[str, Rules] = {
    "q5_k_m": ((_MORE, "Q6_K"),),
    "q4_k_m": ((_MORE, "Q6_K"),),
    "q4_k_s": (("first eighth", "Q5_K"),),
    "iq4_nl": (("first eighth", "Q5_K"),),
    "iq4_xs": (("first eighth", "Q5_K"),),
    "q3_k_l": (("all", "Q5_K"),),
    "q3_k_m": (("first sixteenth", "Q5_K"), ("all", "Q4_K")),
    "q2_k": (("all", "Q3_K"),),
}
_DOWN_OF_FALCON: dict[str, Rules] = _DOWN | {
    "q4_k_m": (("first sixteenth", "Q6_K"), (_MORE, "Q5_K")),
    "q4_k_s": (),
    "q3_k_l": (("all", "Q4_K"),),
    "q3_k_m": (("first sixteenth", "Q5_K"), (_MORE, "Q4_K"), ("all", "Q3_K")),
}
_ATTENTION_OUTPUT = {"q3_k_l": "Q5_K", "q3_k_m": "Q4_K", "q2_k": "Q3_K"}


@dataclass(frozen=True)
class MixModel:
    """What the mix depends on beside names and shapes; numbers of heads are those of the first layer."""

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int

    @property
    def num_groups(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads if self.num_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Return whether llama.cpp takes it for a model of 70B."""
        if self.num_layers != _LAYERS_OF_70B.get(self.architecture):
            return False
        return self.architecture != "llama" or (self.num_heads != self.num_kv_heads and self.num_experts != 8)


def tensor_types(quant: str, model: MixModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the type of each tensor that the quantizer converts, by name.

    Args:
        shapes: lengths of a tensor's dimensions, the row length first, as in the file.

    Raises:
        ExportError: a matrix whose rows fit no block of the format.
    """
    names = sorted(
        shapes, key=lambda name: (_layer(name), name)
    )  # values and down projections are counted in this order
    mix = _Mix(quant, model, num_values=sum(_category(name) == "value" for name in names), tied=_HEAD not in shapes)
    return {
        name: _fitting(name, mix.type_of(name, shapes[name][0]), shapes[name][0])
        for name in names
        if is_quantized(name, shapes[name])
    }


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether the quantizer converts a tensor: a matrix, or experts, that is no norm or router."""
    is_matrix = any(length > 1 for length in shape[1:])
    kept = name in _NOT_QUANTIZED_NAMES or any(part in name for part in _NOT_QUANTIZED)
    return is_matrix and name.endswith("weight") and not kept


@dataclass
class _Mix:
    quant: str
    model: MixModel
    num_values: int
    tied: bool
    counts: dict[str, int] = field(default_factory=lambda: {"value": 0, "down": 0})

    def type_of(self, name: str, row: int) -> str:
        base = BASE_TYPES[self.quant]
        if name == _HEAD or (self.tied and name in _EMBEDDINGS):
            if self.model.architecture == "falcon" or row % _block_size(base):
                return "Q8_0"
            return base if base == "Q8_0" else "Q6_K"
        if name in _EMBEDDINGS:
            return base
        match _category(name):
            case "value":
                return self._value(self._count("value"))
            case "key":
                return "Q8_0" if self.model.num_experts == 8 else base
            case "down":
                index = self._count("down")
                return self._down(_layer(name) if self.model.num_experts > 1 else index)
            case "attention output":
                return self._attention_output()
        return base

    def _count(self, category: str) -> int:
        self.counts[category] += 1
        return self.counts[category] - 1

    def _value(self, index: int) -> str:
        if self.model.num_experts == 8:
            return "Q8_0"
        rules = {**_VALUES, **_VALUES_OF_SHARED_HEADS} if self.model.num_groups >= 4 else _VALUES
        kind = self._by_layer(rules, index, self.num_values)
        return "Q5_K" if self.model.is_70b and kind in ("Q3_K", "Q4_K") else kind

    def _down(self, index: int) -> str:
        rules = _DOWN_OF_FALCON if self.model.architecture == "falcon" else _DOWN
        return self._by_layer(rules, index, self.model.num_layers)

    def _attention_output(self) -> str:
        base = BASE_TYPES[self.quant]
        if self.model.architecture == "falcon":
            return "Q4_K" if self.quant == "q3_k_l" else base
        if self.model.num_experts == 8:
            return "Q5_K" if self.quant in _FIVE_BITS_IN_8_EXPERTS else base
        return _ATTENTION_OUTPUT.get(self.quant, base)

    def _by_layer(self, rules: Mapping[str, Rules], index: int, count: int) -> str:
        found = (kind for layers, kind in rules.get(self.quant, ()) if _LAYERS[layers](index, count))
        return next(found, BASE_TYPES[self.quant])


def _fitting(name: str, kind: str, row: int) -> str:
    if row % _block_size(kind) == 0:
        return kind
    if kind not in NARROW_TYPES:
        raise ExportError(
            f"{name}: rows of {row} values are no whole number of {kind} blocks of {BLOCK}, and llama.cpp has no other "
            "type for them; use a k-quant (q4_k_m) or --quant f16"
        )
    return NARROW_TYPES[kind] if row % BLOCK == 0 else "F16"


def _block_size(kind: str) -> int:
    return SUPER_BLOCK if kind in NARROW_TYPES else BLOCK


def _category(name: str) -> str | None:
    return next((category for part, category in _CATEGORIES.items() if part in name), None)


def _layer(name: str) -> int:
    layer = name.removeprefix("blk.").partition(".")[0]
    return int(layer) if name.startswith("blk.") and layer.isdigit() else -1
