"""Read a PEFT adapter as changes to the model's parameters, without loading a model.

Every tensor of the file must be understood, or the adapter is refused: a skipped tensor would give a model that was never
trained.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from qlora_train.adapters.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_settings
from qlora_train.export.merging.meta_model import MetaModel
from qlora_train.export.merging.peft_wrappers import WrappedParameter, in_wrapping_order, targeted_parameters
from qlora_train.utils.errors import MergeError, listed

_PREFIX = "base_model.model."
_LORA_A, _LORA_B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_WRAPPED = ".base_layer"
_PEFT_PARTS = ("lora_", "base_layer", "token_adapter", "modules_to_save", "original_module")
"""A key with one of these is not a name of the base."""


@dataclass(frozen=True)
class LowRank:
    """W + scale * B @ A; DoRA then scales every row to its `magnitude`. Fields are adapter keys.

    `transposed`: the parameter is stored as (in, out), the transpose of W.
    """

    a: str
    b: str
    magnitude: str | None
    scale: float
    transposed: bool


@dataclass(frozen=True)
class ExpertLowRank:
    """W[e] + scale * B[:, :, e] @ A[e] for every expert e, of A as (experts, rank, in) and B as (out, rank, experts).

    `transposed`: W[e] is stored as (in, out).
    """

    a: str
    b: str
    scale: float
    num_experts: int
    transposed: bool


@dataclass(frozen=True)
class Replace:
    """The adapter's tensor replaces the base's (biases, modules_to_save)."""

    key: str


@dataclass(frozen=True)
class TokenRows:
    """Replace rows `indices` of an embedding; append those beyond its end."""

    key: str
    indices: tuple[int, ...]


Update = LowRank | ExpertLowRank | Replace | TokenRows


class AdapterFile:
    """A PEFT adapter folder: its settings, its changes by parameter name, and its tensors, each read exactly once.

    Raises:
        ConfigError: no plain LoRA adapter.
        MergeError: an unknown tensor.
    """

    def __init__(self, folder: Path, meta_model: MetaModel) -> None:
        self.path = folder / ADAPTER_WEIGHTS
        self.settings = read_adapter_settings(folder, None)
        rank, alpha = self.settings.r, self.settings.lora_alpha
        self._scale = alpha / (math.sqrt(rank) if self.settings.use_rslora else rank)
        self._meta_model = meta_model
        self._file = safe_open(str(self.path), framework="pt", device="cpu")
        self._keys = set(self._file.keys())
        self._reads: Counter[str] = Counter()
        self._wrapped = targeted_parameters(meta_model.model, self.settings.target_parameters or [])
        self.updates = self._find_updates()

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

    def assert_all_read_once(self) -> None:
        """Assert that every tensor was used exactly once."""
        wrong = {key: self._reads[key] for key in self._keys if self._reads[key] != 1}
        assert not wrong, f"adapter tensors not used exactly once: {wrong}"

    def _find_updates(self) -> dict[str, Update]:
        updates: dict[str, Update] = {}
        unknown = sorted(key for key in self._keys if not key.startswith(_PREFIX))
        for key in sorted(self._keys - set(unknown)):
            target, update = self._update_of(key)
            if target is None:
                unknown.append(key)
            elif update is not None and target in updates:
                raise MergeError(f"{self.path}: {key} changes {target} a second time; it is unknown which one counts")
            elif update is not None:
                updates[target] = update
        if unknown:
            raise MergeError(
                f"{self.path}: {len(unknown)} tensors of unknown kind: {listed(unknown)}; known are LoRA A and B, DoRA "
                "magnitudes, biases, modules_to_save and trained token rows of linear, embedding and expert layers"
            )
        return updates

    def _update_of(self, key: str) -> tuple[str | None, Update | None]:
        """Return the parameter that a key changes (None: unknown kind) and how (None: its partner key defines it)."""
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
        known = name in self._meta_model.shapes or name.endswith((".weight", ".bias"))
        plain = known and not any(part in name for part in _PEFT_PARTS)
        return (name, Replace(key)) if plain else (None, None)

    def _low_rank(self, key: str, module: str) -> tuple[str | None, Update | None]:
        partner, magnitude = f"{_PREFIX}{module}{_LORA_B}", f"{_PREFIX}{module}{_MAGNITUDE}"
        if partner not in self._keys:
            return None, None
        has_magnitude = magnitude in self._keys
        if self.settings.use_dora != has_magnitude:
            raise MergeError(
                f"{self.path}: use_dora is {self.settings.use_dora} in {ADAPTER_CONFIG}, but {module} has "
                f"{'a' if has_magnitude else 'no'} magnitude vector; save the adapter again"
            )
        if not self.settings.r == self.shape(key)[0] == self.shape(partner)[1]:
            raise MergeError(
                f"{self.path}: {module} has A {self.shape(key)} and B {self.shape(partner)}, but {ADAPTER_CONFIG} has rank "
                f"{self.settings.r}; the two files do not belong together"
            )
        transposed = module in self._meta_model.conv1d
        return f"{module}.weight", LowRank(key, partner, magnitude if has_magnitude else None, self._scale, transposed)

    def _of_parameter(self, key: str, module: str) -> tuple[str | None, Update | None]:
        """Return the parameter of a wrapped module that the A of one of its wrappers changes, and how."""
        depths = range(len(self._wrapped[module]) - 1, -1, -1)
        keys = [f"{_PREFIX}{module}{_WRAPPED * depth}{_LORA_A}" for depth in depths]
        partners = [a.replace(_LORA_A, _LORA_B) for a in keys]
        if key not in keys or not self._keys.issuperset(keys + partners):
            return None, None
        is_transposed = bool(getattr(self._meta_model.model.get_submodule(module), "is_transposed", False))
        order = in_wrapping_order(
            f"{self.path}: {module}",
            [
                WrappedParameter(name, self._meta_model.shapes[name], self.settings.r, is_transposed)
                for name in self._wrapped[module]
            ],
            [(self.shape(a), self.shape(b)) for a, b in zip(keys, partners, strict=True)],
        )
        index = keys.index(key)
        parameter, partner = order[index], partners[index]
        if len(parameter.shape) == 2:
            return parameter.name, LowRank(key, partner, None, self._scale, transposed=False)
        return parameter.name, ExpertLowRank(key, partner, self._scale, parameter.num_experts, parameter.is_transposed)

    def _token_indices(self, module: str) -> tuple[int, ...]:
        setting = self.settings.trainable_token_indices
        by_name = setting if isinstance(setting, dict) else {self._meta_model.embedding: setting}
        for name, indices in by_name.items():
            if indices and (module == name or module.endswith(f".{name}")):
                return tuple(indices)
        raise MergeError(
            f"{self.path}: trained rows for {module}, but trainable_token_indices in {ADAPTER_CONFIG} names "
            f"{listed(list(by_name))}"
        )
