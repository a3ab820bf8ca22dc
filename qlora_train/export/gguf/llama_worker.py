"""Quantize, evaluate or tokenize with a GGUF file in llama.cpp, in a process of its own that `llama_process` starts.

``python -m qlora_train.export.gguf.llama_worker JOB`` reads a JSON file that names a function of `JOBS` and its arguments,
and writes the answer to the file that the job names. Each printed line shows that the process is not stuck.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_train.export.gguf.llama_evaluation import evaluate
from qlora_train.export.gguf.llama_tokens import tokenize
from qlora_train.export.gguf.write_quantized import write_quantized
from qlora_train.utils.errors import explain

JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "quantize": write_quantized, "evaluate": evaluate, "tokenize": tokenize,
}  # fmt: skip


def _exit_with_parent() -> None:
    def wait() -> None:
        sys.stdin.read()  # ends when the parent does
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _main(file: Path) -> None:
    _exit_with_parent()
    job = json.loads(file.read_text(encoding="utf-8"))
    try:
        answer = JOBS[job["name"]](**job["arguments"])
    except OSError as error:
        raise SystemExit(explain(error) or f"{error}") from None
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # skip the destructors of the library's threads


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
