"""Execute the Python lines of model cards in a fresh process."""

import contextlib
import io
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qlora_train.adapters import AdaptedModel
from qlora_train.config import RunConfig
from qlora_train.export import fresh_process
from qlora_train.export.adapter_writer import write_adapter
from qlora_train.runs import RunFolder

QUESTION = "12 + 34"
MAX_NEW_TOKENS = 12
IDS = torch.randint(4, 300, (2, 90), generator=torch.Generator().manual_seed(5))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a fresh process."""
    context = multiprocessing.get_context(fresh_process.start_method())
    context.set_forkserver_preload(fresh_process.PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def lines_of(card: Path, names: dict[str, Any]) -> list[str]:
    """Return the Python blocks of a card: loading, and generation if there is one.

    Args:
        card: its file.
        names: values for the placeholders of the card.
    """
    text = card.read_text(encoding="utf-8")
    blocks = [block.split("\n```", maxsplit=1)[0] for block in text.split("```python\n")[1:]]
    for name, value in {"YOUR-QUESTION": QUESTION, **names}.items():
        blocks = [block.replace(json.dumps(name), json.dumps(str(value))) for block in blocks]
        assert name == "YOUR-QUESTION" or any(str(value) in block for block in blocks), f"{name} is not in the card"
    return [block.replace('": "YOUR-QUESTION"', f'": "{QUESTION}"') for block in blocks]


def execute(blocks: list[str], ids: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Execute a card's lines; return the logits of the loaded model, and the printed answer."""
    torch.set_num_threads(1)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    with torch.no_grad():
        logits = names["model"](input_ids=ids).logits.float()
    printed = io.StringIO()
    for block in blocks[1:]:
        with contextlib.redirect_stdout(printed):
            exec(block.replace("max_new_tokens=256", f"max_new_tokens={MAX_NEW_TOKENS}"), names)
    return logits, printed.getvalue().removesuffix("\n")


def executed(folder: Path, names: dict[str, Any], ids: torch.Tensor = IDS) -> tuple[torch.Tensor, str]:
    """Execute the lines of a folder's card in a fresh process."""
    result: tuple[torch.Tensor, str] = in_fresh_process(execute, lines_of(folder / "README.md", names), ids)
    return result


def written_adapter(folder: Path, adapted: AdaptedModel, config: RunConfig, *, system: str = "") -> Path:
    """Write an adapter as a run does, and return its folder."""
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run.metadata_file.write_text(json.dumps({"run_id": "a-run", "changes": []}))
    if system:
        run.data_report_file.write_text(json.dumps({"system_prompt": {"text": system, "share": 1.0}}))
    result = {"train_loss": 1.0, "eval_loss": None, "taken_from_step": 1}
    data: Any = SimpleNamespace(num_train_rows=12)
    write_adapter(run, adapted, config, data, result)
    return run.adapter
