"""Whether anything is fetched, and how long an answer is waited for.

Offline means that no connection is tried: what is not on this disk is an error at once. The libraries read the
environment when they are imported, so that `go_offline` comes before them. With a network, each wait for the Hub has an
end: its client alone would wait for a silent server for ever.
"""

import os
from collections.abc import Mapping
from typing import Any

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}
"""What tells each library to stay on this machine."""
TRUE = {"1", "ON", "YES", "TRUE"}
"""What the libraries take for a yes."""
ANSWER_SECONDS = 30.0
"""Longest silence of the Hub, in the requests that set no limit of their own."""


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Say whether nothing is to be fetched."""
    return environment.get("HF_HUB_OFFLINE", "").upper() in TRUE


def go_offline() -> None:
    """Tell every library to connect to nothing; a tracker that is switched off stays so."""
    for name, value in OFFLINE.items():
        if not (name == "WANDB_MODE" and os.environ.get(name) == "disabled"):
            os.environ[name] = value


def limit_waiting() -> None:
    """Give every request to the Hub an end, those included that ask for none."""
    import huggingface_hub

    usual = huggingface_hub.get_session()
    client, hooks = type(usual), usual.event_hooks
    limited = {**hooks, "request": [*hooks.get("request", ()), _limit]}
    huggingface_hub.set_client_factory(lambda: client(event_hooks=limited, follow_redirects=True))


def _limit(request: Any) -> None:
    """Fill in the limits that a request leaves open, as seconds of silence."""
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: limits.get(name) or ANSWER_SECONDS for name in ("connect", "read", "write", "pool")
    }


def unreachable() -> str:
    """Return why something that is not here cannot be had, and what to do, for the end of a message."""
    if is_offline():
        return (
            "is not in the local cache, and offline nothing is fetched (--offline or HF_HUB_OFFLINE=1): fetch it once "
            "with a network, or give a local path"
        )
    return "is not in the local cache and the Hub cannot be reached: check the network, or give a local path"


def remote_tracker(name: str) -> str | None:
    """Return the variable that sends what a tracker is told over the network, or None when it stays on this machine."""
    variables = {"mlflow": "MLFLOW_TRACKING_URI", "trackio": "TRACKIO_SPACE_ID"}
    value = os.environ.get(variables.get(name, ""), "")
    is_remote = bool(value) and (name != "mlflow" or value.startswith(("http://", "https://", "databricks")))
    return variables[name] if is_remote else None
