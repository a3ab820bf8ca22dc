"""Training state as safetensors and JSON, without pickle.

A nested structure is split in two: ``NAME.safetensors`` holds its tensors under numbered keys, ``NAME.json`` the structure
with references to them. Values and types survive the round trip.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError, first_line, is_out_of_memory

_MALFORMED = (
    KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError, AssertionError,
)  # fmt: skip
_TENSOR, _TUPLE, _INT_KEYS = "__tensor__", "__tuple__", "__int_keys__"


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Restore state. Malformed content raises one CheckpointError: the manifest guarantees bytes, not meaning."""
    try:
        yield
    except _MALFORMED as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{folder}: holds no training state of this run ({type(error).__name__}: {first_line(error)[:200]}); "
            "delete it to resume from the one before"
        ) from error


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Write a nested structure of dicts, lists, tuples, tensors and JSON values."""
    tensors: dict[str, torch.Tensor] = {}
    structure = _pack(tree, tensors)
    atomic_io.write_file(folder / f"{name}.safetensors", lambda path: save_file(tensors, path))
    atomic_io.write_file(folder / f"{name}.json", lambda path: path.write_text(json.dumps(structure), encoding="utf-8"))


def load_tree(folder: Path, name: str) -> Any:
    """Read what `save_tree` wrote; tensors are on the CPU.

    Raises:
        CheckpointError: missing or unreadable file.
    """
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        structure = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return _unpack(structure, tensors)
    except Exception as error:
        raise CheckpointError(f"{folder}: {name} cannot be read ({error}); resume from an older checkpoint") from error


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: key}
    if isinstance(value, dict):
        assert not value.keys() & {_TENSOR, _TUPLE, _INT_KEYS}, "reserved keys"
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, tensors) for key, item in value.items()}
        assert all(isinstance(key, int) for key in value), "keys must be all strings or all integers"
        return {_INT_KEYS: {str(key): _pack(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    assert value is None or isinstance(value, bool | int | float | str), f"{type(value)} cannot be saved"
    return value


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpack(item, tensors) for item in value[_TUPLE])
    if _INT_KEYS in value:
        return {int(key): _unpack(item, tensors) for key, item in value[_INT_KEYS].items()}
    return {key: _unpack(item, tensors) for key, item in value.items()}


def random_state() -> dict[str, Any]:
    """Return the RNG state of Python, NumPy, torch on the CPU and torch on the GPU."""
    state: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = state
    return {
        "python": random.getstate(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": (position, has_gauss, cached)},
        "torch": torch.random.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the RNG state that `random_state` returned."""
    random.setstate(state["python"])
    keys = state["numpy"]["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy"]["rest"]))
    torch.random.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:  # empty if the run began on a CPU
        torch.cuda.set_rng_state(state["cuda"][0])


def load_parameters(parameters: dict[str, torch.nn.Parameter], stored: dict[str, torch.Tensor], where: str) -> None:
    """Copy stored tensors into parameters.

    Raises:
        CheckpointError: names, shapes or dtypes differ; nothing is copied.
    """
    differences = [f"{name} is missing" for name in parameters.keys() - stored.keys()]
    differences += [f"{name} is unknown" for name in stored.keys() - parameters.keys()]
    differences += [
        f"{name} is {tuple(stored[name].shape)} {stored[name].dtype}, the model has {tuple(live.shape)} {live.dtype}"
        for name, live in parameters.items()
        if name in stored and (stored[name].shape != live.shape or stored[name].dtype != live.dtype)
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:3])
        raise CheckpointError(
            f"{where}: does not fit the model: {shown}{' ...' if len(differences) > 3 else ''}; the config of this run "
            "has changed since; use another run.output_dir"
        )
    with torch.no_grad():
        for name, live in parameters.items():
            live.copy_(stored[name])
