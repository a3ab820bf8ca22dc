"""Gather the wheels for a GPU machine that has torch and Transformers but no network: Python 3.12 on x86-64 Linux.

Versions are those of requirements.lock. bitsandbytes keeps its CPU library and that of one CUDA version, a tenth of it.

Example: ``python scripts/gpu_wheels.py wheels``, then ``scripts/prove_gpu.sh`` there
"""

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "bitsandbytes", "peft", "trl", "datasets", "dill", "multiprocess", "pydantic", "pydantic_core", "annotated-types",
    "typing-inspection", "typing_extensions", "typer", "gguf",
)  # fmt: skip
"""What an installation of torch and Transformers lacks; a test module imports gguf."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.so")


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--cuda", default="130", help="CUDA version of torch there, without the dot (default: %(default)s)"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for wheel in options.folder.glob("*.whl"):
        wheel.unlink()  # two versions of a package cannot be installed together
    download(options.folder, pinned((ROOT / "requirements.lock").read_text(encoding="utf-8")))
    for wheel in options.folder.glob("bitsandbytes-*.whl"):
        strip_libraries(wheel, keep=("cpu", f"cuda{options.cuda}"))
    report(options.folder)


def pinned(lock: str) -> list[str]:
    """Return the requirement of each package, as the lock file pins it."""
    versions = dict(re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", lock))
    return [f"{name}=={versions[name]}" for name in PACKAGES]


def download(folder: Path, requirements: list[str]) -> None:
    """Download the wheels alone, without what they require."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *target, *platforms, "--dest", str(folder), *requirements], check=True)


def strip_libraries(wheel: Path, keep: tuple[str, ...]) -> None:
    """Leave out the compiled libraries of a bitsandbytes wheel, except for some backends.

    Raises:
        SystemExit: a backend to keep has no library in the wheel.
    """
    stripped = wheel.with_suffix(".stripped")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(stripped, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):
        backends = {name: found[1] for name in source.namelist() if (found := LIBRARY.fullmatch(name))}
        if missing := set(keep) - set(backends.values()):
            raise SystemExit(f"{wheel.name}: no library for {', '.join(sorted(missing))}; it has {backends.values()}")
        dropped = {name for name, backend in backends.items() if backend not in keep}
        for entry in source.infolist():
            if entry.filename in dropped:
                continue
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
            target.writestr(entry, content, zipfile.ZIP_DEFLATED)
    stripped.replace(wheel)


def report(folder: Path) -> None:
    """Print what would travel: the wheels and the files of the repository."""
    wheels = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    files = sum((ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file())
    print(f"wheels: {folder}, {len(list(folder.glob('*.whl')))} packages, {wheels / 2**20:.1f} MiB")
    print(f"with the repository's files: {(wheels + files) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
