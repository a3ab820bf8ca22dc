"""The context of one process is trivial; that of several exchanges values, and notices a process that has ended."""

import ast
import time
from pathlib import Path

import pytest
import torch

from qlora_train.parallel import context
from qlora_train.parallel.process_group import Gpu, check_gpus
from qlora_train.utils.errors import ModelError
from tests.support.collectives import end_first, exchange, fail_in_nccl, sum_of_random
from tests.support.source_tree import PACKAGE, imported, tree_of
from tests.support.workers import run_workers


def test_one_process_is_a_run_of_its_own() -> None:
    this = context()
    tensor = torch.tensor([1.0, 2.0])
    assert (this.rank, this.world_size, this.is_main, this.is_local_main) == (0, 1, True, True)
    assert this.sum_(tensor) is tensor
    assert (this.all_true(True), this.all_true(False)) == (True, False)
    assert (this.broadcast("value"), this.gather("value")) == ("value", ["value"])
    with this.local_main_first():
        this.barrier()


def test_torch_distributed_is_imported_for_the_context_and_for_fsdp() -> None:
    importers = {
        file.name
        for file in PACKAGE.rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imported(ast.walk(tree_of(file))))
    }
    assert importers == {"process_group.py", "fsdp_units.py", "shard_base.py"}


@pytest.mark.parametrize("num_processes", [2, 3])
def test_every_rank_gets_the_same_values(num_processes: int, tmp_path: Path) -> None:
    results = run_workers(exchange, num_processes, tmp_path)
    ranks = list(range(num_processes))
    assert [result["rank"] for result in results] == ranks
    for result in results:
        assert result["sum"] == [sum(ranks), num_processes]
        assert result["all"] == (True, False)
        assert result["broadcast"] == {"rank": 0}
        assert [(rank, int(tensor)) for rank, tensor in result["gather"]] == [(rank, rank) for rank in ranks]
    (first,), *others = (result["prepared"] for result in results)
    assert all(first < later for (later,) in others)


def test_sums_are_bitwise_equal_on_all_ranks(tmp_path: Path) -> None:
    first, *others = run_workers(sum_of_random, 4, tmp_path, 100_003)
    assert all(other == first for other in others)
    expected = sum(torch.randn(100_003, generator=torch.Generator().manual_seed(rank)).double() for rank in range(4))
    torch.testing.assert_close(
        torch.frombuffer(bytearray(first), dtype=torch.float32), expected.float(), rtol=0, atol=2e-6
    )


DUPLICATE = """NCCL error in: NCCLUtils.cpp:93, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"""
REMOTE = """NCCL error in: NCCLUtils.cpp:93, remote process exited or there was a network error, NCCL version 2.27
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketPollConnect: connect returned Connection refused"""


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (DUPLICATE, "NCCL fails (Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000)"),
        (REMOTE, "another process of the run has ended (NCCL error in"),
    ],
)
def test_an_error_of_nccl_itself_does_not_blame_another_process(message: str, cause: str, tmp_path: Path) -> None:
    for rank, found in enumerate(run_workers(fail_in_nccl, 2, tmp_path, message)):
        assert found.startswith(f"rank {rank}: {cause}")
        assert "\n" not in found


def test_ranks_with_and_without_a_gpu_do_not_train_together(messages: pytest.LogCaptureFixture) -> None:
    check_gpus([Gpu("a", None), Gpu("b", None)])
    check_gpus([Gpu("a", "H200"), Gpu("b", "H200")])
    check_gpus([Gpu("a", "H200", uuid="1"), Gpu("a", "H200", uuid="2"), Gpu("b", "H200", uuid="1")])
    assert not messages.records
    check_gpus([Gpu("a", "RTX 3090"), Gpu("a", "RTX 4090")])
    assert "RTX 3090, RTX 4090" in messages.text
    for problem, shown in (
        (None, "torch finds none there"),
        ("GPU: the NVIDIA driver fails", "the NVIDIA driver fails"),
    ):
        with pytest.raises(ModelError, match=f"^rank 1 on b: GPU: {shown.removeprefix('GPU: ')};"):
            check_gpus([Gpu("a", "H200"), Gpu("b", None, problem)])


def test_two_ranks_on_one_gpu_are_one_line() -> None:
    """As without LOCAL_RANK, where a job starts two processes of a machine that each see all GPUs."""
    with pytest.raises(ModelError, match=r"^rank 2 on b: its GPU is that of rank 1; .* own LOCAL_RANK"):
        check_gpus([Gpu("a", "H200", uuid="1"), Gpu("b", "H200", uuid="1"), Gpu("b", "H200", uuid="1")])


def test_a_process_that_ends_is_noticed_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    first, second, third = run_workers(end_first, 3, tmp_path)
    assert time.monotonic() - started < 30
    assert second is None
    for rank, message in ((0, first), (2, third)):
        assert message.startswith(f"rank {rank}: another process of the run has ended")
        assert "\n" not in message
