"""What `qlora-train` alone and `--version` print."""

import platform
from importlib.metadata import PackageNotFoundError, distributions, version

from qlora_train import __version__

GUIDE = f"""\
qlora-train {__version__}: fine-tune a language model with QLoRA from one YAML file.

  qlora-train doctor                       what this machine can do
  qlora-train new MODEL --data ROWS        write a commented config for a model and your rows
  qlora-train plan CONFIG                  memory, disk and time of a run, before any download
  qlora-train data CONFIG                  your rows, with the tokens that are trained
  qlora-train CONFIG                       train; the same command resumes
  qlora-train chat RUN                     talk to the result
  qlora-train eval RUN                     base, adapter and merged model on held-out rows
  qlora-train export RUN --format gguf     for llama.cpp and Ollama

From another trainer: qlora-train convert THEIR.yaml
Everything else:      qlora-train --help, and qlora-train COMMAND --help
"""
STACK = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "triton")


def version_lines() -> list[str]:
    """Return the versions of this package and of the libraries under it; none of them is imported."""
    lines = [f"qlora-train {__version__}", f"python {platform.python_version()}"]
    lines += [f"{name} {_version(name)}" for name in STACK]
    return [*lines, f"CUDA {_cuda_version()}"]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cuda_version() -> str:
    """Return the CUDA version that torch was built for, from its version or the packages that it needs."""
    build = _version("torch").partition("+")[2]
    if build.startswith("cu") and build[2:].isdigit():
        return f"{build[2:-1]}.{build[-1]}"
    names = ((each.metadata["Name"] or "", each.version) for each in distributions())
    runtime = next((found for name, found in names if name.startswith("nvidia-cuda-runtime")), None)
    return runtime or "none (torch for CPUs)"
