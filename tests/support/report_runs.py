"""Run folders for tests of reports, and a reader of HTML pages that knows elements, texts and attributes."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Self

from qlora_train.config.writer import to_yaml
from qlora_train.runs import RunFolder, write_json
from tests.support.runs import make_config

VOID = {"meta", "link", "br", "img", "input", "path", "rect"}


def begun_run(folder: Path, *overrides: str, name: str = "run") -> RunFolder:
    """Return a run folder that has a config only."""
    config = make_config(folder, folder / "base", *overrides, name=name)
    run = RunFolder(folder / name)
    run.path.mkdir(parents=True, exist_ok=True)
    run.config_file.write_text(to_yaml(config), encoding="utf-8")
    return run


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_metrics(run: RunFolder, *, num_steps: int = 40, offset: float = 0.0) -> None:
    """Write metrics as training does: every second step, with an evaluation every ten."""
    lines: list[dict[str, Any]] = []
    for step in range(2, num_steps + 1, 2):
        loss = 2.0 / step + 0.1 + offset
        line = {"step": step, "epoch": step / num_steps, "loss": loss, "learning_rate": 1e-4, "grad_norm": 0.5 + loss}
        lines.append(line | {"tokens_per_second": 100.0 + step, "peak_memory_bytes": 2_000_000_000 + step})
        if step % 10 == 0:
            lines.append(
                {"step": step, "epoch": step / num_steps, "eval_loss": loss + 0.05, "eval_runtime_seconds": 1.0}
            )
    write_lines(run.metrics_file, lines)


def write_answers(run: RunFolder, answers: Iterable[tuple[str, str, str]]) -> None:
    """Write rows of expected answer, answer of the base and answer of the adapter."""
    lines = [
        {"where": f"held.jsonl:{number}", "expected": expected, "base": base, "adapter": adapter}
        for number, (expected, base, adapter) in enumerate(answers, start=1)
    ]
    write_lines(run.answers_file, lines)


def segment(text: str, *, trained: bool) -> dict[str, Any]:
    return {"text": text, "trained": trained}


def write_data_report(run: RunFolder, segments: list[dict[str, Any]], *, where: str = "rows.jsonl:1") -> None:
    """Write data.json with one source and one row."""
    lengths = dict.fromkeys(("min", "median", "p90", "p99", "max"), 9)
    split = {
        "num_rows": 1, "num_tokens": 9, "num_labels": 3, "lengths": lengths,
        "num_at_max_length": 0, "num_duplicates": 0, "num_deduplicated": 0, "label_share": 1 / 3,
    }  # fmt: skip
    source = {
        "key": "data.train", "path": where.partition(":")[0], "format": "messages", "cached": False, "num_records": 1,
        "num_rows": 1, "num_used": 1, "num_dropped": 0, "dropped": [], "warned": [],
    }  # fmt: skip
    row = {"where": where, "num_tokens": 9, "num_labels": 3, "warnings": [], "segments": segments}
    write_json(
        run.data_report_file,
        {
            "max_length": 128, "overflow": "drop", "is_streamed": False, "sources": [source],
            "splits": {"data.train": split}, "overlap": [], "system_prompt": None, "findings": [], "first_rows": [row],
        },
    )  # fmt: skip


@dataclass
class Element:
    """An element of a page; `text` is that of all its descendants."""

    tag: str
    attributes: dict[str, str]
    children: list["Element"] = field(default_factory=list)
    own_text: list[str] = field(default_factory=list)
    text: str = ""

    def find(self, tag: str = "", **attributes: str) -> list["Element"]:
        """Return the descendants with a tag and attributes; `class_` matches one of the classes."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for child in self.children
            for element in (child, *child.find())
            if tag in ("", element.tag) and all(element.has(name, value) for name, value in wanted.items())
        ]

    def has(self, name: str, value: str) -> bool:
        found = self.attributes.get(name)
        return value in (found or "").split() if name == "class" else found == value


class Page(HTMLParser):
    """A parsed page; it fails on an element that is not closed where it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]

    @classmethod
    def of(cls, html: str) -> Self:
        page = cls()
        page.feed(html)
        page.close()
        assert page._open == [page.root], [element.tag for element in page._open]
        return page

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes})
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data
