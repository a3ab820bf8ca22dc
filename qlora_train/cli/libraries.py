"""Environment and verbosity of the libraries, set before a command imports them."""

import logging
import os
import warnings

from qlora_train.utils import network
from qlora_train.utils.launcher import clear_launcher_environment


def prepare_libraries(*, offline: bool = False, local_rank: int = 0) -> None:
    """Configure network, threads, device and verbosity; then import Transformers. `local_rank` has a GPU of its own."""
    clear_launcher_environment()
    if offline or network.is_offline():
        network.go_offline()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # telemetry would contact the Hub in local runs

    from qlora_train.utils.cpu_threads import choose_wait_policy

    choose_wait_policy()
    from qlora_train.utils.device import prepare_cuda

    prepare_cuda(local_rank)
    import transformers

    network.limit_hub_retries()
    for library in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|accelerate|bitsandbytes|torch|datasets)\.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
