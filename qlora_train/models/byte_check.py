"""Start-up check of a sharded base: the bytes that ranks gather are those that loading computed.

A cast, or a copy that rewrites NaNs (pytorch#159333), would change packed weights without an error. So each rank hashes its
rows of one unit before `fully_shard` sees them, and compares what it gathers with the hashes of all ranks.
"""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.fsdp_units import gathered, is_sharded_tensor, local_tensor
from qlora_train.models.shard_rows import own_rows, rows_of
from qlora_train.parallel import context
from qlora_train.utils.errors import ModelError

logger = logging.getLogger(__name__)

Hashes = dict[str, str]
"""SHA-256 of a rank's rows, by parameter."""


def hash_own_rows(unit: nn.Module) -> Hashes:
    """Return the hashes of this rank's rows of a unit, before or after `fully_shard`."""
    found = {}
    for name, parameter in _sharded_parameters(unit):
        rows = own_rows(len(parameter))
        part = local_tensor(parameter) if is_sharded_tensor(parameter) else parameter[rows.start : rows.stop]
        found[name] = _hash(part)
    return found


def check_gathered_bytes(unit: nn.Module, name: str, own: Hashes) -> None:
    """Gather a unit and compare its bytes with the hashes of all ranks; all ranks call it.

    Args:
        unit: sharded.
        name: of the unit.
        own: what `hash_own_rows` returned on this rank.

    Raises:
        ModelError: on every rank, if a byte differs on any.
    """
    expected, problem = context().gather(own), ""
    with gathered(unit):
        for parameter_name, parameter in _sharded_parameters(unit):
            for rank, hashes in enumerate(expected):
                rows = rows_of(rank, len(parameter))
                if _hash(parameter[rows.start : rows.stop]) != hashes[parameter_name]:
                    place = f"{name}.{parameter_name}"
                    problem = problem or f"{place}: rank {context().rank} gathers other bytes than rank {rank} loaded"
    problems = [each for each in context().gather(problem) if each]
    if problems:
        raise ModelError(
            f"parallel.strategy: fsdp would train on corrupt weights: {problems[0]} (torch {torch.__version__}); set "
            "parallel.strategy: ddp, and report it"
        )
    logger.debug("byte check: passed (%d gathered tensors of %s are as loaded)", len(own), name)


def _sharded_parameters(unit: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in unit.named_parameters() if parameter.ndim >= 2)


def _hash(tensor: Tensor) -> str:
    copy = tensor.detach().cpu().clone()  # FSDP could not free a storage that NumPy shares
    content: Any = copy.view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()
