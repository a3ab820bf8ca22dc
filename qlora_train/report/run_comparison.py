"""Several runs side by side: results, settings that differ, versions, and answers to the same held-out rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_train.report.graded_answers import GradedAnswer, grade, models_of, prompt_text
from qlora_train.report.metric_charts import values_of
from qlora_train.report.number_text import MISSING, number_text, setting_text
from qlora_train.report.recorded_run import RecordedRun
from qlora_train.report.run_facts import setting, status_of, tokens_per_second

MAX_ROWS = 300


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """A line of a table: a text for each run, and the runs with the best number."""

    name: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ComparedAnswers:
    """A held-out row with the answer of each run's adapter; None where a run has none."""

    where: str
    prompt: str
    expected: str
    answers: tuple[GradedAnswer | None, ...]

    @property
    def disagrees(self) -> bool:
        """Whether some runs are right and others wrong."""
        return len({answer.is_right for answer in self.answers if answer is not None}) > 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tables of a comparison; `labels` are the names of the runs, `notes` say what cannot be compared."""

    labels: tuple[str, ...]
    results: tuple[ComparedRow, ...]
    settings: tuple[ComparedRow, ...]
    environment: tuple[ComparedRow, ...]
    answers: tuple[ComparedAnswers, ...]
    num_answers: int
    notes: tuple[str, ...]


def compare_runs(runs: Sequence[RecordedRun]) -> Comparison:
    """Compare runs in their order."""
    answers = _answers(runs)
    return Comparison(
        labels=_labels(runs),
        results=tuple(_results(runs)),
        settings=tuple(_settings(runs)),
        environment=tuple(_environment(runs)),
        answers=tuple(sorted(answers, key=lambda row: not row.disagrees)[:MAX_ROWS]),
        num_answers=len(answers),
        notes=tuple(_notes(runs)),
    )


def _labels(runs: Sequence[RecordedRun]) -> tuple[str, ...]:
    """Return the names of the runs, or their paths if names are equal."""
    names = [run.name for run in runs]
    return tuple(run.name if names.count(run.name) == 1 else str(run.folder.path) for run in runs)


# --- tables -----------------------------------------------------------------------------------------------------------

Value = Callable[[RecordedRun], float | None]


def _evaluated(model: str, key: str) -> Value:
    return lambda run: run.results.get("evaluation", {}).get(model, {}).get(key)


def _last_eval_loss(run: RecordedRun) -> float | None:
    losses = values_of(run, "eval_loss")
    return losses.get(run.training.get("taken_from_step", -1), losses[max(losses)]) if losses else None


def _measured(key: str) -> Value:
    return lambda run: run.results.get("plan", {}).get(key)


def _merged_loss(run: RecordedRun) -> float | None:
    merge = run.results.get("merge")
    return merge["candidates"][merge["merge_base"]]["loss"] if merge else None


def _trained(key: str) -> Value:
    return lambda run: run.training.get(key)


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the results.

    Attributes:
        best: which value is best; None for runs of different length: speed, memory, time.
        is_loss: comparable where base and objective are the same too, since tokens and formulas differ otherwise.
    """

    name: str
    value_of: Value
    unit: str = ""
    best: Callable[..., float] | None = None
    is_loss: bool = False


RESULTS = (
    Result("Held-out loss", _last_eval_loss, best=min, is_loss=True),
    Result("Mean training loss", _trained("train_loss")),
    Result("Exact match, adapter", _evaluated("adapter", "exact_match"), "share", max),
    Result("Exact match, merged", _evaluated("merged", "exact_match"), "share", max),
    Result("Exact match, base", _evaluated("base", "exact_match"), "share"),
    Result("Field F1, adapter", _evaluated("adapter", "field_f1"), best=max),
    Result("Prefers chosen, adapter", _evaluated("adapter", "win_rate"), "share", max),
    Result("Prefers chosen, base", _evaluated("base", "win_rate"), "share"),
    Result("Reward accuracy, adapter", _evaluated("adapter", "reward_accuracy"), "share", max),
    Result("Loss after the merge", _merged_loss, best=min, is_loss=True),
    Result("Steps", _trained("steps")),
    Result("Tokens", _trained("num_tokens")),
    Result("Trained parameters", _trained("num_trainable")),
    Result("Training time", _trained("train_seconds"), "seconds"),
    Result("Tokens per second", tokens_per_second),
    Result("Peak memory", _measured("measured_peak_bytes"), "bytes"),
)


