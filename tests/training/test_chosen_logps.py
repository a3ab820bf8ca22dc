"""The warning that chosen answers become less likely: on histories made for it, and on the metrics of real runs."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_train.config.schema import TrainSection
from qlora_train.runs import RunFolder
from qlora_train.training.chosen_logps import WINDOW_LOGS, ChosenLogpCallback, FallRule
from tests.support.runs import metrics, stopped_copy, train_run

BETA = 0.1
HELD_OUT = FallRule(BETA, is_mean=False, has_eval=True)
TRAINED = FallRule(BETA, is_mean=False, has_eval=False)
WITHOUT_REFERENCE = FallRule(None, is_mean=True, has_eval=True)


def entry(logps: float, before: float, margin: float, prefix: str = "") -> dict[str, float]:
    """Return a log entry of pairs whose chosen answers had the log-probability `before` under the reference model."""
    rewards = BETA * (logps - before)
    return {f"{prefix}logps/chosen": logps, f"{prefix}rewards/chosen": rewards, f"{prefix}rewards/margins": margin}


@pytest.mark.parametrize(
    ("logps", "margin", "is_fall"),
    [(-60.0, 2.0, True), (-55.0, 2.0, True), (-54.0, 2.0, False), (-60.0, -0.1, False), (-40.0, 2.0, False)],
)
def test_a_fall_of_a_tenth_against_the_reference_is_one(logps: float, margin: float, is_fall: bool) -> None:
    history = [{"loss": 0.6}, entry(-10.0, -50.0, 1.0), entry(logps, -50.0, margin, "eval_")]
    fall = HELD_OUT.fall(history)
    assert (fall is not None) == is_fall
    if fall is not None:
        assert (fall.before, fall.now, fall.margin) == pytest.approx((-50.0, logps, margin))


def test_a_fall_by_less_than_a_nat_is_none() -> None:
    assert HELD_OUT.fall([entry(-1.4, -0.5, 1.0, "eval_")]) is None
    assert HELD_OUT.fall([entry(-1.6, -0.5, 1.0, "eval_")]) is not None


def test_log_lines_are_compared_over_a_window() -> None:
    history = [entry(-50 - 20 * (number % 2), -50 - 10 * (number % 2), 1.0) for number in range(WINDOW_LOGS)]
    assert TRAINED.fall(history[:-1]) is None
    assert TRAINED.fall(history) is None  # by 5 of 55 nats
    assert TRAINED.fall([*history, *([entry(-70.0, -60.0, 1.0)] * 4)]) is not None


def without_reference(series: Sequence[tuple[float, float]], prefix: str) -> list[dict[str, float]]:
    return [
        {f"{prefix}logps/chosen": logps, f"{prefix}rewards/chosen": logps, f"{prefix}rewards/margins": margin}
        for logps, margin in series
    ]


def test_without_a_reference_the_first_evaluation_is_compared() -> None:
    first = (-1.0, 0.1)
    assert WITHOUT_REFERENCE.fall(without_reference([first], "eval_")) is None
    assert WITHOUT_REFERENCE.fall(without_reference([first, (-1.09, 0.4)], "eval_")) is None
    assert WITHOUT_REFERENCE.fall(without_reference([first, (-1.2, 0.05)], "eval_")) is None
    assert WITHOUT_REFERENCE.fall(without_reference([first, (-1.2, 0.4)], "eval_")) is not None


def test_other_pairs_of_other_likelihood_are_no_fall() -> None:
    """Log lines of few pairs vary; without a reference their means must differ by more than that."""
    rule = FallRule(None, is_mean=True, has_eval=False)
    generator = random.Random(0)
    for _ in range(50):
        noisy = [(generator.gauss(-2, 1), 0.01 * step) for step in range(3 * WINDOW_LOGS)]
        assert rule.fall(without_reference(noisy, "")) is None
    falling = [(generator.gauss(-2 - step, 1), 0.1 * step) for step in range(3 * WINDOW_LOGS)]
    assert rule.fall(without_reference(falling, "")) is not None


@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("has_eval", [True, False])
def test_a_history_has_fallen_where_one_of_its_beginnings_has(has_reference: bool, has_eval: bool) -> None:
    rule = FallRule(BETA if has_reference else None, is_mean=True, has_eval=has_eval)
    generator, answers = random.Random(0), []
    for number in range(200):
        drift, history = generator.uniform(-0.05, 0.05), []
        for step in range(number % 30):
            logps = generator.gauss(-2 - drift * step, 0.05)
            history += [{"loss": 0.5}, entry(logps, -2.0, 0.1 * step, "eval_" if has_eval else "")]
        answers.append(any(rule.fall(history[:length]) is not None for length in range(len(history) + 1)))
        assert rule.has_fallen(history) == answers[-1]
    assert 20 < sum(answers) < 180


@pytest.mark.parametrize("objective", ["dpo", "simpo", "cpo", "orpo"])
def test_a_higher_beta_is_advised_only_with_a_reference(objective: str, messages: pytest.LogCaptureFixture) -> None:
    train = TrainSection.model_validate({"objective": objective})
    history = [entry(-50.0, -50.0, 0.0, "eval_"), entry(-60.0, -50.0, 2.0, "eval_")]
    ChosenLogpCallback(train, has_eval=True).on_log(None, SimpleNamespace(log_history=history), None)
    [warning] = [record.getMessage() for record in messages.records if "become less likely" in record.getMessage()]
    assert ("train.beta" in warning) == (objective == "dpo")
    assert warning.endswith("train.sft_weight, or lower train.learning_rate")


def test_it_warns_once_and_not_again_after_a_resume(messages: pytest.LogCaptureFixture) -> None:
    train = TrainSection.model_validate({"objective": "dpo"})
    history = [entry(-60.0, -50.0, 2.0, "eval_")]
    callback = ChosenLogpCallback(train, has_eval=True)
    for length in (0, 1, 1):
        state = SimpleNamespace(log_history=history[:length])
        if length == 0:
            callback.on_train_begin(None, state, None)
        callback.on_log(None, state, None)
    assert messages.text.count("become less likely") == 1
    resumed = ChosenLogpCallback(train, has_eval=True)
    state = SimpleNamespace(log_history=history)
    resumed.on_train_begin(None, state, None)
    resumed.on_log(None, state, None)
    assert messages.text.count("become less likely") == 1


@pytest.fixture(scope="module")
def similar_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that differ in one number: what the loss takes from the rejected answer it takes from the chosen one too.

    A random model learns the margin of these pairs only, so that they are the held-out ones too.
    """
    folder, generator = tmp_path_factory.mktemp("similar"), random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(32):
            first, second = generator.randint(1, 99), generator.randint(1, 99)
            answers = {
                name: [{"role": "assistant", "content": f"The sum of these numbers is {first + second + added}"}]
                for name, added in (("chosen", 0), ("rejected", 10))
            }
            file.write(json.dumps({"prompt": [{"role": "user", "content": f"{first} + {second}"}], **answers}) + "\n")
    return folder


