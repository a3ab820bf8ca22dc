"""The run folder of several processes: rank 0 opens, locks and writes it, the others read it and log into it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_train.config import RunConfig
from qlora_train.config.resume_policy import flat_settings
from qlora_train.parallel import context
from qlora_train.parallel.agreement import require_equal
from qlora_train.runs.open_run import open_run
from qlora_train.runs.run_folder import RunFolder
from qlora_train.utils.errors import CheckpointError
from qlora_train.utils.file_log import log_to_file

logger = logging.getLogger(__name__)


@contextmanager
def open_shared_run(config: RunConfig, *, resume: str = "auto") -> Iterator[tuple[RunFolder, Path | None]]:
    """Open the run folder of a config, as `open_run`, on every rank.

    Raises:
        CheckpointError: as `open_run`, on rank 0; or another machine does not see the folder.
        ConfigError: the ranks have different configs.
    """
    this = context()
    require_equal("settings", flat_settings(config.model_dump(mode="json")))
    if this.is_main:
        with open_run(config, resume=resume) as (run, checkpoint):
            this.broadcast(checkpoint)
            if this.world_size > 1:
                logger.info("processes: %d (logs of the others: %s)", this.world_size, run.logs)
            this.barrier()
            yield run, checkpoint
        return
    assert config.run.output_dir is not None, "the CLI sets run.output_dir"
    run = RunFolder(Path(config.run.output_dir))
    checkpoint = this.broadcast(None)
    if not run.config_file.is_file():
        raise CheckpointError(
            f"{run.path}: rank {this.rank} does not see the run folder that rank 0 has opened; run.output_dir must be a "
            "folder that all machines share"
        )
    log_to_file(run.rank_log(this.rank))
    this.barrier()
    yield run, checkpoint
