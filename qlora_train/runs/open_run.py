"""Open a run folder: is it this run's, is it free, and where does the run go on?"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_train.utils import atomic_io
from qlora_train.runs.fingerprint import check_same_settings
from qlora_train.runs.symlinks import refuse_links
from qlora_train.runs.run_folder import RunFolder
from qlora_train.config import RunConfig
from qlora_train.config.absolute_paths import with_absolute_paths
from qlora_train.config.writer import to_yaml
from qlora_train.utils.errors import CheckpointError

LOCK = ".lock"


@contextmanager
def open_run(config: RunConfig, *, resume: str = "auto") -> Iterator[tuple[RunFolder, Path | None]]:
    """Open or create the run folder of a config, hold it against other processes, and say where to go on.

    Args:
        config: the resolved config; `run.output_dir` is set.
        resume: `auto` continues from the newest whole checkpoint, `never` starts over (an existing run is refused), a
            path continues from that checkpoint of this run, if it has not finished.

    Yields:
        The folder, and the checkpoint to resume from or None.

    Raises:
        CheckpointError: the folder belongs to something else, to a run of other settings or to a running process, or the
            named checkpoint is not a whole one of this run.
    """
    assert config.run.output_dir is not None, "the CLI fills in run.output_dir"
    run = RunFolder(Path(config.run.output_dir))
    _refuse_foreign(run)
    with run_lock(run):
        if not run.config_file.is_file() or not run.has_begun():
            _claim(run, config)
        elif resume == "never":
            raise CheckpointError(
                f"{run.path}: holds a run already and --resume never would overwrite it; choose another run.output_dir or "
                "delete the folder"
            )
        elif not run.metadata():
            raise CheckpointError(f"{run.metadata_file}: is missing; restore it, or choose another run.output_dir")
        else:
            check_same_settings(run, config)
        if resume in ("auto", "never"):
            yield run, run.latest_checkpoint()
        else:
            yield run, _named_checkpoint(run, Path(resume))


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


@contextmanager
def run_lock(run: RunFolder) -> Iterator[None]:
    """Hold a run folder against other processes; the lock ends with the process, however it ends.

    Raises:
        CheckpointError: another process holds it, it cannot be written, or a link leads out of it.
    """
    refuse_links(run)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"{run.path}: run.output_dir cannot be written ({error.strerror}); choose another"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 64).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise CheckpointError(
            f"{run.path}: another process is at work in it ({owner}); wait for it, or stop it"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        run.remove_stale_files()
        yield
    finally:
        os.close(descriptor)


def _refuse_foreign(run: RunFolder) -> None:
    if run.config_file.is_file():
        return
    names = {path.name for path in run.path.iterdir()} if run.path.is_dir() else set()
    if run.path.is_file() or any(name != LOCK and not atomic_io.is_stale(name) for name in names):
        raise CheckpointError(
            f"{run.path}: run.output_dir is not empty and holds no run (no config.yaml); choose another run.output_dir"
        )


def _claim(run: RunFolder, config: RunConfig) -> None:
    """Take an empty folder, or that of a run that stopped on a mistake which the user has mended in the config since."""
    run.metadata_file.unlink(missing_ok=True)
    run.delete_results()
    atomic_io.write_text(run.config_file, to_yaml(with_absolute_paths(config)))


def _named_checkpoint(run: RunFolder, folder: Path) -> Path:
    if folder.resolve().parent != run.checkpoints.resolve():
        raise CheckpointError(
            f"--resume {folder}: is no checkpoint of this run; those are in {run.checkpoints}, for example step-00000100"
        )
    if run.is_finished():
        raise CheckpointError(f"--resume {folder}: the run has finished; delete {run.adapter} to train on from there")
    steps = {run.checkpoint(step).name: step for step in run.checkpoint_steps()}
    problem = run.checkpoint_problem(steps[folder.name]) if folder.name in steps else "it is not there"
    if problem is not None:
        raise CheckpointError(f"--resume {folder}: {problem}; choose another of {run.checkpoints}")
    return folder