def trained(folder: Path, base: Path, *settings: str, name: str) -> RunFolder:
    return train_run(
        folder, base, f"data.train={folder / 'pairs.jsonl'}", f"data.eval={folder / 'pairs.jsonl'}",
        "train.eval_steps=10", "train.save_steps=5",
        "export.merge=false", *settings, name=name,
    )  # fmt: skip


def test_a_run_that_unlearns_its_answers_warns_once(
    similar_pairs: Path, pico_llama: Path, messages: pytest.LogCaptureFixture
) -> None:
    imitation = ("data.columns={completion: chosen}", "train.learning_rate=3e-2", "train.max_steps=20")
    sft = trained(similar_pairs, pico_llama, *imitation, name="sft")
    settings = ("train.objective=dpo", f"lora.adapter_path={sft.adapter}", "train.max_steps=20")
    run = trained(similar_pairs, pico_llama, *settings, name="run")
    evaluated = [line for line in metrics(run) if "eval_loss" in line][-1]
    assert evaluated["eval_rewards/margins"] > 0 > evaluated["eval_rewards/chosen"]
    [warning] = [record.getMessage() for record in messages.records if "become less likely" in record.getMessage()]
    assert "(held-out pairs): both answers become less likely" in warning
    stopped_copy(run, similar_pairs / "stopped")
    trained(similar_pairs, pico_llama, *settings, name="stopped")
    assert messages.text.count("become less likely") == 1
