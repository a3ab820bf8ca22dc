"""An adapter as PEFT saved it, read as a list of changes to the parameters of the model.

Every tensor of the file is understood, or the adapter is refused: a tensor skipped in silence is a model that was never
trained. Nothing here loads a model.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora_train.export.merging.meta_model import MetaModel
from qlora_train.export.merging.peft_wrappers import WrappedParameter, in_wrapping_order, targeted_parameters
from qlora_train.utils.errors import MergeError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA_A, _LORA_B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "lora_ga_config",
    "megatron_config", "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_WRAPPED = ".base_layer"
_MARKERS = ("lora_", "base_layer", "token_adapter", "modules_to_save", "original_module")
"""Parts of a name that PEFT puts into it: with one of these a key is no name of the base."""
_EXACT_INITS = (True, False, "gaussian", "eva")


@dataclass(frozen=True)
class LowRank:
    """W + scale * B @ A; with `magnitude` (DoRA) every row is then scaled to that length. Fields are adapter keys.

    Where the parameter is stored as (in, out), `transposed`, W is its transpose.
    """

    a: str
    b: str
    magnitude: str | None
    scale: float
    transposed: bool


@dataclass(frozen=True)
class ExpertLowRank:
    """W[e] + scale * B[:, :, e] @ A[e] for every expert e, of A as (experts, rank, in) and B as (out, rank, experts).

    Where W[e] is stored as (in, out), `transposed`, what is added is the transpose.
    """

    a: str
    b: str
    scale: float
    num_experts: int
    transposed: bool


@dataclass(frozen=True)
class Replace:
    """The base's tensor is replaced by the adapter's (biases, modules_to_save)."""

    key: str


@dataclass(frozen=True)
class TokenRows:
    """Rows `indices` of an embedding are replaced, and rows beyond its end appended."""

    key: str
    indices: tuple[int, ...]


Update = LowRank | ExpertLowRank | Replace | TokenRows


class AdapterFile:
    """The adapter's config, its changes by parameter name, and its tensors, each of which is read exactly once.

    Args:
        folder: a PEFT adapter folder.
        skeleton: the model that it is of.

    Raises:
        MergeError: no adapter there, another kind than LoRA, or a tensor or setting whose meaning is not known.
    """

    def __init__(self, folder: Path, meta_model: MetaModel) -> None:
        self.path = folder / ADAPTER_WEIGHTS
        self.config = _read_config(folder)
        if not self.path.is_file():
            raise MergeError(f"{folder}: no {ADAPTER_WEIGHTS}; point to a folder that PEFT saved an adapter to")
        self._skeleton = meta_model
        self._file = safe_open(str(self.path), framework="pt", device="cpu")
        self._keys = set(self._file.keys())
        self._reads: Counter[str] = Counter()
        self._wrapped = targeted_parameters(meta_model.model, self.config.get("target_parameters") or [])
        self.updates = self._understand()

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor in float32 and count the read."""
        self._reads[key] += 1
        tensor: torch.Tensor = self._file.get_tensor(key)
        if not tensor.isfinite().all():
            raise MergeError(f"{self.path}: {key} has values that are not finite; take an earlier checkpoint")
        return tensor.float()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._file.get_slice(key).get_shape())

    def same(self, key: str, other: str) -> bool:
        """Say whether two tensors are equal; does not count as reading them."""
        return torch.equal(self._file.get_tensor(key), self._file.get_tensor(other))

    def assert_all_read_once(self) -> None:
        """Hold the merge to its promise: every tensor went into exactly one place."""
        wrong = {key: self._reads[key] for key in self._keys if self._reads[key] != 1}
        assert not wrong, f"adapter tensors not used exactly once: {wrong}"

    def _understand(self) -> dict[str, Update]:
        updates: dict[str, Update] = {}
        unknown = sorted(key for key in self._keys if not key.startswith(_PREFIX))
        for key in sorted(self._keys - set(unknown)):
            target, update = self._update_of(key)
            if target is None:
                unknown.append(key)
            elif update is not None and target in updates:
                raise MergeError(f"{self.path}: {key} changes {target} a second time; which one counts is unknown")
            elif update is not None:
                updates[target] = update
        if unknown:
            raise MergeError(
                f"{self.path}: {len(unknown)} tensors of unknown kind: {listed(unknown)}; known are LoRA A and B, DoRA "
                "magnitudes, biases, modules_to_save and trained token rows of linear, embedding and expert layers"
            )
        return updates

    def _update_of(self, key: str) -> tuple[str | None, Update | None]:
        """Return the parameter that a key changes (None: unknown kind) and how (None: another key says so)."""
        name = key.removeprefix(_PREFIX)
        if name.endswith(_LORA_A):
            module = name.removesuffix(_LORA_A)
            wrapped = module.replace(_WRAPPED, "")
            return self._of_parameter(key, wrapped) if wrapped in self._wrapped else self._low_rank(key, module)
        for suffix in (_LORA_B, _MAGNITUDE):
            if name.endswith(suffix):
                module = name.removesuffix(suffix)
                known = f"{_PREFIX}{module}{_LORA_A}" in self._keys
                if suffix == _MAGNITUDE and module.replace(_WRAPPED, "") in self._wrapped:
                    known = False  # PEFT has no DoRA for parameters
                return (module if known else None), None
        if name.endswith(_TOKENS):
            module = name.removesuffix(_TOKENS)
            return f"{module}.weight", TokenRows(key, self._token_indices(module))
        if name.endswith(".base_layer.bias"):
            return name.replace(".base_layer.bias", ".bias"), Replace(key)
        known = name in self._skeleton.shapes or name.endswith((".weight", ".bias"))
        plain = known and not any(marker in name for marker in _MARKERS)
        return (name, Replace(key)) if plain else (None, None)

    def _low_rank(self, key: str, module: str) -> tuple[str | None, Update | None]:
        partner, magnitude = f"{_PREFIX}{module}{_LORA_B}", f"{_PREFIX}{module}{_MAGNITUDE}"
        if partner not in self._keys:
            return None, None
        if bool(self.config.get("use_dora")) != (magnitude in self._keys):
            raise MergeError(
                f"{self.path}: use_dora is {self.config.get('use_dora')} in {ADAPTER_CONFIG}, but the magnitude vector "
                f"of {module} is {'there' if magnitude in self._keys else 'missing'}; save the adapter again"
            )
        rank = self.shape(key)[0]
        expected = self._rank(module)
        if expected != rank or self.shape(partner)[1] != rank:
            raise MergeError(
                f"{self.path}: {module} has A {self.shape(key)} and B {self.shape(partner)}, but {ADAPTER_CONFIG} "
                f"gives it rank {expected}; the two files are not of one adapter"
            )
        dora = magnitude if magnitude in self._keys else None
        transposed = module in self._skeleton.conv1d
        return f"{module}.weight", LowRank(key, partner, dora, self._scale(module, rank), transposed)

    def _of_parameter(self, key: str, module: str) -> tuple[str | None, Update | None]:
        """Return the parameter of a wrapped module that the A of one of its wrappers changes, and how."""
        depths = range(len(self._wrapped[module]) - 1, -1, -1)
        keys = [f"{_PREFIX}{module}{_WRAPPED * depth}{_LORA_A}" for depth in depths]
        partners = [a.replace(_LORA_A, _LORA_B) for a in keys]
        if key not in keys or not self._keys.issuperset(keys + partners):
            return None, None
        order = in_wrapping_order(
            f"{self.path}: {module}",
            [self._wrapped_parameter(module, name) for name in self._wrapped[module]],
            [(self.shape(a), self.shape(b)) for a, b in zip(keys, partners, strict=True)],
        )
        position = keys.index(key)
        parameter, partner = order[position], partners[position]
        scale = self._scale(parameter.name, parameter.rank)
        if len(parameter.shape) == 2:
            return parameter.name, LowRank(key, partner, None, scale, transposed=False)
        return parameter.name, ExpertLowRank(key, partner, scale, parameter.num_experts, parameter.is_transposed)

    def _wrapped_parameter(self, module: str, name: str) -> WrappedParameter:
        is_transposed = bool(getattr(self._skeleton.model.get_submodule(module), "is_transposed", False))
        return WrappedParameter(name, self._skeleton.shapes[name], self._rank(name), is_transposed)

    def _rank(self, name: str) -> int:
        return int(_by_pattern(self.config.get("rank_pattern"), name, self.config["r"]))

    def _scale(self, name: str, rank: int) -> float:
        alpha = _by_pattern(self.config.get("alpha_pattern"), name, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _token_indices(self, module: str) -> tuple[int, ...]:
        setting = self.config.get("trainable_token_indices")
        by_name = setting if isinstance(setting, dict) else {self._skeleton.embedding: setting}
        for name, indices in by_name.items():
            if indices and (module == name or module.endswith(f".{name}")):
                return tuple(indices)
        raise MergeError(
            f"{self.path}: trained rows for {module}, but trainable_token_indices in {ADAPTER_CONFIG} names "
            f"{listed(list(by_name))}"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MergeError(f"{path}: not there; point to a folder that PEFT saved an adapter to") from None
    except ValueError as error:
        raise MergeError(f"{path}: not readable as JSON ({error}); take another checkpoint") from None
    if config.get("peft_type") != "LORA":
        raise MergeError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be merged")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise MergeError(
                f"{path}: {name} is set to {config[name]!r}, which the merge does not know; use the adapter"
            )
    init = config.get("init_lora_weights", True)
    if not isinstance(init, list) and init not in _EXACT_INITS:
        raise MergeError(
            f"{path}: init_lora_weights is {init!r}, which changed the base while training; convert it to a plain LoRA "
            "adapter first (PEFT: path_initial_model_for_weight_conversion)"
        )
    return config


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: float) -> float:
    """Return the first value whose pattern is the full name or its end, as PEFT reads such patterns."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return float(default)


def listed(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
