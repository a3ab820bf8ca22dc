"""Processes that hold a part of the base each train as one process does, and resume each other's checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.config import RunConfig
from qlora_train.runs import RunFolder
from tests.parallel.test_data_parallel import DENSE, MAX_DIFFERENCE, MIXTURES, NO_DROPOUT, SETTINGS, VARIANTS, Records
from tests.parallel.test_elastic_resume import SETTINGS as RUN_SETTINGS
from tests.parallel.test_elastic_resume import assert_same_curve
from tests.support.pico import build_pico
from tests.support.ranked_runs import RankedRuns
from tests.support.ranks_training import record_families, relative_difference
from tests.support.runs import make_config, stopped_after
from tests.support.workers import run_workers

FSDP = "parallel.strategy=fsdp"


@pytest.fixture(scope="module")
def bases(pico: Callable[..., Path]) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Return base and settings by name."""
    families = {name: (pico(name, **NO_DROPOUT.get(name, {})), ()) for name in (*DENSE, *MIXTURES)}
    return families | {name: (pico("llama"), settings) for name, settings in VARIANTS.items()}


def configs(bases: dict[str, tuple[Path, tuple[str, ...]]], folder: Path, *overrides: str) -> dict[str, RunConfig]:
    return {
        name: make_config(folder / name, base, *SETTINGS, *settings, *overrides)
        for name, (base, settings) in bases.items()
    }


@pytest.fixture(scope="module")
def alone(bases: dict[str, tuple[Path, tuple[str, ...]]], tmp_path_factory: pytest.TempPathFactory) -> Records:
    return record_families(configs(bases, tmp_path_factory.mktemp("alone")), 1)


@pytest.fixture(scope="module")
def ranks(bases: dict[str, tuple[Path, tuple[str, ...]]], tmp_path_factory: pytest.TempPathFactory) -> list[Records]:
    """Return what three ranks record, which have different numbers of micro-batches."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_workers(record_families, 3, folder, configs(bases, folder, FSDP), 1)


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES, *VARIANTS])
def test_loss_gradients_and_evaluation_are_those_of_one_process(
    name: str, alone: Records, ranks: list[Records]
) -> None:
    ((expected,), log), ((actual,), log_of_ranks) = alone[name], ranks[0][name]
    assert abs(actual.loss - expected.loss) <= MAX_DIFFERENCE * expected.loss
    assert relative_difference(actual.gradients, expected.gradients) <= MAX_DIFFERENCE
    assert sorted(row for rank in ranks for row in rank[name][0][0].rows) == sorted(expected.rows)
    evaluations = [
        [entry["eval_loss"] for entry in each["log"] if "eval_loss" in entry] for each in (log, log_of_ranks)
    ]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RankedRuns:
    folder = tmp_path_factory.mktemp("fsdp")
    return RankedRuns(folder, build_pico(folder / "base", num_hidden_layers=1))


@pytest.fixture(scope="module")
def straight(runs: RankedRuns) -> dict[str, RunFolder]:
    """Undisturbed runs by strategy; ddp is of two processes too."""
    found = {}
    for strategy, num_processes in (("none", 1), ("ddp", 2), ("fsdp", 2)):
        found[strategy] = runs.new()
        settings = (*RUN_SETTINGS, f"parallel.strategy={strategy}", "lora.lora_dropout=0")
        runs.finished_by_ranks(found[strategy], num_processes, *settings)
    return found


def test_a_run_under_fsdp_trains_the_adapter_of_one_process(straight: dict[str, RunFolder]) -> None:
    assert_same_curve(straight["fsdp"], straight["none"])
    assert straight["fsdp"].passed_adapter_check()


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_run_resumes_with_the_other_strategy(
    before: str, after: str, runs: RankedRuns, straight: dict[str, RunFolder], tmp_path: Path
) -> None:
    run = stopped_after(2, straight[before], tmp_path / "resumed")
    runs.finished_by_ranks(run, 2, *RUN_SETTINGS, f"parallel.strategy={after}", "lora.lora_dropout=0")
    assert_same_curve(run, straight["none"])
