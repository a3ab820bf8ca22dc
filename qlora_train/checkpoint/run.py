"""The run folder: what is in it, whether it is this run's, and where the run stands.

::

    runs/NAME/config.yaml            the resolved config: a run is itself a recipe
             run.json                what the config does not say: data fingerprint, base revision, versions
             data.json               what became of every row of the data
             metrics.jsonl           a line per logged step and evaluation
             checkpoints/step-N/     whole states to resume from
             adapter/                the result, in PEFT's format; there only when training has finished
             merged/                 the merged model, when asked for
             results.json            evaluations
"""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train import durable
from qlora_train.errors import CheckpointError

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
    def facts_file(self) -> Path:
        """What decides the run besides its config."""
        return self.path / "run.json"

    @property
    def data_report_file(self) -> Path:
        """What became of every row of the data."""
        return self.path / "data.json"

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

    def is_finished(self) -> bool:
        """Whether training is done and its adapter is whole."""
        return self.adapter.is_dir() and durable.damage(self.adapter) is None

    def has_merged(self) -> bool:
        """Whether there is a whole merged model."""
        return self.merged.is_dir() and durable.damage(self.merged) is None

    def has_begun(self) -> bool:
        """Whether there is anything to continue or to lose; a run that stopped before its first checkpoint has not."""
        return bool(self.steps()) or self.adapter.is_dir()

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after optimizer step `step`."""
        return self.checkpoints / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first, whole or not."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(match[1]) for path in self.checkpoints.iterdir() if (match := _STEP.fullmatch(path.name)))

    def newest_whole_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that verifies, saying which were skipped and why."""
        for step in reversed(self.steps()):
            folder = self.checkpoint(step)
            problem = durable.damage(folder)
            if problem is None:
                return folder
            logger.warning("checkpoint %s is skipped: %s", folder.name, problem)
        return None

    def forget_results(self) -> None:
        """Delete what was made of an adapter that is replaced by another: its merge and its evaluations."""
        shutil.rmtree(self.merged, ignore_errors=True)
        self.results_file.unlink(missing_ok=True)
        self.answers_file.unlink(missing_ok=True)

    def forget_after(self, checkpoint: Path) -> None:
        """Delete the checkpoints after one that is resumed from: they are damaged, or of a course that is given up."""
        for step in self.steps():
            if self.checkpoint(step).name > checkpoint.name:
                logger.warning("checkpoint %s is deleted: the run goes on from %s", f"step-{step:08d}", checkpoint.name)
                shutil.rmtree(self.checkpoint(step))

    def rotate(self, *, keep: int, best: int | None) -> None:
        """Delete all but the newest `keep` whole checkpoints and the best one."""
        whole = [step for step in self.steps() if durable.damage(self.checkpoint(step)) is None]
        for step in whole[:-keep]:
            if step != best:
                shutil.rmtree(self.checkpoint(step))

    def facts(self) -> dict[str, Any]:
        """Return what run.json recorded when the run began, empty when there is none.

        Raises:
            CheckpointError: it is not readable.
        """
        return _read_json(self.facts_file)

    def read_results(self) -> dict[str, Any]:
        """Return results.json, empty when there is none.

        Raises:
            CheckpointError: it is not readable.
        """
        return _read_json(self.results_file)

    def add_results(self, **results: Any) -> None:
        """Add entries to results.json."""
        durable.write_text(self.results_file, json.dumps({**self.read_results(), **results}, indent=2) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); restore it, or delete the run folder") from None
    return content
