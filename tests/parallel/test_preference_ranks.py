"""Two processes train on preference pairs as one does, under ddp and fsdp, and resume a run of one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.config import RunConfig
from qlora_train.objectives.preference_loss import METRICS
from qlora_train.runs import RunFolder
from tests.parallel.test_data_parallel import MAX_DIFFERENCE, Records
from tests.parallel.test_elastic_resume import SETTINGS as RUN_SETTINGS
from tests.parallel.test_elastic_resume import assert_same_curve
from tests.support.pico import build_pico
from tests.support.preference_pairs import write_pairs
from tests.support.ranked_runs import RankedRuns
from tests.support.ranks_training import record_families, relative_difference
from tests.support.runs import adapted_model, make_config, metrics, stopped_after
from tests.support.workers import run_workers

NUM_PAIRS = 9
OBJECTIVE = ("train.objective=dpo", "train.beta=0.2", "data.max_length=192")
SETTINGS = (
    *OBJECTIVE, "quantization.bnb_4bit_compute_dtype=float32", "quantization.min_quantized_share=0", "data.eval=0.34",
    "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=5", "train.max_steps=2",
    "train.eval_steps=2", "train.per_device_eval_batch_size=1", "train.learning_rate=1e-30",
)  # fmt: skip
"""Step 1 has 5 pairs for two ranks; step 2, the last of the epoch, has one pair, and the weights of step 1."""
NOISE = 0.05
"""So that the policy differs from its reference, and both matrices of the adapter have gradients."""
VARIANTS = {
    "llama": ("llama",),
    "qwen3_moe": ("qwen3_moe",),
    "padded": ("llama", "train.padding_free=false"),
    "per token": ("llama", "train.objective=ipo"),
    "with SFT term": ("llama", "train.objective=orpo"),
    "after SFT": ("llama", "lora.adapter_path={adapter}"),
    "new token": ("llama", "model.new_tokens=[sum]"),
}
STRATEGIES = ("ddp", "fsdp")
RESUMED = (*RUN_SETTINGS, *OBJECTIVE, "lora.lora_dropout=0", "train.logging_steps=3")
"""The checkpoint of step 2 holds sums of metrics that are not logged yet."""
Configs = dict[str, RunConfig]


@pytest.fixture(scope="module")
def configs(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Configs]:
    """Return a function of a folder's name and a strategy."""
    folder = tmp_path_factory.mktemp("pairs")
    rows, adapter = write_pairs(folder / "pairs.jsonl", count=NUM_PAIRS, seed=5, ragged=True), folder / "adapter"
    adapted_model(folder, pico("llama")).model.save_pretrained(str(adapter), save_embedding_layers=False)

    def make(name: str, strategy: str) -> Configs:
        common = (*SETTINGS, f"data.train={rows}", f"parallel.strategy={strategy}")
        return {
            variant: make_config(
                folder / name / variant, pico(model_type), *common, *(each.format(adapter=adapter) for each in settings)
            )
            for variant, (model_type, *settings) in VARIANTS.items()
        }

    return make


@pytest.fixture(scope="module")
def alone(configs: Callable[[str, str], Configs]) -> Records:
    return record_families(configs("alone", "none"), 2, NOISE)


@pytest.fixture(scope="module", params=STRATEGIES)
def ranks(
    request: pytest.FixtureRequest,
    configs: Callable[[str, str], Configs],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Records]:
    folder = tmp_path_factory.mktemp(request.param)
    return run_workers(record_families, 2, folder, configs(request.param, request.param), 2, NOISE)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_every_gradient_of_pairs_are_those_of_one_process(
    name: str, alone: Records, ranks: list[Records]
) -> None:
    for index, expected in enumerate(alone[name][0]):
        of_ranks = [rank[name][0][index] for rank in ranks]
        assert len({actual.loss for actual in of_ranks}) == 1
        assert abs(of_ranks[0].loss - expected.loss) <= MAX_DIFFERENCE * expected.loss
        assert relative_difference(of_ranks[0].gradients, expected.gradients) <= MAX_DIFFERENCE
        assert all(gradient.any() for gradient in expected.gradients.values())
    assert ranks[0][name][1]["tokens"] == alone[name][1]["tokens"]


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_divide_whole_pairs(name: str, alone: Records, ranks: list[Records]) -> None:
    pairs = [[step.rows for step in rank[name][0]] for rank in ranks]
    for index, expected in enumerate(alone[name][0]):
        assert sorted(row for rank in pairs for row in rank[index]) == sorted(expected.rows)
        assert not set(pairs[0][index]) & set(pairs[1][index])
    assert sorted(len(set(rank[0])) for rank in pairs) == [2, 3]
    assert sorted(len(set(rank[1])) for rank in pairs) == [0, 1]


@pytest.mark.parametrize("name", VARIANTS)
def test_metrics_and_evaluation_of_pairs_are_those_of_one_process(
    name: str, alone: Records, ranks: list[Records]
) -> None:
    expected, *actual = (record[name][1]["log"] for record in (alone, *ranks))
    for prefix, count in (("", 2), ("eval_", 1)):
        for metric in (*METRICS, "loss", *(("nll_loss", "log_odds_ratio") if name == "with SFT term" else ())):
            key = prefix + metric
            values = [[line[key] for line in log if key in line] for log in (expected, *actual)]
            assert len(values[0]) == count
            assert values[1] == values[2], "ranks differ"
            assert values[1] == pytest.approx(values[0], rel=MAX_DIFFERENCE, abs=MAX_DIFFERENCE), key


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RankedRuns:
    folder = tmp_path_factory.mktemp("runs")
    runs = RankedRuns(folder, build_pico(folder / "base", num_hidden_layers=1))
    runs.rows = write_pairs(folder / "pairs.jsonl", count=40)
    return runs


@pytest.fixture(scope="module")
def straight(runs: RankedRuns) -> RunFolder:
    run = runs.new()
    runs.finished_by_ranks(run, 1, *RESUMED)
    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_resume_a_run_of_one_on_pairs(
    strategy: str, runs: RankedRuns, straight: RunFolder, tmp_path: Path
) -> None:
    run = stopped_after(2, straight, tmp_path / "resumed")
    runs.finished_by_ranks(run, 2, *RESUMED, f"parallel.strategy={strategy}")
    assert_same_curve(run, straight)
    assert run.passed_adapter_check()
    for key in ("rewards/margins", "logps/chosen", "eval_rewards/margins", "eval_rewards/accuracies"):
        actual, expected = ([line[key] for line in metrics(each) if key in line] for each in (run, straight))
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
