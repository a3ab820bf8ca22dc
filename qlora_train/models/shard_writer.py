"""Write safetensors files one shard at a time.

Peak memory is two shards, since safetensors copies what it writes.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from qlora_train.utils.errors import MergeError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def bytes_of_size(text: str) -> int:
    """Return the bytes of a size such as `500MB`; a GB is 10**9 bytes, as in Transformers."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if match is None or int(match[1]) == 0:
        raise MergeError(f"max_shard_size: {text!r} is not a size; give a whole number above 0 and MB or GB, e.g. 5GB")
    return int(match[1]) * _UNITS[match[2]]


def pack(sizes_bytes: Sequence[int], limit_bytes: int) -> list[list[int]]:
    """Return indices of `sizes_bytes` in consecutive groups of at most the limit, or of one larger tensor."""
    groups: list[list[int]] = []
    filled_bytes = limit_bytes
    for index, size_bytes in enumerate(sizes_bytes):
        if not groups or filled_bytes + size_bytes > limit_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(index)
        filled_bytes += size_bytes
    return groups


def write_shards(
    folder: Path,
    names: Sequence[str],
    sizes_bytes: Sequence[int],
    limit_bytes: int,
    tensors: Iterator[torch.Tensor],
) -> int:
    """Write a tensor for every name, with an index when it takes more than one file; return the number of files.

    Args:
        tensors: in the order of `names`; each is consumed when its shard is written.
    """
    groups = pack(sizes_bytes, limit_bytes)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        made = islice(tensors, len(group))
        shard = {names[index]: tensor.contiguous() for index, tensor in zip(group, made, strict=True)}
        assert all(shard[names[p]].nbytes == sizes_bytes[p] for p in group), "a tensor has another size than planned"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        del shard  # before the next one is made
    assert next(tensors, None) is None, "more tensors than planned"
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes_bytes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(groups)
