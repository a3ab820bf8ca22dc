"""Benchmarks on a finished run, through lm-evaluation-harness (package `lm-eval`).

The harness renders, scores and averages. It finds tasks and fetches their data before a model is loaded. Task files may
hold Python code, which it runs.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_train.export.finished_run import FinishedRun
from qlora_train.inference.run_models import existing_models, run_models
from qlora_train.utils.device import catch_out_of_memory
from qlora_train.utils.errors import ConfigError, DataError, ModelError, did_you_mean, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

Scores = dict[str, Any]


@dataclass(frozen=True)
class TaskSettings:
    """Models and tasks to evaluate.

    Attributes:
        names: tasks or groups of the harness, or of `path`.
        limit: rows per task; None is all.
        path: folder of custom task files (YAML).
        chat_template: apply the tokenizer's chat template, with the system prompt that the training rows share.
    """

    names: tuple[str, ...]
    models: tuple[str, ...] = ("base", "adapter", "merged")
    limit: int | None = None
    batch_size: int = 32
    path: Path | None = None
    chat_template: bool = False


def check_harness() -> None:
    """Raise a ConfigError if the package is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks: needs the package lm-eval; run: pip install 'qlora-train[lm-eval]'")


def measure_tasks(run: FinishedRun, settings: TaskSettings) -> dict[str, dict[str, Scores]]:
    """Evaluate the models of a run on tasks; print a table and add it to results.json.

    Returns:
        Scores by task and model, with standard errors.

    Raises:
        ConfigError: an unknown task, or a folder without tasks.
        DataError: a task that cannot be prepared or evaluated.
        ModelError, CheckpointError: a model that cannot be loaded, or does not fit into memory.
    """
    models = existing_models(run.folder, settings.models)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _find(settings)
    system = run.folder.system_prompt() if settings.chat_template else ""
    prompts = "chat template" if settings.chat_template else "plain text (--chat-template applies the template)"
    prompts += ", system prompt of the training rows" if system else ""
    rows = f"{settings.limit} rows each" if settings.limit else "all rows"
    logger.info("tasks: %s (%s, %s)", ", ".join(settings.names), rows, prompts)
    results: dict[str, dict[str, Scores]] = {}
    for name, model, tokenizer in run_models(run, models):
        logger.info("evaluating: %s", name)
        for task, scores in _measure(model, tokenizer, manager, settings, system).items():
            results.setdefault(task, {})[name] = scores
        del model  # frees it before the next one loads
    before = run.folder.read_results().get("tasks", {})
    run.folder.add_results(tasks={**before, **{task: before.get(task, {}) | found for task, found in results.items()}})
    _print(results)
    return results


def _find(settings: TaskSettings) -> Any:
    """Return the harness's task manager, after it has loaded the tasks and their data."""
    from lm_eval.tasks import TaskManager

    if settings.path is not None and not any(settings.path.rglob("*.yaml")):
        raise ConfigError(f"--task-path: {settings.path} is no folder with task files (*.yaml)")
    manager = TaskManager(include_path=settings.path, include_defaults=False)
    if not set(settings.names) <= set(manager.all_tasks):  # indexing the harness's own tasks is slow
        manager = TaskManager(include_path=settings.path)
    unknown = [name for name in settings.names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError([_unknown(name, manager.all_tasks) for name in unknown])
    for name in settings.names:
        try:
            manager.load([name])
        except Exception as error:  # tasks are third-party data and code, and raise anything
            raise _unusable(name, error) from error
    return manager


def _unknown(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known)
    return f"--tasks: {name!r} is no task; allowed: those of lm-eval (lm-eval ls tasks) or of --task-path{hint}"


def _unusable(names: str, error: Exception) -> DataError:
    return DataError(
        f"--tasks: {names}: {type(error).__name__}: {first_line(error).rstrip('.;')}; check the task's files, and the "
        "network where its data comes from the Hub"
    )


def _measure(model: Any, tokenizer: Any, manager: Any, settings: TaskSettings, system: str) -> dict[str, Scores]:
    """Return a model's scores by task; out of memory, restart with half the batch."""
    batch_size = settings.batch_size
    while True:  # little is computed twice: each type of request begins with its longest rows
        measured, reason = catch_out_of_memory(
            partial(_simple_evaluate, model, tokenizer, manager, settings, system, batch_size)
        )
        if measured is not None:
            prompts = {"chat_template": settings.chat_template, "system_prompt": system}
            return {task: _scores(task, measured) | prompts for task in measured["results"]}
        if batch_size == 1:
            raise ModelError(
                f"--tasks: out of memory at --batch-size 1 ({reason}); drop the tasks with the longest prompts"
            )
        batch_size //= 2
        logger.warning("memory: retries with --batch-size %d (%s)", batch_size, reason)


def _simple_evaluate(
    model: Any, tokenizer: Any, manager: Any, settings: TaskSettings, system: str, batch_size: int
) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _untouched_weights(model):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    try:
        measured = simple_evaluate(
            harness,
            tasks=list(settings.names),
            task_manager=manager,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            system_instruction=system or None,
            log_samples=False,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(", ".join(settings.names), error) from error
    assert measured is not None, "there is one process"
    return measured


@contextmanager
def _untouched_weights(model: Any) -> Iterator[None]:
    """Keep the harness from tying head and embedding again: training may have untied them."""
    before = [(name, tensor.data_ptr()) for name, tensor in model.named_parameters(remove_duplicate=False)]
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights
    after = [(name, tensor.data_ptr()) for name, tensor in model.named_parameters(remove_duplicate=False)]
    assert after == before, "the harness has changed the model"


def _scores(task: str, measured: Mapping[str, Any]) -> Scores:
    """Return a task's metrics with their settings; `acc,none` is the harness's name for unfiltered accuracy."""
    found = measured["results"][task]
    metrics = {}
    for key, value in found.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = found.get(f"{name}_stderr,{filtered}")
            metrics[key.removesuffix(",none")] = {
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,
            }
    return {
        "metrics": metrics,
        "num_rows": measured.get("n-samples", {}).get(task, {}).get("effective"),
        "num_shots": measured.get("n-shot", {}).get(task),
        "task_version": measured.get("versions", {}).get(task),
        "lm_eval": version("lm-eval"),
    }


def _print(results: Mapping[str, Mapping[str, Scores]]) -> None:
    models = list(dict.fromkeys(name for found in results.values() for name in found))
    table = Table(title="tasks (with standard errors)")
    for title in ("task", "metric"):
        table.add_column(title)
    for model in models:
        table.add_column(model, justify="right")
    for task, found in results.items():
        for metric in next(iter(found.values()))["metrics"]:
            table.add_row(task, metric, *(_cell(found[model]["metrics"][metric]) for model in models))
    Console().print(table)


def _cell(score: Mapping[str, float | None]) -> str:
    stderr = score["stderr"]
    return f"{score['value']:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")
