"""What must be equal on all ranks before they train together."""

import platform
from collections.abc import Mapping
from typing import Any

from qlora_train.parallel.context import context
from qlora_train.utils.errors import ConfigError

MAX_DIFFERENCES = 3


def require_equal(what: str, facts: Mapping[str, Any]) -> None:
    """Compare facts of all ranks with those of rank 0; a collective.

    Raises:
        ConfigError: on every rank; one line with the first differences and the machine of the rank.
    """
    (_, expected), *others = context().gather((platform.node(), dict(facts)))
    for rank, (host, actual) in enumerate(others, start=1):
        keys = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
        if keys:
            shown = [f"{key} is {actual.get(key)!r} there and {expected.get(key)!r} on rank 0" for key in keys]
            raise ConfigError(
                f"{what} of rank {rank} on {host} differ from those of rank 0: {'; '.join(shown[:MAX_DIFFERENCES])}"
                f"{' ...' if len(shown) > MAX_DIFFERENCES else ''}; all processes need the same"
            )
