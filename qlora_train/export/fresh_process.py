"""Load a saved model in a fresh process by the code on its card, and compare it with the run.

The process has only the saved files. It tokenizes the run's texts (`TokenProbe`), computes loss and predictions on the
run's rows (`Reference`) and answers in JSON.

Without CUDA it is forked from Python's fork server, which has the libraries imported and computed nothing. With CUDA it is
spawned: importing bitsandbytes initialises CUDA, and a forked process cannot use CUDA after that.
"""

import json
import logging
import multiprocessing
import multiprocessing.connection
import signal
import sys
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
"""Start method without CUDA; macOS's own libraries may crash in a forked process."""
PRELOAD = [__name__]
"""Modules that the fork server imports."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ReloadCheck:
    """Comparison of a saved model with the run: its loss (nats per label token), predictions and tokenizer."""

    loss: float
    divergence: Divergence
    token_differences: tuple[str, ...]


def check_in_fresh_process(
    folder: Path, code: str, reference: Path, *, batch_size: int, error: type[UserError]
) -> ReloadCheck:
    """Load a saved model in a fresh process and compare it with the run.

    Args:
        folder: of the model, for messages.
        code: lines that define `model` and `tokenizer`.
        reference: file that `Reference.save` wrote.
        error: raised if the model cannot be loaded or computed with, or the process died.
    """
    context: Any = multiprocessing.get_context(start_method())
    context.set_forkserver_preload(PRELOAD)  # has no effect on spawn
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, code, reference, batch_size, torch.get_num_threads())
    process = context.Process(target=_run, args=arguments, name="check of a saved model")
    process.start()
    sender.close()
    try:
        answer = _answer(process, receiver)
    finally:
        process.kill()
        process.join()
        receiver.close()
    if "problem" in answer:
        raise error(f"{folder}: the code on its card fails in a fresh process: {answer['problem']}")
    return ReloadCheck(answer["loss"], Divergence(**answer["divergence"]), tuple(answer["token_differences"]))


def start_method() -> str:
    """Return how the process is started."""
    return "spawn" if torch.cuda.is_available() else START


def _answer(process: BaseProcess, connection: Connection) -> dict[str, Any]:
    """Wait for the answer of the process; if it dies, return a problem."""
    while not multiprocessing.connection.wait([connection, process.sentinel], POLL_SECONDS):
        signals.raise_if_requested()
    with suppress(EOFError, OSError):
        if connection.poll():
            answer: dict[str, Any] = json.loads(connection.recv_bytes())
            return answer
    process.join()
    signals.raise_if_requested()  # a signal to the whole group ends it too
    status = process.exitcode or 0
    if status < 0:
        return {"problem": f"it was ended by signal {-status}, as by a system that runs out of memory"}
    return {
        "problem": f"it ended with status {status}; a script that uses this package must start it under "
        "if __name__ == '__main__'"
    }


def _run(sender: Connection, code: str, reference: Path, batch_size: int, num_threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches both; the parent ends this one
    signals.exit_with_parent()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("qlora_train").setLevel(logging.ERROR)
    torch.set_num_threads(num_threads)
    try:
        answer = _measure(code, reference, batch_size)
    except Exception as error:
        answer = {"problem": explain(error) or f"{type(error).__name__}: {first_line(error)}"}
    sender.send_bytes(json.dumps(answer).encode())


def _measure(code: str, reference: Path, batch_size: int) -> dict[str, Any]:
    rows, predictions, probes = load_reference(reference)
    model, tokenizer = load_by(code)
    token_differences = differences(tokenizer, probes)
    reset_dynamic_rope(model)  # dynamic RoPE depends on the rows before
    # padding is masked, so that any token id will do
    loss = held_out_loss(model, rows, batch_size=batch_size, pad_token_id=0).loss
    divergence = measure_divergence(model, compared_rows(rows), predictions)
    return {"loss": loss, "divergence": asdict(divergence), "token_differences": token_differences}


def load_by(code: str) -> tuple[Any, Any]:
    """Execute the code on a card and return the model and tokenizer that it defines."""
    names: dict[str, Any] = {}
    exec(compile(code, "<code on the card>", "exec"), names)
    return names["model"].eval(), names["tokenizer"]
