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
    """Check the packages of the optional extras; none is needed to train."""
    names = [name for name in metadata(PACKAGE).get_all("Provides-Extra") or () if name not in DEVELOPMENT]
    unmet = {name: [requirement.name for requirement, _ in _unmet(_requirements(name))] for name in names}
    if installed := [name for name in names if not unmet[name]]:
        yield Check("extra", "ok", f"installed: {', '.join(installed)}")
    if missing := {name: packages for name, packages in unmet.items() if packages}:
        text = "; ".join(f"{name} needs {', '.join(packages)}" for name, packages in missing.items())
        yield Check("extra", "note", f"optional, {text}", f"run: {pip()} install '{PACKAGE}[{','.join(missing)}]'")


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
