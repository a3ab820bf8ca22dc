"""Available host memory respects cgroups v1 and v2, inside and outside containers."""

from pathlib import Path

import psutil
import pytest
import torch

from qlora_train.training.memory import activation_offloading, dequantized_cache
from qlora_train.utils import host_memory
from qlora_train.utils.host_memory import available_bytes, limit_bytes

GIB = 1 << 30
CPU = torch.device("cpu")
LIMITS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class Machine:
    """A machine of 64 GiB with cgroups of its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        free = psutil.virtual_memory()._replace(total=64 * GIB, available=50 * GIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        monkeypatch.setattr(host_memory, "CGROUPS", root)
        monkeypatch.setattr(host_memory, "MEMBERSHIP", root / "membership")

    def member(self, *lines: str) -> None:
        (self.root / "membership").write_text("".join(line + "\n" for line in lines))

    def group(self, controller: str, path: str, limit: int | str, use: int, cached: int = 0) -> None:
        names, folder = LIMITS[controller], self.root / controller / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{use}\n")
        (folder / "memory.stat").write_text(f"anon {use - cached}\n{names[2]} {cached}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_without_cgroups_free_memory_counts(machine: Machine) -> None:
    assert available_bytes() == 50 * GIB
    machine.member("0::/user.slice")
    machine.group("", "user.slice", "max", 9 * GIB)
    assert available_bytes() == 50 * GIB


@pytest.mark.parametrize(("controller", "line"), [("", "0::/pod/job"), ("memory", "7:cpu,memory:/pod/job")])
def test_tightest_limit_of_the_chain_counts_without_the_page_cache(
    controller: str, line: str, machine: Machine
) -> None:
    machine.member("3:pids:/elsewhere", line)
    machine.group(controller, "pod/job", 30 * GIB, 4 * GIB)
    assert available_bytes() == 26 * GIB
    machine.group(controller, "pod", 16 * GIB, 15 * GIB, cached=5 * GIB)
    assert available_bytes() == 6 * GIB
    assert limit_bytes() == 16 * GIB
    machine.group(controller, "pod/job", 4 * GIB, 5 * GIB)
    assert available_bytes() == 0
    assert limit_bytes() == 4 * GIB


@pytest.mark.parametrize(("controller", "line"), [("", "0::/"), ("memory", "4:memory:/docker/0123456789")])
def test_limit_is_found_from_inside_a_container(controller: str, line: str, machine: Machine) -> None:
    machine.member(line)
    machine.group(controller, "", 8 * GIB, 2 * GIB)
    assert available_bytes() == 6 * GIB


def test_cgroup_without_statistics_has_no_page_cache(machine: Machine) -> None:
    """As in gVisor's memory controller."""
    machine.member("4:memory:/")
    machine.group("memory", "", 8 * GIB, 2 * GIB)
    (machine.root / "memory" / "memory.stat").unlink()
    assert available_bytes() == 6 * GIB


def test_unlimited_group_of_version_1_is_no_limit(machine: Machine) -> None:
    machine.member("4:memory:/")
    machine.group("memory", "", 0x7FFFFFFFFFFFF000, 9 * GIB)
    assert available_bytes() == 50 * GIB
    assert limit_bytes() == 64 * GIB


def test_caches_and_offloading_respect_the_limit(machine: Machine) -> None:
    machine.member("0::/")
    machine.group("", "", 8 * GIB, 7 * GIB)
    assert dequantized_cache.budget_bytes("auto", CPU) == dequantized_cache.CACHE_SHARE * GIB
    with pytest.raises(MemoryError, match=r"the host has 1\.1 GB left"):
        activation_offloading.Slabs(pinned=False).allocate(1)
