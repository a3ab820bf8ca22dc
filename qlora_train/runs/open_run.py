"""Open a run folder: check whose it is, lock it, and find the checkpoint to resume from."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_train.config import RunConfig
from qlora_train.config.absolute_paths import with_absolute_paths
from qlora_train.config.writer import to_yaml
from qlora_train.runs.fingerprint import check_same_settings
from qlora_train.runs.run_folder import RunFolder
from qlora_train.utils import atomic_io, signals
from qlora_train.utils.errors import CheckpointError
from qlora_train.utils.file_log import logged_to
from qlora_train.utils.run_events import RunOpened, emit

LOCK = ".lock"
logger = logging.getLogger(__name__)


@contextmanager
def open_run(config: RunConfig, *, resume: str = "auto") -> Iterator[tuple[RunFolder, Path | None]]:
    """Open or create the run folder of a config and lock it.

    Args:
        config: the resolved config; `run.output_dir` is set.
        resume: `auto` (latest complete checkpoint), `never` (an existing run is refused), or the path of a checkpoint.

    Yields:
        The folder, and the checkpoint to resume from or None.

    Raises:
        CheckpointError: the folder belongs to something else, to a run of other settings or to a running process, or the
            named checkpoint is not a complete one of this run.
    """
    assert config.run.output_dir is not None, "the CLI sets run.output_dir"
    run = RunFolder(Path(config.run.output_dir))
    if not run.config_file.is_file():
        _check_empty(run)
    with run_lock(run):
        if not run.config_file.is_file() or not run.has_begun():
            # empty, or the folder of a run that stopped at an error which the user has since fixed in the config
            run.metadata_file.unlink(missing_ok=True)
            run.samples_file.unlink(missing_ok=True)
            run.num_steps_file.unlink(missing_ok=True)  # timed with settings that may have changed
            run.delete_results()
            atomic_io.write_text(run.config_file, to_yaml(with_absolute_paths(config)))
        elif resume == "never":
            raise CheckpointError(
                f"{run.path}: holds a run already and --resume never would overwrite it; choose another run.output_dir or "
                "delete the folder"
            )
        elif not run.metadata():
            raise CheckpointError(f"{run.metadata_file}: is missing; restore it, or choose another run.output_dir")
        else:
            check_same_settings(run, config)
        emit(RunOpened(run.path))
        with _stop_logged(run):
            yield run, run.latest_checkpoint() if resume in ("auto", "never") else _named_checkpoint(run, Path(resume))


@contextmanager
def _stop_logged(run: RunFolder) -> Iterator[None]:
    """Log where a signal or a time limit stopped the run."""
    try:
        yield
    except signals.Stop as stop:
        steps = run.checkpoint_steps()
        saved = f"checkpoint of step {steps[-1]}: {run.checkpoint(steps[-1])}" if steps else "no checkpoint yet"
        logger.info("run: stopped by %s (%s)", stop.cause, saved)
        raise


def finished_run(path: Path) -> RunFolder:
    """Return the finished run at `path`.

    Raises:
        CheckpointError: not a run, or an unfinished one.
    """
    run = RunFolder(path)
    if not run.config_file.is_file():
        raise CheckpointError(f"{path}: is not a run folder (no config.yaml); give one such as runs/llama7b")
    if not run.is_finished():
        raise CheckpointError(f"{path}: the run has not finished; continue it with: qlora-train {run.config_file}")
    return run


@contextmanager
def run_lock(run: RunFolder) -> Iterator[None]:
    """Lock a run folder against other processes, and remove stale files; the lock ends with the process.

    Raises:
        CheckpointError: another process holds the lock, the folder is not writable, or a link leads out of it.
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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(descriptor, 64).decode(errors="replace") or "unknown"
            raise CheckpointError(
                f"{run.path}: is locked by another process ({owner}); wait for it, or stop it"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        run.remove_stale_files()
        with logged_to(run.log_file):
            yield
    finally:
        os.close(descriptor)


def refuse_links(run: RunFolder) -> None:
    """Refuse symbolic links for the run folder, its files, folders and checkpoints: they lead writes and deletions away.

    Folders above the run folder may be links. Links inside a checkpoint or adapter are deleted as links.

    Raises:
        CheckpointError: the first link, with its target.
    """
    if run.path.is_symlink():
        raise CheckpointError(
            f"{run.path}: run.output_dir is a link to {run.path.readlink()}; a run folder must be a folder: set "
            "run.output_dir to the link's target"
        )
    for folder in (run.path, run.checkpoints):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_symlink():
                raise CheckpointError(
                    f"{path}: is a link to {path.readlink()}; a run writes and deletes inside its own folder only: "
                    "replace the link by its target, or remove it"
                )


def _check_empty(run: RunFolder) -> None:
    names = {path.name for path in run.path.iterdir()} if run.path.is_dir() else set()
    if run.path.is_file() or any(
        name not in (LOCK, run.log_file.name) and not atomic_io.is_stale(name) for name in names
    ):
        raise CheckpointError(
            f"{run.path}: run.output_dir is not empty and holds no run (no config.yaml); choose another run.output_dir"
        )


def _named_checkpoint(run: RunFolder, folder: Path) -> Path:
    if folder.resolve().parent != run.checkpoints.resolve():
        raise CheckpointError(
            f"--resume {folder}: is no checkpoint of this run; those are in {run.checkpoints}, for example step-00000100"
        )
    if run.is_finished():
        raise CheckpointError(f"--resume {folder}: the run has finished; delete {run.adapter} to train on from there")
    steps = {run.checkpoint(step).name: step for step in run.checkpoint_steps()}
    problem = run.checkpoint_problem(steps[folder.name]) if folder.name in steps else "does not exist"
    if problem is not None:
        raise CheckpointError(f"--resume {folder}: {problem}; choose another of {run.checkpoints}")
    return folder
