"""Checks of the Hugging Face Hub: a token, which is never shown, and the network."""

import os
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub.constants import ENDPOINT

from qlora_train.doctor.machine_check import Check
from qlora_train.utils import network
from qlora_train.utils.errors import first_line

TIMEOUT_SECONDS = 5.0


def token() -> Iterator[Check]:
    """Check whether a token is set; its value is not shown."""
    if huggingface_hub.get_token() is None:
        yield Check("Hub", "note", "no token: gated models cannot be downloaded", "run: hf auth login, or set HF_TOKEN")
    else:
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "hf auth login"
        yield Check("Hub", "ok", f"a token is set ({source})")


def network_access() -> Iterator[Check]:
    """Check offline mode, or that the Hub answers."""
    if network.is_offline():
        yield Check("network", "ok", "offline (HF_HUB_OFFLINE): local models and data only")
        return
    try:
        huggingface_hub.get_session().head(ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # of the HTTP library, which depends on the Hub's version
        reason = first_line(error) or type(error).__name__
        fix = "to train without it: export HF_HUB_OFFLINE=1"
        yield Check("network", "note", f"{ENDPOINT} does not answer ({reason}); local models and data only", fix)
    else:
        yield Check("network", "ok", f"{ENDPOINT} answers")
