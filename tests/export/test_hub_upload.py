"""What goes to the Hub is a model and its card; a dry run says it all and connects to nothing; refusals are one line."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from qlora_train.cli.main import main
from qlora_train.export.hub_upload import plan_upload, push
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ExportError
from tests.support.runs import train_run

REPO = "someone/sums"
TOKEN = "hf_" + "x" * 34


@pytest.fixture(scope="module")
def trained(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished and merged run."""
    folder = tmp_path_factory.mktemp("push")
    merging = ("export.merge=true", "export.merge_base=dequantized")
    return train_run(folder, pico_llama, "train.max_steps=1", *merging, name="sums")


@pytest.fixture
def own(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the run, to be changed."""
    return RunFolder(Path(shutil.copytree(trained.path, tmp_path / "run")))


def rewrite(folder: Path, name: str, content: str) -> None:
    """Change a file of a whole folder, which is whole afterwards."""
    (folder / name).write_text(content, encoding="utf-8")
    atomic_io.write_manifest(folder, atomic_io.read_metadata(folder))


class Hub:
    """A Hub on this machine that takes one upload and writes down what it was sent."""

    def __init__(self, refuse: int | None = None) -> None:
        self.made: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(refuse or 200, {} if refuse else hub.answer(self.path, body))

            def do_GET(self) -> None:
                self._answer(200, {"siblings": [], "id": REPO})

            def _answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Answer the four requests of an upload whose files are all small."""
        if path.endswith("/repos/create"):
            self.made = json.loads(body)
            return {"url": f"{self.address}/{REPO}"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.address}/{REPO}/commit/1", "commitOid": "1", "pullRequestUrl": None}
        return {}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's client connect, with a token."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def serve(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`serve(refuse) -> Hub`, to which the client connects."""
    hubs: list[Hub] = []

    def start(refuse: int | None = None) -> Hub:
        hubs.append(Hub(refuse))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hubs[-1].address)
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.server.shutdown()
        hub.server.server_close()


def test_dry_run_lists_the_upload_without_a_connection(
    trained: RunFolder, serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = serve()
    assert main(["export", str(trained.path), "--push", REPO, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"repository: {REPO} (private if new")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"):
        assert f"  {name} " in out
    assert "MB" in out
    assert "library_name: peft" in out, "what the card says"
    assert atomic_io.MANIFEST not in out
    assert (hub.made, hub.tokens) == ({}, set())


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_model_and_card_arrive_in_a_private_repository_and_nothing_else_does(
    trained: RunFolder, serve: Any, capsys: pytest.CaptureFixture[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, folder = serve(), trained.merged if what == "merged" else trained.adapter
    upload = plan_upload(folder, REPO, private=True)
    assert push(upload) == f"{hub.address}/{REPO}/commit/1"
    assert (hub.made["name"], hub.made["organization"]) == ("sums", "someone")
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != atomic_io.MANIFEST}
    sent = b"".join(hub.files.values())
    assert str(trained.path.parent).encode() not in sent
    assert TOKEN.encode() not in sent


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "does not know the token"), (403, "no write access there"), (404, "no such owner"), (418, "try again")],
)
def test_refusal_of_the_hub_is_one_line(trained: RunFolder, serve: Any, status: int, said: str) -> None:
    serve(status)
    with pytest.raises(ExportError, match=f"the Hub answered {status}: .*{said}") as caught:
        push(plan_upload(trained.adapter, REPO, private=True))
    assert "\n" not in str(caught.value)


def test_unreachable_hub_is_one_line(trained: RunFolder, serve: Any) -> None:
    hub = serve()
    hub.server.server_close()
    with pytest.raises(ExportError, match="cannot be reached") as caught:
        push(plan_upload(trained.adapter, REPO, private=True))
    assert "\n" not in str(caught.value)


