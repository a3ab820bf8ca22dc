"""A merged folder checked by a process that has nothing but its files: no base, no adapter, nothing that training left.

The process is a new one: a child of Python's fork server, which has imported the libraries and computed nothing, or where
that is not safe one that imports them itself. It loads the folder with Transformers alone, measures it on what was written
of the adapter (`Reference`), and answers in JSON. It ends with the process that asked.
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

import torch
import transformers

from qlora_train import stopping
from qlora_train.errors import MergeError, explain, first_line
from qlora_train.evaluate import held_out_loss
from qlora_train.export.merged import Placement, load_placed, place_for
from qlora_train.export.predictions import Agreement, agreement, compared_rows, load_reference

START = "forkserver" if sys.platform == "linux" else "spawn"
"""How the process is started; forks of a process with macOS's own libraries may crash."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Check:
    """What a merged folder does on the rows of a `Reference`: its loss in nats a token, and how near the adapter."""

    loss: float
    agreement: Agreement


def check_in_fresh_process(
    folder: Path, reference: Path, *, device: str, batch_size: int, trust_remote_code: bool
) -> Check:
    """Load a merged folder in a fresh process and measure it.

    Args:
        folder: the merged model.
        reference: file of `Reference.save`.
        device: where the model goes, as far as it fits.
        batch_size: rows computed at a time.
        trust_remote_code: run Python code shipped with the model.

    Raises:
        MergeError: the folder cannot be loaded or computed with, or the process died.
        Stop: this process was asked to stop; the other one is gone then.
    """
    context: Any = multiprocessing.get_context(START)
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    placement = place_for(folder, device)
    how = (folder, reference, placement, batch_size, trust_remote_code, torch.get_num_threads())
    process = context.Process(target=_run, args=(theirs, *how), name="check of the merged model")
    process.start()
    theirs.close()
    try:
        answer = _answer(process, ours)
    finally:
        process.kill()
        process.join()
        ours.close()
    if "problem" in answer:
        raise MergeError(f"{folder.name}: the merged model fails in a process of its own: {answer['problem']}")
    return Check(answer["loss"], Agreement(**answer["agreement"]))


def _answer(process: BaseProcess, connection: Connection) -> dict[str, Any]:
    """Return what the process says; a problem when it dies without a word."""
    while not multiprocessing.connection.wait([connection, process.sentinel], POLL_SECONDS):
        stopping.check()
    with suppress(EOFError, OSError):
        if connection.poll():
            answer: dict[str, Any] = json.loads(connection.recv_bytes())
            return answer
    process.join()
    stopping.check()  # a signal to the whole group ends it too
    status = process.exitcode or 0
    how = f"was ended by signal {-status}, as a system does that runs out of memory" if status < 0 else (
        f"ended with status {status}; a script that uses this package starts it under if __name__ == '__main__'"
    )  # fmt: skip
    return {"problem": f"it {how}"}


def _run(
    told: Connection,
    folder: Path,
    reference: Path,
    placement: Placement,
    batch_size: int,
    trust_remote_code: bool,
    num_threads: int,
) -> None:
    """Measure in the new process, and answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches both; the one that asked ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("qlora_train").setLevel(logging.ERROR)
    torch.set_num_threads(num_threads)
    try:
        answer = _measure(folder, reference, placement, batch_size, trust_remote_code)
    except Exception as error:
        answer = {"problem": explain(error) or f"{type(error).__name__}: {first_line(error)}"}
    told.send_bytes(json.dumps(answer).encode())


def _measure(
    folder: Path, reference: Path, placement: Placement, batch_size: int, trust_remote_code: bool
) -> dict[str, Any]:
    rows, predictions = load_reference(reference)
    model = load_placed(folder, placement, trust_remote_code=trust_remote_code).eval()
    # Padding is masked everywhere, so that any id of the vocabulary will do.
    loss = held_out_loss(model, rows, batch_size=batch_size, pad_token_id=0).loss
    return {"loss": loss, "agreement": asdict(agreement(model, compared_rows(rows), predictions))}


def _end_with_parent() -> None:
    """End this process when the one that asked has gone, killed ones included."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
