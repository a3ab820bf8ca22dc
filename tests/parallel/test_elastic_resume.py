"""A run resumes in another number of processes on the same rows; in the same number it resumes to the same bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.runs import RunFolder
from tests.support.pico import build_pico
from tests.support.ranked_runs import RankedRuns
from tests.support.runs import losses, stopped_after

SETTINGS = (
    "train.max_steps=6", "train.save_steps=2", "train.save_total_limit=9", "data.eval=0.25", "train.eval_steps=2",
    "train.load_best_model_at_end=true", "train.gradient_accumulation_steps=4", "train.adam_epsilon=1e-3",
    "quantization.bnb_4bit_compute_dtype=float32",
)  # fmt: skip
"""With a smaller epsilon, Adam amplifies rounding errors of tiny gradients to whole steps."""
WORLD_SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RankedRuns:
    folder = tmp_path_factory.mktemp("elastic")
    return RankedRuns(folder, build_pico(folder / "base", num_hidden_layers=1))


@pytest.fixture(scope="module")
def straight(runs: RankedRuns) -> dict[int, RunFolder]:
    """Undisturbed runs by number of processes, without dropout, whose masks would differ."""
    found = {}
    for world_size in WORLD_SIZES:
        found[world_size] = runs.new()
        runs.finished_by_ranks(found[world_size], world_size, *SETTINGS, "lora.lora_dropout=0")
    return found


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same_curve(actual: RunFolder, expected: RunFolder) -> None:
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-5)
    for name, tensor in weights(expected).items():
        assert (weights(actual)[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_several_processes_train_the_adapter_of_one(world_size: int, straight: dict[int, RunFolder]) -> None:
    assert_same_curve(straight[world_size], straight[1])
    assert straight[world_size].metadata()["world_size"] == world_size


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_a_run_resumes_in_another_number_of_processes(
    before: int, after: int, runs: RankedRuns, straight: dict[int, RunFolder], tmp_path: Path
) -> None:
    run = stopped_after(2, straight[before], tmp_path / "resumed")
    runs.finished_by_ranks(run, after, *SETTINGS, "lora.lora_dropout=0")
    assert_same_curve(run, straight[1])
    (change,) = [change for change in run.metadata()["changes"] if change["key"] == "world_size"]
    assert (change["before"], change["now"]) == (before, after)


def test_two_processes_with_dropout_resume_to_the_same_bits(runs: RankedRuns, tmp_path: Path) -> None:
    """Each rank has random numbers of its own, which the checkpoint holds."""
    whole = runs.new()
    expected = runs.finished_by_ranks(whole, 2, *SETTINGS)
    checkpoint = whole.checkpoint(2)
    states = [load_file(checkpoint / f"{name}.safetensors") for name in ("random", "random-1")]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    run = stopped_after(2, whole, tmp_path / "resumed")
    assert runs.finished_by_ranks(run, 2, *SETTINGS) == expected
