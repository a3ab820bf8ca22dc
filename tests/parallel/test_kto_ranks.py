"""Two processes train KTO as one does, under ddp and fsdp: the KL divergence is that of the rows of both."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.config import RunConfig
from qlora_train.objectives.kto_loss import KL, METRICS
from tests.parallel.test_data_parallel import MAX_DIFFERENCE, Records
from tests.parallel.test_elastic_resume import SETTINGS as RUN_SETTINGS
from tests.parallel.test_elastic_resume import assert_same_curve
from tests.support.pico import build_pico
from tests.support.ranked_runs import RankedRuns
from tests.support.ranks_training import record_families, relative_difference
from tests.support.runs import make_config, metrics, stopped_after
from tests.support.unpaired_rows import write_labelled
from tests.support.workers import run_workers

NUM_ROWS = 9
OBJECTIVE = ("train.objective=kto", "train.beta=0.2", "train.undesirable_weight=1.5", "data.max_length=192")
SETTINGS = (
    *OBJECTIVE, "quantization.bnb_4bit_compute_dtype=float32", "quantization.min_quantized_share=0", "data.eval=0.34",
    "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=5", "train.max_steps=2",
    "train.eval_steps=2", "train.per_device_eval_batch_size=1", "train.learning_rate=1e-30",
)  # fmt: skip
"""Step 1 has 5 rows for two ranks; step 2, the last of the epoch, has fewer, and the weights of step 1."""
NOISE = -0.05
"""So that the policy differs from its reference, with a KL divergence above 0."""
VARIANTS = {
    "llama": ("llama",),
    "qwen3_moe": ("qwen3_moe",),
    "padded": ("llama", "train.padding_free=false", "train.precompute_ref_log_probs=false"),
    "without KL": ("llama", "train.objective=apo_zero_unpaired"),
}
STRATEGIES = ("ddp", "fsdp")
Configs = dict[str, RunConfig]


@pytest.fixture(scope="module")
def configs(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Configs]:
    """Return a function of a folder's name and a strategy."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = write_labelled(folder / "rows.jsonl", count=NUM_ROWS)

    def make(name: str, strategy: str) -> Configs:
        common = (*SETTINGS, f"data.train={rows}", f"parallel.strategy={strategy}")
        return {
            variant: make_config(folder / name / variant.replace(" ", "_"), pico(model_type), *common, *settings)
            for variant, (model_type, *settings) in VARIANTS.items()
        }

    return make


@pytest.fixture(scope="module")
def alone(configs: Callable[[str, str], Configs]) -> Records:
    return record_families(configs("alone", "none"), 2, NOISE)


@pytest.fixture(scope="module", params=STRATEGIES)
def ranks(
    request: pytest.FixtureRequest, configs: Callable[[str, str], Configs], tmp_path_factory: pytest.TempPathFactory
) -> list[Records]:
    folder = tmp_path_factory.mktemp(request.param)
    return run_workers(record_families, 2, folder, configs(request.param, request.param), 2, NOISE)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_every_gradient_are_those_of_one_process(name: str, alone: Records, ranks: list[Records]) -> None:
    for index, expected in enumerate(alone[name][0]):
        of_ranks = [rank[name][0][index] for rank in ranks]
        assert len({actual.loss for actual in of_ranks}) == 1
        assert abs(of_ranks[0].loss - expected.loss) <= MAX_DIFFERENCE * expected.loss
        assert relative_difference(of_ranks[0].gradients, expected.gradients) <= MAX_DIFFERENCE
        assert sorted(row for actual in of_ranks for row in actual.rows) == sorted(expected.rows)
    assert ranks[0][name][1]["tokens"] == alone[name][1]["tokens"]


@pytest.mark.parametrize("name", VARIANTS)
def test_metrics_and_evaluation_are_those_of_one_process(name: str, alone: Records, ranks: list[Records]) -> None:
    expected, *actual = (record[name][1]["log"] for record in (alone, *ranks))
    names = [metric for metric in METRICS if name != "without KL" or metric != KL]
    for prefix in ("", "eval_"):
        for metric in (*names, "loss"):
            key = prefix + metric
            values = [[line[key] for line in log if key in line] for log in (expected, *actual)]
            assert values[0]
            assert values[1] == values[2], "ranks differ"
            assert values[1] == pytest.approx(values[0], rel=MAX_DIFFERENCE, abs=MAX_DIFFERENCE), key
    if name == "llama":
        assert max(line.get(KL, 0) for line in expected) > 0.01


RESUMED = (*RUN_SETTINGS, *OBJECTIVE, "lora.lora_dropout=0", "train.logging_steps=3")


def test_two_processes_resume_a_run_of_one(tmp_path: Path) -> None:
    runs = RankedRuns(tmp_path, build_pico(tmp_path / "base", num_hidden_layers=1))
    runs.rows = write_labelled(tmp_path / "rows.jsonl", count=40)
    straight = runs.new()
    runs.finished_by_ranks(straight, 1, *RESUMED)
    run = stopped_after(2, straight, tmp_path / "resumed")
    runs.finished_by_ranks(run, 2, *RESUMED, "parallel.strategy=fsdp")
    assert_same_curve(run, straight)
    for key in (KL, "rewards/margins", "logps/chosen", "eval_rewards/margins", f"eval_{KL}"):
        actual, expected = ([line[key] for line in metrics(each) if key in line] for each in (run, straight))
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5), key
