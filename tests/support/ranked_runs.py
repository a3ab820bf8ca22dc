"""Runs of several processes, each started as a launcher would, by the fork server of the fault tests."""

import os
import tempfile
import time
from pathlib import Path

from qlora_train.runs import RunFolder
from qlora_train.utils.launcher import RENDEZVOUS
from tests.faults.runs import TIMEOUT_SECONDS, Child, Ended, Runs
from tests.support.runs import adapter_bytes


class RankedRuns(Runs):
    """Runs of one base and data set in any number of processes."""

    def start_ranks(
        self, run: RunFolder, num_processes: int, *overrides: str, of_rank_1: tuple[str, ...] = ()
    ) -> list[Child]:
        """Start all ranks of a run, and return at once; `of_rank_1` are overrides of that rank alone."""
        if num_processes == 1:
            return [self.start(run, *overrides)]
        place = Path(tempfile.mkdtemp(dir=self.folder)) / "rendezvous"
        common = {
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "GLOO_SOCKET_IFNAME": "lo",
            RENDEZVOUS: f"file://{place}",
        }
        return [
            self.start(
                run, *overrides, *(of_rank_1 if rank == 1 else ()), RANK=str(rank), LOCAL_RANK=str(rank), **common
            )
            for rank in range(num_processes)
        ]

    def start_connected(self, run: RunFolder, num_processes: int, *overrides: str) -> list[Child]:
        """Start all ranks, and return when rank 0 has opened the run folder.

        Until then only a launcher can notice that a process was killed.
        """
        ranks = self.start_ranks(run, num_processes, *overrides)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not run.config_file.is_file():
            assert time.monotonic() < deadline, "the processes do not connect"
            time.sleep(0.01)
        return ranks

    def end_of_ranks(self, run: RunFolder, num_processes: int, *overrides: str) -> list[Ended]:
        """Run all ranks until they end."""
        return [rank.end() for rank in self.start_ranks(run, num_processes, *overrides)]

    def finished_by_ranks(self, run: RunFolder, num_processes: int, *overrides: str) -> bytes:
        """Run all ranks to a successful end, and return the bytes of the adapter."""
        ended = self.end_of_ranks(run, num_processes, *overrides)
        assert [rank.status for rank in ended] == [0] * num_processes, "\n".join(rank.log[-2000:] for rank in ended)
        return adapter_bytes(run)


def lines_of(ended: Ended) -> list[str]:
    """Return what a process wrote to standard error or output at its end, without library noise."""
    return [line for line in ended.log.splitlines() if line.startswith(("rank ", "settings of rank"))]


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
