"""The disk plan of a run, compared with real runs."""

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.adapters import attach_adapter
from qlora_train.config import RunConfig
from qlora_train.config.optimizers import OPTIMIZERS
from qlora_train.models import load_model
from qlora_train.pipeline import run
from qlora_train.planning.base_and_data import prepare
from qlora_train.planning.disk import check_disk_space, plan_disk
from qlora_train.planning.disk_plan import DiskPlan, num_more_checkpoints, num_saves, num_steps
from qlora_train.runs import RunFolder
from qlora_train.training.optimizer import choose_optimizer
from qlora_train.training.step_end import make_schedule
from qlora_train.utils.errors import TrainingError
from tests.support.runs import make_config, train_run

NAMED = sorted(OPTIMIZERS)


def need_of(config: RunConfig, folder: RunFolder, checkpoint: Path | None = None) -> DiskPlan:
    """Return the plan before the first step of a run."""
    source, data = prepare(config, folder)
    loaded = load_model(config.model, config.quantization, source=source)
    adapted = attach_adapter(loaded, config.lora, seed=config.run.seed)
    optim = choose_optimizer(config.train.optim, adapted)
    config = config.model_copy(update={"train": config.train.model_copy(update={"optim": optim})})
    return plan_disk(folder, adapted, config, data, checkpoint)


def sizes_of(folder: Path) -> tuple[int, int]:
    """Return the size of a folder's files, and their disk usage."""
    files = [path.stat() for path in folder.iterdir()]
    return sum(file.st_size for file in files), sum(512 * file.st_blocks for file in files)


def assert_close_and_not_below(estimate_bytes: int, folder: Path) -> None:
    size_bytes, taken_bytes = sizes_of(folder)
    assert max(size_bytes, taken_bytes) <= estimate_bytes <= 1.2 * size_bytes


def assert_checkpoint_is_as_counted(folder: Path, base: Path, *settings: str) -> None:
    config = make_config(folder, base, "train.max_steps=2", "lora.r=64", *settings)
    need = need_of(config, RunFolder(folder / "none"))
    finished = run(config)
    assert_close_and_not_below(need.checkpoint_bytes, finished.checkpoint(2))


@pytest.mark.parametrize("optimizer", NAMED)
def test_a_checkpoint_is_as_large_as_counted_with_every_optimizer(
    optimizer: str, tmp_path: Path, pico_llama: Path
) -> None:
    assert_checkpoint_is_as_counted(tmp_path, pico_llama, f"train.optim={optimizer}")


@pytest.mark.parametrize(
    "setting",
    ["lora.modules_to_save=[lm_head]", "lora.modules_to_save=[embed_tokens,lm_head]", "lora.use_dora=true",
     "model.new_tokens=[<|a|>,<|b|>]", "lora.bias=all"],
)  # fmt: skip
def test_everything_else_that_trains_is_counted(setting: str, tmp_path: Path, pico_llama: Path) -> None:
    assert_checkpoint_is_as_counted(tmp_path, pico_llama, "train.optim=adamw_8bit", setting)


def test_the_history_of_losses_is_counted(tmp_path: Path, pico_llama: Path) -> None:
    settings = ("train.eval_steps=1", "train.gradient_accumulation_steps=1")
    short, long = (make_config(tmp_path, pico_llama, *settings, f"train.max_steps={steps}") for steps in (1, 20))
    before, after = (need_of(config, RunFolder(tmp_path / "none")).checkpoint_bytes for config in (short, long))
    assert after - before >= (run(long).checkpoint(20) / "trainer_state.json").stat().st_size


@pytest.mark.parametrize(
    ("settings", "num_merges"),
    [(("export.merge_base=original",), 1), (("export.merge_base=auto",), 2),
     (("export.merge_base=original", "lora.modules_to_save=[lm_head]"), 1)],
)  # fmt: skip
def test_adapter_and_merge_are_as_large_as_counted(
    settings: tuple[str, ...], num_merges: int, tmp_path: Path, pico: Callable[..., Path]
) -> None:
    base = pico("llama", hidden_size=256, intermediate_size=1024)
    merging = ("export.merge=true", "export.max_loss_increase=10", "train.max_steps=1", "lora.r=64")
    config = make_config(tmp_path, base, *merging, *settings)
    need = need_of(config, RunFolder(tmp_path / "none"))
    finished = run(config)
    assert_close_and_not_below(need.adapter_bytes, finished.adapter)
    assert_close_and_not_below(need.merged_bytes, finished.merged)
    assert need.num_merges == num_merges


