"""The run folder: what is in it, whether it is this run's, and where the run stands.

::

    runs/NAME/config.yaml            the resolved config: a run is itself a recipe
             run.json                what the config does not say: data fingerprint, base revision, versions
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
from typing import Any, Literal

from qlora_train import durable
from qlora_train.config import RunConfig, load_config
from qlora_train.config.writer import to_yaml
from qlora_train.errors import CheckpointError

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8})")
# Settings that may differ between the parts of one run: they decide what is reported or made of it, not what is trained.
_FREE = (
    "run.output_dir", "run.report_to", "export.", "train.logging_steps", "train.save_steps", "train.save_total_limit",
    "train.per_device_eval_batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths and state of one run on disk."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line: `step` and the metrics."""
        return self.path / "metrics.jsonl"

    @property
    def results_file(self) -> Path:
        """Evaluations, merges and times of the run."""
        return self.path / "results.json"

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

    def rotate(self, *, keep: int, best: int | None) -> None:
        """Delete all but the newest `keep` whole checkpoints and the best one."""
        whole = [step for step in self.steps() if durable.damage(self.checkpoint(step)) is None]
        for step in whole[:-keep]:
            if step != best:
                shutil.rmtree(self.checkpoint(step))

    def read_results(self) -> dict[str, Any]:
        """Return results.json, empty when there is none."""
        if not self.results_file.is_file():
            return {}
        content: dict[str, Any] = json.loads(self.results_file.read_text(encoding="utf-8"))
        return content

    def add_results(self, **results: Any) -> None:
        """Add entries to results.json."""
        durable.write_text(self.results_file, json.dumps({**self.read_results(), **results}, indent=2) + "\n")


def finished_run(path: Path) -> RunFolder:
    """Return the finished run at `path`.

    Raises:
        CheckpointError: there is no run, or it has not finished.
    """
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        raise CheckpointError(f"{path}: is not a run folder (no config.yaml); give one such as runs/llama7b")
    if not folder.is_finished():
        raise CheckpointError(f"{path}: the run has not finished; continue it with: qlora-train {folder.config_file}")
    return folder


def open_run(config: RunConfig, *, resume: Literal["auto", "never"] | str = "auto") -> tuple[RunFolder, Path | None]:
    """Open or create the run folder of a config and say where to go on.

    Args:
        config: the resolved config; `run.output_dir` is set.
        resume: `auto` continues from the newest whole checkpoint, `never` starts over (an existing run is refused), a
            path continues from that checkpoint.

    Returns:
        The folder, and the checkpoint to resume from or None.

    Raises:
        CheckpointError: the folder belongs to something else, to a run of other settings, or holds no whole checkpoint.
    """
    assert config.run.output_dir is not None, "the CLI fills in run.output_dir"
    run = RunFolder(Path(config.run.output_dir))
    if not run.config_file.is_file():
        _claim(run, config)
    elif resume == "never":
        raise CheckpointError(
            f"{run.path}: holds a run already and --resume never would overwrite it; choose another run.output_dir or "
            "delete the folder"
        )
    else:
        _check_same_settings(run, config)
    if resume in ("auto", "never"):
        return run, run.newest_whole_checkpoint()
    return run, _named_checkpoint(Path(resume))


def _claim(run: RunFolder, config: RunConfig) -> None:
    if run.path.is_file() or (run.path.is_dir() and any(run.path.iterdir())):
        raise CheckpointError(
            f"{run.path}: run.output_dir is not empty and holds no run (no config.yaml); choose another run.output_dir"
        )
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        durable.write_text(run.config_file, to_yaml(config))
    except OSError as error:
        raise CheckpointError(
            f"{run.path}: run.output_dir cannot be written ({error.strerror}); choose another"
        ) from None


def _named_checkpoint(folder: Path) -> Path:
    problem = durable.damage(folder) if folder.is_dir() else "it is not a folder"
    if problem is not None:
        raise CheckpointError(
            f"--resume {folder}: {problem}; give a folder such as runs/NAME/checkpoints/step-00000100"
        )
    return folder


def _flat(config: RunConfig) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }


def _check_same_settings(run: RunFolder, config: RunConfig) -> None:
    """Refuse to continue a run whose settings have changed: the result would be neither the old run nor a new one."""
    before, now = _flat(load_config(run.config_file)), _flat(config)
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(_FREE)]
    if changed:
        raise CheckpointError(
            [
                f"{run.path}: {key} was {before.get(key)!r} when this run began and is {now[key]!r} now; set it back, "
                "or choose another run.output_dir for a new run"
                for key in changed
            ]
        )


def check_same_facts(run: RunFolder, facts: dict[str, Any]) -> None:
    """Record what decides a run besides its config, or compare it with what was recorded when the run began.

    Raises:
        CheckpointError: the data, base or library versions are not those the run began with.
    """
    file = run.path / "run.json"
    if not file.is_file():
        durable.write_text(file, json.dumps(facts, indent=2) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key in facts if before.get(key) != facts[key]]
    if changed:
        raise CheckpointError(
            [
                f"{run.path}: {key} was {before.get(key)!r} when this run began and is {facts[key]!r} now; the resumed "
                "run would differ; restore it, or choose another run.output_dir"
                for key in changed
            ]
        )