def test_without_network_or_token_nothing_is_tried(
    trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained.path), "--push", REPO, "--offline"]) == 2
    assert "offline (--offline or HF_HUB_OFFLINE=1)" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ExportError, match="no token; set HF_TOKEN"):
        push(plan_upload(trained.adapter, REPO, private=True))


@pytest.mark.parametrize("name", ["optimizer.safetensors.bak", "rows.jsonl", "training_args.bin", "notes.txt"])
def test_other_files_are_not_sent(own: RunFolder, name: str) -> None:
    rewrite(own.adapter, name, "{}")
    with pytest.raises(ExportError, match=f"{name}: not a model file"):
        plan_upload(own.adapter, REPO, private=True)


def test_named_chat_templates_are_sent_and_nothing_else_of_a_folder(own: RunFolder) -> None:
    templates = own.adapter / "additional_chat_templates"
    templates.mkdir()
    rewrite(own.adapter, "additional_chat_templates/tool_use.jinja", "{{ messages }}")
    sent = [name for name, _ in plan_upload(own.adapter, REPO, private=True).files]
    assert "additional_chat_templates/tool_use.jinja" in sent
    rewrite(own.adapter, "additional_chat_templates/config.json", "{}")
    with pytest.raises(ExportError, match=r"config\.json: not a model file"):
        plan_upload(own.adapter, REPO, private=True)


@pytest.mark.parametrize(
    "path", ["/home/someone/models/llama", "~/models", "C:\\models\\llama", "file:///data/rows.jsonl"]
)
def test_path_of_a_machine_is_refused_in_config_and_card(own: RunFolder, path: str) -> None:
    config = json.loads((own.adapter / "adapter_config.json").read_text())
    rewrite(own.adapter, "adapter_config.json", json.dumps(config | {"base_model_name_or_path": path}))
    card = (own.adapter / "README.md").read_text()
    rewrite(own.adapter, "README.md", f"{card}\nTrained on {path}.\n")
    with pytest.raises(ExportError) as caught:
        plan_upload(own.adapter, REPO, private=True)
    assert len(caught.value.problems) == 2
    assert all("contains the local path" in problem for problem in caught.value.problems)


def test_secret_in_a_card_is_refused_and_not_repeated(own: RunFolder) -> None:
    secret = "hf_" + "a1" * 17
    rewrite(own.adapter, "README.md", f"token: {secret}\n")
    with pytest.raises(ExportError, match="looks like a Hugging Face token") as caught:
        plan_upload(own.adapter, REPO, private=True)
    assert secret not in str(caught.value)


def test_damage_a_missing_card_and_a_missing_merge_are_refused(
    own: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (own.adapter / "README.md").unlink()
    with pytest.raises(ExportError, match=r"README.md is missing; not sent"):
        plan_upload(own.adapter, REPO, private=True)
    atomic_io.write_manifest(own.adapter, atomic_io.read_metadata(own.adapter))
    with pytest.raises(ExportError, match="not sent without its card"):
        plan_upload(own.adapter, REPO, private=True)
    shutil.rmtree(own.merged)
    assert main(["export", str(own.path), "--push", REPO, "--what", "merged"]) == 2
    assert "make it with: qlora-train merge" in capsys.readouterr().err


@pytest.mark.parametrize("repo", ["sums", "a/b/c", "/tmp/x", "a/b c", "a/b--c"])
def test_name_that_is_no_repository_is_refused(trained: RunFolder, repo: str) -> None:
    with pytest.raises(ExportError, match="give owner/name"):
        plan_upload(trained.adapter, repo, private=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--push", REPO, "--quant", "f16"], "--quant: is for --format; drop it"),
        (["--format", "gguf", "--dry-run"], "--dry-run: needs --push"),
        (["--format", "gguf", "--what", "merged"], "--what: needs --push"),
    ],
)
def test_option_without_effect_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/none", *words]) == 2
    assert capsys.readouterr().err.splitlines() == [said]
