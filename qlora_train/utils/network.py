"""Whether anything is fetched, and how long an answer is waited for.

Offline means that no connection is tried: what is not on this disk is an error at once. The libraries read the
environment when they are imported, so that `go_offline` comes before them. With a network, each wait for the Hub has an
end: its client alone would wait for a silent server for ever.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}
"""What tells each library to stay on this machine."""
TRUE = {"1", "ON", "YES", "TRUE"}
"""What the libraries take for a yes."""
ANSWER_SECONDS = 30.0
"""Longest silence of the Hub in one request."""
PATIENCE_SECONDS = 60.0
"""Longest time that it is asked again after silence."""


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Say whether nothing is to be fetched."""
    return environment.get("HF_HUB_OFFLINE", "").upper() in TRUE


def go_offline() -> None:
    """Tell every library to connect to nothing; a tracker that is switched off stays so."""
    for name, value in OFFLINE.items():
        if not (name == "WANDB_MODE" and os.environ.get(name) == "disabled"):
            os.environ[name] = value


def limit_hub_retries() -> None:
    """Give every request to the Hub an end, those included that ask for none, and their repetitions as well."""
    import huggingface_hub

    usual, patience = huggingface_hub.get_session(), RetryBudget()
    client, hooks = type(usual), usual.event_hooks
    limited = {
        "request": [*hooks.get("request", ()), patience.ask],
        "response": [*hooks.get("response", ()), patience.answered],
    }
    huggingface_hub.set_client_factory(lambda: client(event_hooks=limited, follow_redirects=True))


class RetryBudget:
    """How long the Hub is asked again and again without an answer: after that it counts as absent for a while.

    The libraries' own repetitions take minutes; absent, they look into their caches as they do offline.
    """

    def __init__(self) -> None:
        self._first = self._last = float("-inf")

    def ask(self, request: Any) -> None:
        """Limit the silence that a request bears, or refuse it.

        Raises:
            OfflineModeIsEnabled: the Hub has been silent for too long.
        """
        from huggingface_hub.errors import OfflineModeIsEnabled

        now = time.monotonic()
        if now - self._last > 2 * ANSWER_SECONDS:
            self._first = now
        if now - self._first > PATIENCE_SECONDS:
            raise OfflineModeIsEnabled(f"no answer for {now - self._first:.0f} seconds")
        self._last = now
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            name: min(limits.get(name) or ANSWER_SECONDS, ANSWER_SECONDS)
            for name in ("connect", "read", "write", "pool")
        }

    def answered(self, _response: Any) -> None:
        """Begin anew: the Hub is there."""
        self._first = self._last = float("-inf")


def unreachable_reason() -> str:
    """Return why something that is not here cannot be had, and what to do, for the end of a message."""
    if is_offline():
        return (
            "is not in the local cache, and offline nothing is fetched (--offline or HF_HUB_OFFLINE=1): fetch it once "
            "with a network, or give a local path"
        )
    return "is not in the local cache and the Hub cannot be reached: check the network, or give a local path"


def remote_tracker_variable(name: str) -> str | None:
    """Return the variable that sends what a tracker is told over the network, or None when it stays on this machine."""
    variables = {"mlflow": "MLFLOW_TRACKING_URI", "trackio": "TRACKIO_SPACE_ID"}
    value = os.environ.get(variables.get(name, ""), "")
    is_remote = bool(value) and (name != "mlflow" or value.startswith(("http://", "https://", "databricks")))
    return variables[name] if is_remote else None
