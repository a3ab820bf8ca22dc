"""Environment variables of torchrun, `accelerate launch` and mpirun.

accelerate would read them in place of the config: LOCAL_RANK wraps the model in DDP, ACCELERATE_MIXED_PRECISION adds
autocast, ACCELERATE_DYNAMO_BACKEND compiles.
"""

import logging
import os
import re

from qlora_train.utils.errors import ModelError

logger = logging.getLogger(__name__)

NUM_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_READ_BY_ACCELERATE = re.compile(r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_.+|(LOCAL_)?(RANK|WORLD_SIZE)")


def clear_launcher_environment() -> None:
    """Remove launchers' variables; raise a ModelError if the process is one of several."""
    for name in NUM_PROCESSES:
        if int(os.environ.get(name) or 1) > 1:
            raise ModelError(
                f"launcher: started as one of {os.environ[name]} processes ({name}), which would all train the same rows; "
                f"start one process without a launcher, or unset {name} if the job's shell sets it"
            )
    if names := sorted(filter(_READ_BY_ACCELERATE.fullmatch, os.environ)):
        logger.info("launcher: ignores %s (one process; the config decides)", ", ".join(names))
    for name in names:
        del os.environ[name]
