"""Two processes divide the reference log-probabilities, under ddp and fsdp, and store those of one process."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_train.runs import RunFolder
from qlora_train.runs.reference_files import FILE
from tests.parallel.test_preference_ranks import RESUMED
from tests.support.pico import build_pico
from tests.support.preference_pairs import write_pairs
from tests.support.ranked_runs import RankedRuns
from tests.support.runs import losses, metrics

STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RankedRuns:
    folder = tmp_path_factory.mktemp("runs")
    runs = RankedRuns(folder, build_pico(folder / "base", num_hidden_layers=1))
    runs.rows = write_pairs(folder / "pairs.jsonl", count=39)
    return runs


@pytest.fixture(scope="module")
def alone(runs: RankedRuns) -> RunFolder:
    run = runs.new()
    runs.finished_by_ranks(run, 1, *RESUMED)
    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_store_the_values_of_one(strategy: str, runs: RankedRuns, alone: RunFolder) -> None:
    run = runs.new()
    runs.finished_by_ranks(run, 2, *RESUMED, f"parallel.strategy={strategy}")
    actual, expected = (load_file(each.reference_logps / FILE) for each in (run, alone))
    for name, values in expected.items():
        assert np.isfinite(values).all()
        np.testing.assert_allclose(actual[name], values, rtol=1e-6)
    assert "sequences" in run.log_file.read_text()
    first, expected_first = (next(line for line in metrics(each) if "loss" in line) for each in (run, alone))
    assert first["rewards/margins"] == pytest.approx(expected_first["rewards/margins"], rel=1e-4, abs=1e-6)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
