"""The run folder: its files, checkpoints and results."""

import datetime
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_train.config import ModelSection
from qlora_train.config.schema import COMMIT
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8})")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a run folder; a missing file is empty.

    Raises:
        CheckpointError: unreadable file.
    """
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); restore it, or delete the run folder") from None
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    atomic_io.write_text(file, json.dumps(content, indent=2) + "\n")


class RunFolder:
    """Paths and state of one run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"  # the resolved config: a run is itself a recipe
        self.command_file = path / "command.txt"  # the commands that started and resumed it
        self.metadata_file = path / "run.json"  # base revision, data fingerprint, device, versions
        self.fitted_settings_file = path / "fit.json"  # settings of train.auto_find_batch_size
        self.plan_file = path / "plan.json"  # memory, steps and time, predicted before the base is loaded
        self.num_steps_file = path / "num_steps.json"  # of train.minutes
        self.fused_kernels_file = path / "fused_kernels.json"  # parity check
        self.reference_logps = path / "reference_logps"  # log-probabilities of the rows under the reference model
        self.padding_free_file = path / "padding_free.json"  # parity check and decision
        self.data_report_file = path / "data.json"
        self.rows = path / "rows"  # rows that evaluation and merge use, as tokens and text
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.jsonl"  # answers to held-out prompts at every evaluation
        self.results_file = path / "results.json"  # training, adapter check, merge, evaluations
        self.answers_file = path / "answers.jsonl"  # generated answers of the last evaluation
        self.row_losses_file = path / "row_losses.json"  # of a sample of rows, after training
        self.report_file = path / "report.html"
        self.log_file = path / "run.log"  # every log line, with its time
        self.logs = path / "logs"  # of ranks other than 0
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"  # PEFT's format; written when training has finished
        self.merged = path / "merged"
        self.exports = path / "export"

    # --- state --------------------------------------------------------------------------------------------------------

    def is_finished(self) -> bool:
        """Return whether the adapter is complete and trained under the settings that were accepted last."""
        if not self.adapter.is_dir() or atomic_io.verify_manifest(self.adapter) is not None:
            return False
        return atomic_io.read_metadata(self.adapter).get("num_changes") == len(self.metadata().get("changes", []))

    def has_merged(self) -> bool:
        """Return whether a complete merged model exists."""
        return self.merged.is_dir() and atomic_io.verify_manifest(self.merged) is None

    def has_begun(self) -> bool:
        """Return whether the run has a checkpoint or an adapter, which nothing may overwrite."""
        return bool(self.checkpoint_steps()) or self.adapter.is_dir()

    def metadata(self) -> dict[str, Any]:
        """Read run.json; empty before the run starts."""
        return read_json(self.metadata_file)

    def start_date(self) -> datetime.date:
        """Return the day the run began, which chat templates that print the date keep printing."""
        recorded: str | None = self.metadata().get("date")
        return datetime.date.fromisoformat(recorded) if recorded else datetime.date.today()

    def with_pinned_revision(self, model: ModelSection) -> ModelSection:
        """Return the model section at the Hub commit that the run began with; branches move."""
        identity = str(self.metadata().get("base_identity", ""))
        return model.model_copy(update={"revision": identity}) if COMMIT.fullmatch(identity) else model

    def record_command(self, command: str) -> None:
        """Add the command that starts or resumes the run, unless it is the last one again."""
        if command not in self.commands()[-1:]:
            atomic_io.append_line(self.command_file, command)

    def commands(self) -> list[str]:
        """Return the commands that started and resumed the run, the first one first."""
        if not self.command_file.is_file():
            return []
        return self.command_file.read_text(encoding="utf-8", errors="replace").splitlines()

    def rank_log(self, rank: int) -> Path:
        """Return the log file of a rank other than 0."""
        return self.logs / f"rank-{rank}.log"

    def system_prompt(self) -> str:
        """Return the system prompt that the training rows share, or an empty string."""
        shared = read_json(self.data_report_file).get("system_prompt")
        return str(shared["text"]) if shared else ""

    def remove_stale_files(self) -> None:
        """Remove what a killed process left incomplete."""
        for folder in (self.path, self.checkpoints, self.exports):
            atomic_io.remove_stale_files(folder)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after optimizer step `step`."""
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of all checkpoints, damaged ones included, in ascending order."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(match[1]) for path in self.checkpoints.iterdir() if (match := _STEP.fullmatch(path.name)))

    def checkpoint_metadata(self, step: int) -> dict[str, Any]:
        """Return the manifest metadata of this run's checkpoint after `step`."""
        return {"run_id": self.metadata().get("run_id"), "step": step}

    def checkpoint_problem(self, step: int) -> str | None:
        """Return why the run cannot resume from the checkpoint after `step`, or None."""
        folder = self.checkpoint(step)
        actual, expected = atomic_io.read_metadata(folder), self.checkpoint_metadata(step)
        problem = atomic_io.verify_manifest(folder)
        if problem is not None or actual == expected:
            return problem
        if actual.get("run_id") != expected["run_id"]:
            return "it is of another run"
        return f"it holds step {actual.get('step')}"

    def latest_checkpoint(self) -> Path | None:
        """Return the latest complete checkpoint; log each one that is skipped, with the reason."""
        for step in reversed(self.checkpoint_steps()):
            problem = self.checkpoint_problem(step)
            if problem is None:
                return self.checkpoint(step)
            logger.warning("checkpoint %s: skipped (%s)", self.checkpoint(step).name, problem)
        if self.checkpoint_steps():
            logger.warning("%s: no complete checkpoint; the run restarts at step 0", self.checkpoints)
        return None

    def delete_checkpoints_after(self, checkpoint: Path) -> None:
        """Delete this run's checkpoints after the one that it resumes from: damaged, or of a discarded course."""
        run_id = self.metadata().get("run_id")
        for step in self.checkpoint_steps():
            folder = self.checkpoint(step)
            if folder.name > checkpoint.name and atomic_io.read_metadata(folder).get("run_id", run_id) == run_id:
                logger.warning("checkpoint %s: deleted (the run resumes from %s)", folder.name, checkpoint.name)
                atomic_io.remove_folder(folder)

    def rotate(self, *, keep: int, best: int | None) -> None:
        """Delete all but the latest `keep` checkpoints of this run and the best one; damaged ones stay."""
        problems = {step: self.checkpoint_problem(step) for step in self.checkpoint_steps()}
        for step, problem in problems.items():
            if problem is not None:
                logger.warning("checkpoint %s: not counted (%s)", self.checkpoint(step).name, problem)
        complete = [step for step, problem in problems.items() if problem is None]
        for step in complete[:-keep]:
            if step != best:
                atomic_io.remove_folder(self.checkpoint(step))

    # --- results ------------------------------------------------------------------------------------------------------

    def read_results(self) -> dict[str, Any]:
        """Read results.json; empty before there are any."""
        return read_json(self.results_file)

    def passed_adapter_check(self) -> bool:
        """Return whether the code on the adapter's card was seen to load the trained model."""
        return bool(self.read_results().get("adapter_check", {}).get("passed"))

    def add_results(self, **results: Any) -> None:
        write_json(self.results_file, {**self.read_results(), **results})

    def existing_results(self) -> list[Path]:
        """Return what was derived from the adapter: its merge, exports, evaluations and answers."""
        return [path for path in (self.merged, self.exports, self.results_file, self.answers_file) if path.exists()]

    def delete_results(self) -> None:
        """Delete what was derived from an adapter that is being replaced."""
        for path in self.existing_results():
            if path.is_dir():
                atomic_io.remove_folder(path)
            else:
                path.unlink()

    def delete_merged_results(self) -> None:
        """Delete losses, scores, tasks and answers of a merged model that is being replaced."""
        results = self.read_results()
        if evaluation := results.get("evaluation"):
            unmerged = {key: evaluation[key] for key in ("num_rows", "base", "adapter") if key in evaluation}
            self.add_results(evaluation=unmerged)
        if tasks := results.get("tasks"):
            self.add_results(tasks={task: _without_merged(models) for task, models in tasks.items()})
        if self.answers_file.is_file():
            answers = map(json.loads, self.answers_file.read_text(encoding="utf-8").splitlines())
            atomic_io.write_text(self.answers_file, "".join(f"{json.dumps(_without_merged(row))}\n" for row in answers))


def _without_merged(by_model: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in by_model.items() if name != "merged"}
