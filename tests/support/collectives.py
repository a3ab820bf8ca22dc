"""What the tests of the context run in each process."""

import os
import random
import time
from typing import Any

import torch
import torch.distributed as dist

from qlora_train.parallel import context
from qlora_train.utils.errors import ProcessGroupError


def exchange() -> dict[str, Any]:
    """Return the results of every collective."""
    this = context()
    time.sleep(random.random() / 10)
    order = []
    with this.local_main_first():
        order.append(time.monotonic())
    return {
        "rank": this.rank,
        "sum": this.sum_(torch.tensor([float(this.rank), 1.0])).tolist(),
        "all": (this.all_true(True), this.all_true(this.rank != 1)),
        "broadcast": this.broadcast({"rank": this.rank}),
        "gather": this.gather((this.rank, torch.tensor(this.rank))),
        "prepared": order,
    }


def sum_of_random(count: int) -> bytes:
    """Return the bytes of a sum of different random numbers on each rank."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(context().rank))
    return context().sum_(numbers).numpy().tobytes()


def fail_in_nccl(message: str) -> str:
    """Return what a rank says if torch raises an error of NCCL."""
    try:
        with context().peer_errors():
            raise dist.DistBackendError(message)
    except ProcessGroupError as error:
        return str(error)


def end_first() -> str:
    """Kill rank 1 before a collective, and return how the others notice."""
    if context().rank == 1:
        os._exit(0)
    try:
        context().broadcast(1)
    except ProcessGroupError as error:
        return str(error)
    return "nothing was raised"
