"""Offline mode, and timeouts and a retry budget for the Hugging Face Hub.

The libraries read the environment at import, so `go_offline` comes first. Without a limit, the Hub's client waits for a
silent server forever.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qlora_train.utils.errors import UserError, first_line

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TRUE = {"1", "ON", "YES", "TRUE"}
TIMEOUT_SECONDS = 30.0
"""Maximum silence of the Hub in one request."""
RETRY_SECONDS = 60.0
"""Maximum time of retries after silence; the libraries' own retries take minutes."""


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether HF_HUB_OFFLINE is set."""
    return environment.get("HF_HUB_OFFLINE", "").upper() in TRUE


def go_offline() -> None:
    """Disable the network in every library but the trackers (`trackers.go_offline`)."""
    os.environ.update(OFFLINE)


def limit_hub_retries() -> None:
    """Apply timeouts and the retry budget to all requests to the Hub."""
    import huggingface_hub

    session, budget = huggingface_hub.get_session(), RetryBudget()
    hooks = {
        "request": [*session.event_hooks.get("request", ()), budget.before_request],
        "response": [*session.event_hooks.get("response", ()), budget.after_response],
    }
    client = type(session)
    huggingface_hub.set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True))


class RetryBudget:
    """Limits the time of unanswered requests; then the Hub counts as offline, and libraries use their caches."""

    def __init__(self) -> None:
        self._first = self._last = float("-inf")

    def before_request(self, request: Any) -> None:
        """Set the timeouts of a request.

        Raises:
            OfflineModeIsEnabled: the budget is used up.
        """
        from huggingface_hub.errors import OfflineModeIsEnabled

        now = time.monotonic()
        if now - self._last > 2 * TIMEOUT_SECONDS:
            self._first = now
        if now - self._first > RETRY_SECONDS:
            raise OfflineModeIsEnabled(f"no answer for {now - self._first:.0f} seconds")
        self._last = now
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            name: min(limits.get(name) or TIMEOUT_SECONDS, TIMEOUT_SECONDS)
            for name in ("connect", "read", "write", "pool")
        }

    def after_response(self, _response: Any) -> None:
        self._first = self._last = float("-inf")


def unreachable_reason() -> str:
    """Return the end of a message about a file that is neither cached nor reachable."""
    if is_offline():
        return (
            "is not in the local cache, and offline nothing is fetched (--offline or HF_HUB_OFFLINE=1): fetch it once "
            "with a network, or give a local path"
        )
    return "is not in the local cache and the Hub cannot be reached: check the network, or give a local path"


@contextmanager
def hub_errors(where: str, raised: type[UserError], hints: Mapping[str | int, str]) -> Iterator[None]:
    """Translate exceptions of the Hub client into a `raised` of one line, which starts with `where`.

    Args:
        hints: advice by name of the exception or HTTP status; "HFValidationError" and "unreachable" are required.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = hints.get(type(error).__name__) or hints.get(status, "try again")
        raise raised(f"{where}: the Hub answered {status}: {hint}") from None
    except errors.HFValidationError as error:
        raise raised(f"{where}: no repository id ({first_line(error)}); {hints['HFValidationError']}") from None
    # HTTPError is the base class of the HTTP library's own exceptions
    except (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError, TimeoutError):  # type: ignore[attr-defined]
        raise raised(f"{where} {hints['unreachable']}") from None