def _results(runs: Sequence[RecordedRun]) -> Iterator[ComparedRow]:
    yield ComparedRow("Status", tuple(status_of(run) for run in runs))
    same_rows = _have_same_held_out_rows(runs)
    for result in RESULTS:
        values = [result.value_of(run) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        is_comparable = same_rows and (not result.is_loss or _have_same_loss(runs))
        top = result.best(known) if result.best and is_comparable and len(set(known)) > 1 else None
        winners = frozenset(i for i, value in enumerate(values) if top is not None and value == top)
        yield ComparedRow(result.name, tuple(number_text(value, result.unit) for value in values), winners)


def _notes(runs: Sequence[RecordedRun]) -> Iterator[str]:
    """Yield why numbers of the runs cannot be compared."""
    if not _have_same_held_out_rows(runs):
        yield "The runs have different held-out rows: no loss or score is called best."
    elif not _have_same_loss(runs):
        yield "The runs have different bases or objectives: their losses are not comparable, and none is called best."


def _have_same_held_out_rows(runs: Sequence[RecordedRun]) -> bool:
    """Return whether held-out rows are the same, by file name, line and prompt; else by the fingerprint of all data."""
    rows = [
        frozenset((_file_and_line(where), prompt_text(prompt)) for where, prompt in run.prompts.items()) for run in runs
    ]
    if all(rows):
        return len(set(rows)) == 1
    return len({run.metadata.get("data_fingerprint") for run in runs}) == 1


def _have_same_loss(runs: Sequence[RecordedRun]) -> bool:
    return len({(str(run.metadata.get("base")), setting(run, "train.objective")) for run in runs}) == 1


def _settings(runs: Sequence[RecordedRun]) -> Iterator[ComparedRow]:
    """Yield the settings that are not equal in all runs."""
    by_run = [{each.key: each.value for each in run.settings} for run in runs]
    for key in dict.fromkeys(key for settings in by_run for key in settings):
        values = [setting_text(settings[key]) if key in settings else MISSING for settings in by_run]
        if len(set(values)) > 1 and key != "run.output_dir":
            yield ComparedRow(key, tuple(values))


ENVIRONMENT = {
    "base": "base", "base identity": "base_identity", "data fingerprint": "data_fingerprint",
    "training rows": "num_train_rows", "held-out rows": "num_eval_rows", "device": "device", "processes": "world_size",
    "began": "date",
}  # fmt: skip
"""Lines about base, data and machine, with their keys in run.json."""
MAX_IDENTITY = 16
"""Characters shown of a hash."""


def _environment(runs: Sequence[RecordedRun]) -> Iterator[ComparedRow]:
    """Yield base, data, hardware and versions."""
    for name, key in ENVIRONMENT.items():
        yield ComparedRow(name, tuple(_identity(run.metadata.get(key)) for run in runs))
    versions = [run.metadata.get("versions", {}) for run in runs]
    for name in dict.fromkeys(name for each in versions for name in each):
        yield ComparedRow(name, tuple(str(each.get(name, MISSING)) for each in versions))


def _identity(value: Any) -> str:
    if value is None:
        return MISSING
    return value[:MAX_IDENTITY] if isinstance(value, str) and len(value) == 64 else str(value)


# --- answers ----------------------------------------------------------------------------------------------------------


def _answers(runs: Sequence[RecordedRun]) -> list[ComparedAnswers]:
    """Return the rows that at least two runs have answered: of equal file name, line and expected answer."""
    graded = [_graded(run) for run in runs]
    prompts = {_file_and_line(where): prompt for run in runs for where, prompt in run.prompts.items()}
    rows = dict.fromkeys(row for answers in graded for row in answers)
    shared = [row for row in rows if sum(row in answers for answers in graded) > 1]
    return [
        ComparedAnswers(
            where, prompt_text(prompts.get(where)), expected, tuple(each.get((where, expected)) for each in graded)
        )
        for where, expected in shared
    ]


def _graded(run: RecordedRun) -> dict[tuple[str, str], GradedAnswer]:
    """Return the answers of the trained model by file name and line, and expected answer."""
    trained = [name for name in models_of(run.answers) if name in ("adapter", "merged")] if run.answers else []
    if not trained:
        return {}
    expected = [str(line["expected"]) for line in run.answers]
    answers = grade(trained[0], expected, [str(line[trained[0]]) for line in run.answers])
    places = [(_file_and_line(str(line["where"])), str(line["expected"])) for line in run.answers]
    return dict(zip(places, answers, strict=True))


def _file_and_line(where: str) -> str:
    """Return a location without folders: the same file may lie elsewhere for another run."""
    return where.rpartition("/")[2]
