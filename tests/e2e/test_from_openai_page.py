"""docs/from_openai.md is run as it is written: its script against a server in OpenAI's shape, then its commands."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora_train.cli.main import main
from qlora_train.config import load_config
from qlora_train.runs import RunFolder
from tests.support.runs import check_in_this_process

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from_openai.md").read_text(encoding="utf-8")
ROWS = (ROOT / "data" / "examples" / "openai_chat.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
FILES = {"train-id": "".join(ROWS[6:]), "validation-id": "".join(ROWS[:6])}
JOB = {"training_file": "train-id", "validation_file": "validation-id", "fine_tuned_model": "ft:tuned"}
KEY = "key-of-the-test"

pytestmark = pytest.mark.usefixtures("preserve_library_settings")


class OpenAI(BaseHTTPRequestHandler):
    """Answers right where the prompt has an even number of characters."""

    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        if self.path == "/fine_tuning/jobs/ftjob-1":
            self.reply(json.dumps(JOB))
        else:
            self.reply(FILES[re.fullmatch(r"/files/(.*)/content", self.path)[1]])  # type: ignore[index]

    def do_POST(self) -> None:
        assert self.path == "/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        prompt = body["messages"][-1]["content"]
        right = next(row for row in map(json.loads, ROWS) if row["messages"][-2]["content"] == prompt)
        content = right["messages"][-1]["content"] if len(prompt) % 2 == 0 else "I do not know."
        self.reply(json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}))

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    OpenAI.asked = []
    with HTTPServer(("127.0.0.1", 0), OpenAI) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def blocks(language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(block: str, base: Path) -> Iterator[list[str]]:
    """Yield the words of each qlora-train command of a block, with a pico base."""
    for line in block.splitlines():
        program, *words = shlex.split(line)
        assert program == "qlora-train"
        yield [str(base) if word == "Qwen/Qwen2.5-7B-Instruct" else word for word in words]


def test_every_step_of_the_page_works(
    server: HTTPServer, pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    base = pico(max_position_embeddings=1024)
    save, steps, pairs = blocks()
    (script,) = blocks("python")
    Path("save_openai.py").write_text(script, encoding="utf-8")
    assert save.strip() == "OPENAI_JOB=ftjob-... python save_openai.py"
    settings = {"OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}", "OPENAI_API_KEY": KEY}
    subprocess.run(
        [sys.executable, "save_openai.py"], env={**os.environ, **settings, "OPENAI_JOB": "ftjob-1"}, check=True
    )
    assert all("weight" not in turn for request in OpenAI.asked for turn in request["messages"])

    for words in commands(steps, base):
        short = {"eval": ["--max-new-tokens", "4"], "my.yaml": ["train.max_steps=3"]}.get(words[0], [])
        assert main([*words, *short]) == 0, words
    check_comparison(RunFolder(Path("runs/my")))

    Path("preferences.jsonl").write_bytes((ROOT / "data" / "examples" / "openai_preferences.jsonl").read_bytes())
    new, train = commands(pairs, base)
    assert main(new) == 0
    config = load_config("pairs.yaml")
    assert (config.train.objective, config.data.format) == ("dpo", "openai_preference")
    assert main([*train, "train.max_steps=2"]) == 0
    assert RunFolder(Path("runs/pairs")).passed_adapter_check()


def check_comparison(run: RunFolder) -> None:
    """OpenAI's answers are scored on the same rows as those of base and adapter."""
    answers = [json.loads(line) for line in run.answers_file.read_text(encoding="utf-8").splitlines()]
    assert [line["where"] for line in answers] == [f"validation_file.jsonl:{number}" for number in range(1, 7)]
    assert all(line.keys() == {"where", "expected", "base", "adapter", "openai"} for line in answers)
    right = sum(line["openai"] == line["expected"] for line in answers) / len(answers)
    evaluation = run.read_results()["evaluation"]
    assert 0 < right < 1
    assert evaluation["openai"]["exact_match"] == pytest.approx(right)
    assert evaluation["adapter"]["loss"] > 0
    assert "openai" in run.report_file.read_text(encoding="utf-8")
