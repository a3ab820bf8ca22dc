"""Start `llama_worker` in a process of its own: quantize a GGUF file, compute losses and answers with it, or tokenize."""

import importlib.util
import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.export.gguf.converter import MAX_SILENT_SECONDS, clean_environment
from qlora_train.export.gguf.llama_library import DONE, PACKAGE
from qlora_train.utils.errors import ExportError
from qlora_train.utils.num_cores import num_cores
from qlora_train.utils.run_events import Counter, progress
from qlora_train.utils.watched_process import run_watched

INSTALL = f"pip install {PACKAGE}"
_CRASHES = (-signal.SIGABRT, -signal.SIGSEGV)
"""Exit statuses after a failed assertion of llama.cpp and an invalid access."""
_ADVICE = f"; upgrade {PACKAGE} if the model is newer than it, or use the folder with Transformers or vLLM"


@dataclass(frozen=True)
class Evaluation:
    """What a file predicts.

    Attributes:
        nll: negative log-likelihood of each row, in nats; fewer than there are rows if time ran out.
        answers: token ids of the answer to each prompt; the same.
    """

    nll: tuple[float, ...]
    answers: tuple[tuple[int, ...], ...]


def has_library() -> bool:
    """Return whether llama.cpp's library is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def quantize_file(source: Path, target: Path, file_type: int, types: Mapping[str, str], *, num_tensors: int) -> None:
    """Quantize a file of `num_tensors` tensors with the library; `types` are those to convert, see `quant_mix`.

    Raises:
        ExportError: it failed.
    """
    arguments = {"source": str(source), "target": str(target), "file_type": file_type, "types": dict(types)}
    with progress(f"quantizing {target.name}", num_tensors, "tensors") as counter:
        _run("quantize", arguments, what=target, counter=counter)


def evaluate_file(
    model: Path,
    *,
    adapter: Path | None = None,
    rows: Sequence[tuple[list[int], list[bool]]],
    prompts: Sequence[list[int]],
    stops: Sequence[int],
    max_new_tokens: int,
    max_seconds: float | None,
) -> Evaluation:
    """Compute losses and greedy answers with the library; see `llama_evaluation.evaluate`.

    Raises:
        ExportError: llama.cpp cannot load the file or compute with it.
    """
    arguments = {
        "model": str(model), "adapter": str(adapter or ""), "rows": rows, "prompts": prompts, "stops": list(stops),
        "max_new_tokens": max_new_tokens, "max_seconds": max_seconds,
    }  # fmt: skip
    with progress(f"measuring {model.name}", len(rows) + len(prompts), "rows and answers") as counter:
        answer = _run("evaluate", arguments, what=model, counter=counter)
    return Evaluation(tuple(answer["nll"]), tuple(map(tuple, answer["answers"])))


def tokenize_file(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, without added special tokens.

    Raises:
        ExportError: llama.cpp cannot read the file.
    """
    ids: list[list[int]] = _run("tokenize", {"model": str(model), "texts": list(texts)}, what=model)["ids"]
    return ids


def check_loads(model: Path) -> None:
    """Raise an ExportError if llama.cpp cannot load a file."""
    evaluate_file(model, rows=[], prompts=[], stops=[], max_new_tokens=1, max_seconds=None)


def _run(name: str, arguments: dict[str, Any], *, what: Path, counter: Counter | None = None) -> dict[str, Any]:
    def count(line: str) -> None:
        if counter is not None and line.startswith(f"{DONE}: "):
            counter.advance()

    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        arguments["num_threads"] = num_cores()
        job.write_text(json.dumps({"name": name, "arguments": arguments, "answer": str(answer)}), encoding="utf-8")
        command = [sys.executable, "-m", "qlora_train.export.gguf.llama_worker", str(job)]
        done = run_watched(
            command, environment=clean_environment(), max_silent_seconds=MAX_SILENT_SECONDS, on_line=count,
            open_input=True,
        )  # fmt: skip
        if not done.has_failed:
            result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return result
    reason = done.lines[-1] if done.status == 1 and done.lines else f"llama.cpp {done.problem()}"
    raise ExportError(f"{what.name}: {reason}{_ADVICE if 'the file' in reason or done.status in _CRASHES else ''}")