def most_at_once(num_kept: int, num_saves: int, num_here: int) -> int:
    """Write and rotate checkpoints as a run does; return the maximum number at the same time."""
    there = most = num_here
    for _ in range(num_saves):
        there += 1
        most = max(most, there)
        there = min(there, num_kept)
    return most


def test_checkpoints_side_by_side_are_those_of_rotation() -> None:
    for num_kept, num_to_come, num_here in itertools.product(range(1, 5), range(6), range(6)):
        more = num_more_checkpoints(num_kept, num_to_come, num_here)
        assert more == most_at_once(num_kept, num_to_come, num_here) - num_here


@pytest.mark.parametrize("length", ["train.max_steps=10", "train.num_train_epochs=2.5"])
@pytest.mark.parametrize("save_steps", ["1", "3", "100", "null"])
@pytest.mark.parametrize("packing", ["false", "true"])
def test_saves_to_come_are_those_of_the_schedule(
    length: str, save_steps: str, packing: str, tmp_path: Path, pico_llama: Path
) -> None:
    settings = (length, f"train.save_steps={save_steps}", f"data.packing={packing}")
    config = make_config(tmp_path, pico_llama, "train.max_steps=null", *settings)
    for num_rows in (1, 7, 16, 23):
        steps_per_epoch = math.ceil(math.ceil(num_rows / 2) / 2)  # batches of 2, of which 2 are a step
        schedule = make_schedule(config, steps_per_epoch, has_eval=True)
        assert num_steps(config.train, num_rows) == schedule.total_steps
        for done in range(schedule.total_steps + 1):
            to_come = sum(schedule.saves_after(step) for step in range(done + 1, schedule.total_steps + 1))
            counted = num_saves(config, num_rows, schedule.total_steps, done)
            assert counted == to_come or (packing == "true" and save_steps == "null" and counted > to_come)


def test_a_resumed_run_needs_room_for_what_is_left_alone(tmp_path: Path, pico_llama: Path) -> None:
    settings = ("train.max_steps=8", "train.save_steps=1", "train.save_total_limit=3")
    config = make_config(tmp_path, pico_llama, *settings)
    assert need_of(config, RunFolder(tmp_path / "none")).num_checkpoints == 4
    finished = train_run(tmp_path, pico_llama, *settings)
    assert need_of(config, finished, finished.checkpoint(8)).num_checkpoints == 0
    shutil.rmtree(finished.checkpoint(8))
    assert need_of(config, finished, finished.checkpoint(7)).num_checkpoints == 1
    (finished.checkpoint(7) / "adapter.json").write_text("{}")  # damaged: it is in the way and not rotated out
    assert need_of(config, finished, finished.checkpoint(6)).num_checkpoints == 2


def test_the_best_checkpoint_is_one_more(tmp_path: Path, pico_llama: Path) -> None:
    settings = ("train.max_steps=8", "train.save_steps=1", "train.eval_steps=1", "train.save_total_limit=1")
    config = make_config(tmp_path, pico_llama, *settings, "train.load_best_model_at_end=true")
    assert need_of(config, RunFolder(tmp_path / "none")).num_checkpoints == 3


def test_a_plan_that_does_not_fit_is_one_line() -> None:
    need = DiskPlan(2, 1_050_000_000, 200_000_000, 1, 900_000_000)
    check_disk_space(RunFolder(Path("runs/x")), need, 3_200_000_000)
    with pytest.raises(TrainingError) as error:
        check_disk_space(RunFolder(Path("runs/x")), need, 3_199_999_999)
    assert str(error.value) == (
        "run.output_dir: needs 3.2 GB on the disk of runs/x (2 checkpoints 2.1 GB, adapter 0.2 GB, merged model 0.9 GB) "
        "and 3.1 GB are free; make room, lower train.save_total_limit, or choose another run.output_dir"
    )
