"""A saved model checked by a process that has nothing but its files, from text on.

The process executes the lines of the card, and nothing else loads the model. It compares the tokens that the saved
tokenizer makes of the run's texts (`TokenProbe`), and the predictions on the run's rows with those of the run
(`Reference`), and answers in JSON. It ends with the process that asked.

It is a child of Python's fork server, which has imported the libraries and computed nothing. With CUDA it is a new
interpreter: importing bitsandbytes initialises CUDA, and a forked process cannot use it then.
"""

import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - imported for the processes that the fork server starts
import torch
import transformers

from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.export.predictions import Divergence, compared_rows, load_reference, measure_divergence
from qlora_train.models.dynamic_rope import reset_dynamic_rope
from qlora_train.models.token_probes import differences
from qlora_train.utils import signals
from qlora_train.utils.errors import UserError, explain, first_line

START = "forkserver" if sys.platform == "linux" else "spawn"
"""How the process is started without CUDA; forks of a process with macOS's own libraries may crash."""
PRELOAD = [__name__]
"""Modules that the fork server imports; it is one for all that a process starts."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ReloadCheck:
    """How a saved model compares with the run.

    Attributes:
        loss: NLL per label token on the rows of the reference.
        divergence: of its predictions.
        token_differences: texts of which its tokenizer makes other tokens; empty where all are equal.
    """

    loss: float
    divergence: Divergence
    token_differences: tuple[str, ...]


def check_in_fresh_process(
    where: Path, code: str, reference: Path, *, batch_size: int, error: type[UserError]
) -> ReloadCheck:
    """Load a saved model by its card's lines in a fresh process, and compare it with the run.

    Args:
        where: folder of the model, for messages.
        code: lines that define `model` and `tokenizer`.
        reference: file of `Reference.save`.
        batch_size: rows computed at a time.
        error: what to raise.

    Raises:
        UserError: of class `error`: the model cannot be loaded or computed with, or the process died.
        Stop: this process was asked to stop; the other one is gone then.
    """
    context: Any = multiprocessing.get_context(start_method())
    context.set_forkserver_preload(PRELOAD)  # has no effect on spawn
    ours, theirs = context.Pipe(duplex=False)
    how = (code, reference, batch_size, torch.get_num_threads())
    process = context.Process(target=_run, args=(theirs, *how), name="check of a saved model")
    process.start()
    theirs.close()
    try:
        answer = _answer(process, ours)
    finally:
        process.kill()
        process.join()
        ours.close()
    if "problem" in answer:
        raise error(f"{where}: loaded as its card says, it fails in a process of its own: {answer['problem']}")
    return ReloadCheck(answer["loss"], Divergence(**answer["divergence"]), tuple(answer["token_differences"]))


def start_method() -> str:
    """Return how the process is started."""
    return "spawn" if torch.cuda.is_available() else START


def _answer(process: BaseProcess, connection: Connection) -> dict[str, Any]:
    """Return what the process says; a problem when it dies without a word."""
    while not multiprocessing.connection.wait([connection, process.sentinel], POLL_SECONDS):
        signals.raise_if_requested()
    with suppress(EOFError, OSError):
        if connection.poll():
            answer: dict[str, Any] = json.loads(connection.recv_bytes())
            return answer
    process.join()
    signals.raise_if_requested()  # a signal to the whole group ends it too
    status = process.exitcode or 0
    how = f"was ended by signal {-status}, as a system does that runs out of memory" if status < 0 else (
        f"ended with status {status}; a script that uses this package starts it under if __name__ == '__main__'"
    )  # fmt: skip
    return {"problem": f"it {how}"}


def _run(told: Connection, code: str, reference: Path, batch_size: int, num_threads: int) -> None:
    """Measure in the new process, and answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches both; the one that asked ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("qlora_train").setLevel(logging.ERROR)
    torch.set_num_threads(num_threads)
    try:
        answer = _measure(code, reference, batch_size)
    except Exception as error:
        answer = {"problem": explain(error) or f"{type(error).__name__}: {first_line(error)}"}
    told.send_bytes(json.dumps(answer).encode())


def _measure(code: str, reference: Path, batch_size: int) -> dict[str, Any]:
    rows, predictions, probes = load_reference(reference)
    model, tokenizer = load_by(code)
    token_differences = differences(tokenizer, probes)
    reset_dynamic_rope(model)  # rows are compared in an order of their own
    # Padding is masked everywhere, so that any id of the vocabulary will do.
    loss = held_out_loss(model, rows, batch_size=batch_size, pad_token_id=0).loss
    found = measure_divergence(model, compared_rows(rows), predictions)
    return {"loss": loss, "divergence": asdict(found), "token_differences": token_differences}


def load_by(code: str) -> tuple[Any, Any]:
    """Execute the lines of a card and return the model and the tokenizer that they define."""
    names: dict[str, Any] = {}
    exec(compile(code, "<lines of the card>", "exec"), names)
    return names["model"].eval(), names["tokenizer"]


def _end_with_parent() -> None:
    """End this process when the one that asked has gone, killed ones included."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
