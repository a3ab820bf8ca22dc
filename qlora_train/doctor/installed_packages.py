"""Versions of the installed packages against the ranges that this package requires, and its optional extras."""

import platform
import shlex
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_train.doctor.machine_check import Check, pip

PACKAGE = "qlora-train"
SHOWN = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
"""Packages whose versions the check shows: those that can change a run's numbers."""
DEVELOPMENT = ("dev", "docs")
"""Extras for work on this package."""


def packages() -> Iterator[Check]:
    """Check Python and the required packages."""
    try:
        python = SpecifierSet(metadata(PACKAGE)["Requires-Python"])
    except PackageNotFoundError:
        yield Check("packages", "problem", f"{PACKAGE} is not installed, only its source", f"run: {pip()} install .")
        return
    if platform.python_version() not in python:
        yield Check("Python", "problem", f"{platform.python_version()} is not supported", f"use Python {python}")
    wrong = {each.name: (each, found) for each, found in _unmet(_requirements("")) if found}
    missing = [each for each, found in _unmet(_requirements("")) if not found]
    if wrong or missing:
        found = [f"{name} {installed} is outside {each.specifier}" for name, (each, installed) in wrong.items()]
        found += [f"{each.name} is not installed" for each in missing]
        wanted = [each for each, _ in wrong.values()] + missing
        yield Check("packages", "problem", ", ".join(found), install_line(wanted))
    else:
        versions = ", ".join(f"{name} {version(name)}" for name in SHOWN)
        yield Check("packages", "ok", f"{PACKAGE} {version(PACKAGE)}, Python {platform.python_version()}, {versions}")


def extras() -> Iterator[Check]:
    """Check the packages of each optional extra; none is needed to train."""
    for extra in metadata(PACKAGE).get_all("Provides-Extra") or ():
        if extra in DEVELOPMENT:
            continue
        if unmet := [requirement.name for requirement, _ in _unmet(_requirements(extra))]:
            text = f"{extra} needs {', '.join(unmet)}"
            yield Check("extra", "note", text, f"run: {pip()} install '{PACKAGE}[{extra}]'")
        else:
            yield Check("extra", "ok", f"{extra} is installed")


def install_line(requirements: list[Requirement]) -> str:
    """Return the command that installs requirements into this environment."""
    words = (shlex.quote(f"{each.name}{each.specifier}") for each in requirements)
    return f"run: {pip()} install {' '.join(words)}"


def _requirements(extra: str) -> list[Requirement]:
    """Return the requirements of an extra alone, or of the package for an empty name."""
    found = [Requirement(text) for text in requires(PACKAGE) or ()]
    return [
        each
        for each in found
        if (each.marker is None and not extra)
        or (
            each.marker is not None
            and each.marker.evaluate({"extra": extra})
            and (not extra or "extra" in str(each.marker))
        )
    ]


def _unmet(requirements: list[Requirement]) -> Iterator[tuple[Requirement, str]]:
    """Yield each requirement that is not met, and the version that is installed or an empty string."""
    for requirement in requirements:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield requirement, ""
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield requirement, installed
