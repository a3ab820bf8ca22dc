"""The run folder: what is in it, whether it is this run's, and where the run stands.

::

    runs/NAME/config.yaml            the resolved config: a run is itself a recipe
             run.json                what the config does not say: data fingerprint, base revision, versions
             fit.json                what it trains with instead, where the largest batch did not fit into memory
             data.json               what became of every row of the data
             rows/                    the rows that it is measured on, as tokens and texts
             metrics.jsonl           a line per logged step and evaluation
             checkpoints/step-N/     whole states to resume from
             adapter/                the result, in PEFT's format; there only when training has finished
             merged/                 the merged model, when asked for
             export/                 files for other programs, when asked for
             results.json            evaluations
"""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class RunFolder:
    """Paths and state of one run on disk."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metadata_file(self) -> Path:
        """What decides the run besides its config."""
        return self.path / "run.json"

    @property
    def fitted_settings_file(self) -> Path:
        """What the run trains with where what was asked for did not fit into memory."""
        return self.path / "fit.json"

    @property
    def fused_kernels_file(self) -> Path:
        """What comparing the fast path with the plain one found."""
        return self.path / "fused_kernels.json"

    @property
    def padding_free_file(self) -> Path:
        """Whether the run computes the rows of a step end to end."""
        return self.path / "padding_free.json"

    @property
    def data_report_file(self) -> Path:
        """What became of every row of the data."""
        return self.path / "data.json"

    @property
    def rows(self) -> Path:
        """What is kept of the data: the rows that the run is measured on."""
        return self.path / "rows"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line: `step` and the metrics."""
        return self.path / "metrics.jsonl"

    @property
    def results_file(self) -> Path:
        """Evaluations, merges and times of the run."""
        return self.path / "results.json"

    @property
    def answers_file(self) -> Path:
        """Every generated answer of the last evaluation, a line a held-out row."""
        return self.path / "answers.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.path / "merged"

    @property
    def exports(self) -> Path:
        """Folder of the files for other programs."""
        return self.path / "export"

    def is_finished(self) -> bool:
        """Whether training is done and its adapter is whole: the one of all changes that were accepted since."""
        if not self.adapter.is_dir() or atomic_io.verify_manifest(self.adapter) is not None:
            return False
        return atomic_io.read_metadata(self.adapter).get("num_changes") == len(self.metadata().get("changes", []))

    def has_merged(self) -> bool:
        """Whether there is a whole merged model."""
        return self.merged.is_dir() and atomic_io.verify_manifest(self.merged) is None

    def has_begun(self) -> bool:
        """Whether there is anything to continue or to lose; a run that stopped before its first checkpoint has not."""
        return bool(self.checkpoint_steps()) or self.adapter.is_dir()

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after optimizer step `step`."""
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first, whole or not."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(match[1]) for path in self.checkpoints.iterdir() if (match := _STEP.fullmatch(path.name)))

    def checkpoint_metadata(self, step: int) -> dict[str, Any]:
        """Return what the manifest of the checkpoint after `step` says of it: whose it is, and its step."""
        return {"run_id": self.metadata().get("run_id"), "step": step}

    def checkpoint_problem(self, step: int) -> str | None:
        """Return why the checkpoint after `step` cannot be gone on from, or None when it is whole and of this run."""
        folder = self.checkpoint(step)
        found, wanted = atomic_io.read_metadata(folder), self.checkpoint_metadata(step)
        problem = atomic_io.verify_manifest(folder)
        if problem is not None or found == wanted:
            return problem
        if found.get("run_id") != wanted["run_id"]:
            return "it is of another run"
        return f"it holds step {found.get('step')}"

    def latest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that verifies, saying which were skipped and why."""
        for step in reversed(self.checkpoint_steps()):
            problem = self.checkpoint_problem(step)
            if problem is None:
                return self.checkpoint(step)
            logger.warning("checkpoint %s is skipped: %s", self.checkpoint(step).name, problem)
        if self.checkpoint_steps():
            logger.warning("%s: no checkpoint is whole; the run begins again at step 0", self.checkpoints)
        return None

    def existing_results(self) -> list[Path]:
        """Return what was made of the adapter: its merge, exports, evaluations and answers, as far as they are there."""
        return [path for path in (self.merged, self.exports, self.results_file, self.answers_file) if path.exists()]

    def delete_results(self) -> None:
        """Delete what was made of an adapter that is replaced by another."""
        for path in self.existing_results():
            if path.is_dir():
                atomic_io.remove_folder(path)
            else:
                path.unlink()

    def delete_checkpoints_after(self, checkpoint: Path) -> None:
        """Delete the checkpoints after one that is resumed from: they are damaged, or of a course that is given up.

        Those of another run are left alone.
        """
        run_id = self.metadata().get("run_id")
        for step in self.checkpoint_steps():
            folder = self.checkpoint(step)
            if folder.name > checkpoint.name and atomic_io.read_metadata(folder).get("run_id", run_id) == run_id:
                logger.warning("checkpoint %s is deleted: the run goes on from %s", folder.name, checkpoint.name)
                atomic_io.remove_folder(folder)

    def rotate(self, *, keep: int, best: int | None) -> None:
        """Delete all but the newest `keep` whole checkpoints of this run and the best one; what is damaged stays."""
        problems = {step: self.checkpoint_problem(step) for step in self.checkpoint_steps()}
        for step, problem in problems.items():
            if problem is not None:
                logger.warning("checkpoint %s does not count: %s", self.checkpoint(step).name, problem)
        whole = [step for step, problem in problems.items() if problem is None]
        for step in whole[:-keep]:
            if step != best:
                atomic_io.remove_folder(self.checkpoint(step))

    def remove_stale_files(self) -> None:
        """Clear what a process that was killed left half done."""
        atomic_io.remove_stale_files(self.path)
        atomic_io.remove_stale_files(self.checkpoints)
        atomic_io.remove_stale_files(self.exports)

    def metadata(self) -> dict[str, Any]:
        """Return what run.json recorded when the run began, empty when there is none.

        Raises:
            CheckpointError: it is not readable.
        """
        return _read_json(self.metadata_file)

    def fitted_settings(self) -> dict[str, Any]:
        """Return fit.json, empty when there is none.

        Raises:
            CheckpointError: it is not readable.
        """
        return _read_json(self.fitted_settings_file)

    def fused_kernels(self) -> dict[str, Any]:
        """Return fused_kernels.json, empty when there is none.

        Raises:
            CheckpointError: it is not readable.
        """
        return _read_json(self.fused_kernels_file)

    def padding_free(self) -> dict[str, Any]:
        """Return padding_free.json, empty when there is none.

        Raises:
            CheckpointError: it is not readable.
        """
        return _read_json(self.padding_free_file)

    def data_report(self) -> dict[str, Any]:
        """Return data.json, empty when there is none.

        Raises:
            CheckpointError: it is not readable.
        """
        return _read_json(self.data_report_file)

    def system_prompt(self) -> str:
        """Return the system prompt that the training rows share, empty where they share none.

        Raises:
            CheckpointError: data.json is not readable.
        """
        shared = self.data_report().get("system_prompt")
        return str(shared["text"]) if shared else ""

    def read_results(self) -> dict[str, Any]:
        """Return results.json, empty when there is none.

        Raises:
            CheckpointError: it is not readable.
        """
        return _read_json(self.results_file)

    def delete_merged_results(self) -> None:
        """Delete what was measured of a merged model that is replaced: losses, scores, tasks and answers."""
        results = self.read_results()
        unmerged = ("num_rows", "base", "adapter")
        parts = {
            "evaluation": {key: value for key, value in results.get("evaluation", {}).items() if key in unmerged},
            "tasks": {
                task: {name: scores for name, scores in found.items() if name != "merged"}
                for task, found in results.get("tasks", {}).items()
            },
        }
        self.add_results(**{key: part for key, part in parts.items() if key in results})
        if self.answers_file.is_file():
            answers = map(json.loads, self.answers_file.read_text(encoding="utf-8").splitlines())
            kept = [json.dumps({key: value for key, value in line.items() if key != "merged"}) for line in answers]
            atomic_io.write_text(self.answers_file, "\n".join(kept) + "\n")

    def add_results(self, **results: Any) -> None:
        """Add entries to results.json."""
        atomic_io.write_text(self.results_file, json.dumps({**self.read_results(), **results}, indent=2) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); restore it, or delete the run folder") from None
    return content
