"""An adapter as PEFT saved it, read as a list of changes to the base's tensors.

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

from qlora_train.errors import MergeError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA_A, _LORA_B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters", "use_bdlora", "use_qalora",
    "velora_config",
)  # fmt: skip
_MARKERS = ("lora_", "base_layer", "token_adapter", "modules_to_save", "original_module")
"""Parts of a name that PEFT puts into it: with one of these a key is no name of the base."""
_EXACT_INITS = (True, False, "gaussian", "eva")


@dataclass(frozen=True)
class LowRank:
    """W + scale * B @ A; with `magnitude` (DoRA) every row is then scaled to that length. Fields are adapter keys."""

    a: str
    b: str
    magnitude: str | None
    scale: float


@dataclass(frozen=True)
class Replace:
    """The base's tensor is replaced by the adapter's (biases, modules_to_save)."""

    key: str


@dataclass(frozen=True)
class TokenRows:
    """Rows `indices` of an embedding are replaced, and rows beyond its end appended."""

    key: str
    indices: tuple[int, ...]


Update = LowRank | Replace | TokenRows


class AdapterFile:
    """The adapter's config, its changes by base tensor name, and its tensors, each of which is read exactly once.

    Args:
        folder: a PEFT adapter folder.
        embedding: module name of the base's input embeddings, which a plain list of token indices means.

    Raises:
        MergeError: no adapter there, another kind than LoRA, or a tensor or setting whose meaning is not known.
    """

    def __init__(self, folder: Path, embedding: str) -> None:
        self.path = folder / ADAPTER_WEIGHTS
        self.config = _read_config(folder)
        if not self.path.is_file():
            raise MergeError(f"{folder}: no {ADAPTER_WEIGHTS}; point to a folder that PEFT saved an adapter to")
        self._embedding = embedding
        self._file = safe_open(str(self.path), framework="pt", device="cpu")
        self._keys = set(self._file.keys())
        self._reads: Counter[str] = Counter()
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
                "magnitudes, biases, modules_to_save and trained token rows of linear and embedding layers"
            )
        return updates

    def _update_of(self, key: str) -> tuple[str | None, Update | None]:
        """Return the base tensor that a key changes (None: unknown kind) and how (None: another key says so)."""
        name = key.removeprefix(_PREFIX)
        if name.endswith(_LORA_A):
            return self._low_rank(key, name.removesuffix(_LORA_A))
        for suffix in (_LORA_B, _MAGNITUDE):
            if name.endswith(suffix):
                module = name.removesuffix(suffix)
                return (module if f"{_PREFIX}{module}{_LORA_A}" in self._keys else None), None
        if name.endswith(_TOKENS):
            module = name.removesuffix(_TOKENS)
            return f"{module}.weight", TokenRows(key, self._token_indices(module))
        if name.endswith(".base_layer.bias"):
            return name.replace(".base_layer.bias", ".bias"), Replace(key)
        plain = name.endswith((".weight", ".bias")) and not any(marker in name for marker in _MARKERS)
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
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        expected = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        if expected != rank or self.shape(partner)[1] != rank:
            raise MergeError(
                f"{self.path}: {module} has A {self.shape(key)} and B {self.shape(partner)}, but {ADAPTER_CONFIG} "
                f"gives it rank {expected}; the two files are not of one adapter"
            )
        return f"{module}.weight", LowRank(key, partner, magnitude if magnitude in self._keys else None, scale)

    def _token_indices(self, module: str) -> tuple[int, ...]:
        setting = self.config.get("trainable_token_indices")
        by_name = setting if isinstance(setting, dict) else {self._embedding: setting}
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


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """Return the first value whose pattern is the module's full name or its end, as PEFT reads such patterns."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def listed(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
