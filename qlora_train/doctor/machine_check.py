"""The checks of `qlora-train doctor`, one row each, and their results."""

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qlora_train.utils.errors import UserError, explain, first_line
from qlora_train.utils.lazy_import import import_function

CHECKS = (
    ("packages", "installed_packages:packages", "qlora-train"),
    ("GPU", "hardware_checks:devices", "torch"),
    ("compute dtype", "hardware_checks:compute_dtype", "torch"),
    ("packed attention", "hardware_checks:packed_attention", "torch"),
    ("Triton", "hardware_checks:triton_kernels", "triton"),
    ("bitsandbytes", "hardware_checks:bitsandbytes_library", "bitsandbytes"),
    ("memory", "storage_checks:memory", "psutil"),
    ("disk", "storage_checks:disks", "huggingface_hub"),
    ("Hub", "hub_checks:token", "huggingface_hub"),
    ("network", "hub_checks:network_access", "huggingface_hub"),
    ("extra", "installed_packages:extras", "qlora-train"),
    ("trial run", "trial_run:trial_run", "transformers"),
)
"""Name, function, and the package that a failing import points to. The run is last: it takes longest."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check.

    Attributes:
        status: `problem`: training cannot work; `note`: it works, and something is missing or slower.
        fix: what to do, with the exact command where there is one.
    """

    name: str
    status: Literal["ok", "note", "problem"]
    text: str
    fix: str = ""

    def line(self) -> str:
        """Return the result as one line."""
        return f"{self.status:<7}  {self.name}: {self.text}{f'; {self.fix}' if self.fix else ''}"


def run_checks(checks: Sequence[tuple[str, str, str]] = CHECKS) -> Iterator[Check]:
    """Run every check; one that fails itself is a problem. A cause that several checks meet has its fix once."""
    first: dict[str, str] = {}
    for name, function, package in checks:
        for check in guarded(name, f"{__package__}.{function}", package):
            if check.status == "problem" and first.setdefault(check.text, name) != name:
                yield replace(check, text=f"not checked: the same error as {first[check.text]}", fix="")
            else:
                yield check


def guarded(name: str, function: str, package: str) -> Iterator[Check]:
    """Run the checks of `module:function`; an error, of its imports too, is a problem."""
    try:
        check: Callable[[], Iterator[Check]] = import_function(function)
        yield from check()
    except UserError as error:
        yield Check(name, "problem", first_line(error))
    except Exception as error:  # a broken library fails in any way
        reason = explain(error) or f"{type(error).__name__}: {first_line(error)}"
        yield Check(name, "problem", reason, f"run: {pip()} install --force-reinstall {package}")


def pip() -> str:
    """Return the command of this environment's pip: its name alone if the shell would find this one."""
    found = shutil.which("pip")
    is_ours = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip" if is_ours else f"{shlex.quote(sys.executable)} -m pip"
