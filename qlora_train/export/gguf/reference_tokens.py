"""Tokenize texts with llama.cpp itself, by the package ``xllamacpp`` if it is installed.

llama.cpp ends the process if it cannot read a file, so it runs in a subprocess: ``python -m
qlora_train.export.gguf.reference_tokens FILE`` reads a JSON list of texts and prints a list of their token ids.
"""

import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from qlora_train.utils.errors import ExportError

INSTALL = "pip install xllamacpp"


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """Return the token ids of texts, without added special tokens; None if xllamacpp is not installed.

    Raises:
        ExportError: llama.cpp cannot read the file.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    command = [sys.executable, "-m", "qlora_train.export.gguf.reference_tokens", str(file)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ExportError(
            f"{file.name}: llama.cpp cannot read the file ({lines[-1] if lines else f'status {done.returncode}'}); upgrade "
            "xllamacpp if the model is newer than it, or use the folder with Transformers or vLLM"
        )
    tokens: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return tokens


def _main(file: str) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 32, 1, 0
    parameters.warmup, parameters.no_extra_bufts, parameters.verbosity = False, True, -1
    server = xllamacpp.Server(parameters)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not for this machine

    def tokenize_one(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        request.add_header("Content-Type", "application/json")
        with opener.open(request) as answer:
            ids: list[int] = json.load(answer)["tokens"]
        return ids

    print(json.dumps([tokenize_one(text) for text in json.load(sys.stdin)]))


if __name__ == "__main__":
    _main(sys.argv[1])
