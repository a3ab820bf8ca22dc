"""Secrets are refused in configs and redacted from messages, logs and files."""

import io
import json
import logging
import random
import re
import shlex
import string
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.cli.main import main
from qlora_train.cli.output import command_text
from qlora_train.config import RunConfig, load_config
from qlora_train.config.schema import Section
from qlora_train.utils.errors import ConfigError
from qlora_train.utils.secrets import FORMATS, HIDDEN, VARIABLES, RedactingFormatter, redact, secret_error
from tests.support.runs import write_rows

Capture = pytest.CaptureFixture[str]
ALNUM = string.ascii_letters + string.digits
GENERATOR = random.Random(1)
SMALLEST: dict[str, Any] = {"model": {"model_name_or_path": "some/model"}, "data": {"train": "rows.jsonl"}}


def random_text(count: int, alphabet: str = ALNUM) -> str:
    return "".join(GENERATOR.choices(alphabet, k=count))


CANARIES = {
    "hf": f"hf_{random_text(34)}",
    "wandb": f"wandb_v1_{random_text(77, ALNUM + '_')}",
    "sk": f"sk-{random_text(48)}",
    "sk-proj": f"sk-proj-{random_text(120, ALNUM + '-_')}",
    "sk-ant": f"sk-ant-api03-{random_text(93, ALNUM + '-_')}AA",
    "sk-or": f"sk-or-v1-{random_text(64, '0123456789abcdef')}",
    "ghp": f"ghp_{random_text(36)}",
    "gho": f"gho_{random_text(36)}",
    "github_pat": f"github_pat_{random_text(22)}_{random_text(59)}",
    "glpat": f"glpat-{random_text(20)}",
    "aws": f"AKIA{random_text(16, string.ascii_uppercase + string.digits)}",
    "google": f"AIza{random_text(35)}",
    "slack": f"xoxb-{random_text(12, string.digits)}-{random_text(13, string.digits)}-{random_text(24)}",
    "jwt": f"eyJ{random_text(30)}.eyJ{random_text(40)}.{random_text(43)}",
    "url": f"https://me:{random_text(20)}@example.org/rows.jsonl",
}
"""One random secret in each provider's format."""
INNOCENT = (
    "data/sk-learn.jsonl", "hf_data/x.jsonl", "hf_datasets_of_the_year_2024_cleaned/train.jsonl", "task-1234/rows.jsonl",
    "sk-proj-alpha/rows.jsonl", "glpat-notes.txt", "xoxo-letters.csv", "eyJ.jsonl", "eyJson.reader.rows", "AKIA.csv",
    "my-org/AIza-7b", "https://example.org/rows.jsonl", "https://example.org:8080/a@b", "file:///data/rows.jsonl",
    "git@github.com:owner/name", "meta-llama/Llama-2-7b-hf", "0123456789abcdef0123456789abcdef01234567",
    "runs/2026-01-01T10:00:00@night", r"model\.layers\.(\d+)\.(self_attn|mlp)\.(q|k|v|o|up|down|gate)_proj",
    "TheBloke/Llama-2-13B-chat-GPTQ", "<|im_start|>", "wandb_v1_project", "github_patches/rows.jsonl", "ghp_rows.jsonl",
)  # fmt: skip


def parts(secret: str) -> set[str]:
    """Return every piece of 12 characters of a secret, without a URL's host."""
    hidden = re.sub(r"^https://me:|@example.*$", "", secret)
    return {hidden[begin : begin + 12] for begin in range(len(hidden) - 11)}


def seen_of(secret: str, text: str) -> list[str]:
    return [part for part in parts(secret) if part in text]


# --- what is one -------------------------------------------------------------------------------------------------------


def test_secret_in_any_context_is_found_and_redacted() -> None:
    for name, canary in CANARIES.items():
        for context in ("{}", "data/{}/rows.jsonl", "token={}", "'{}'", "a {} b", "x?key={}&y=1"):
            text = context.format(canary)
            message = secret_error(text)
            assert message is not None, (name, context)
            assert "set " in message, (name, context)
            assert seen_of(canary, message + redact(text)) == [], (name, context)
            assert HIDDEN in redact(text), (name, context)


def test_names_that_resemble_secrets_are_accepted() -> None:
    assert [text for text in INNOCENT if secret_error(text) is not None or redact(text) != text] == []


def test_every_format_has_a_canary() -> None:
    for name, (pattern, _) in FORMATS.items():
        assert any(re.search(pattern, canary) for canary in CANARIES.values()), name


@given(st.lists(st.sampled_from([*CANARIES.values(), "eyJ", "sk-proj-", "://", ":", "@", "-", "\n", "a"]), max_size=30))
def test_redacted_text_holds_no_secret(pieces: list[str]) -> None:
    assert secret_error(redact("".join(pieces))) is None


def test_value_of_a_variable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secret_error("runs/correct horse") is None
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    assert "holds the value of MLFLOW_TRACKING_PASSWORD" in str(secret_error("runs/correct horse"))
    assert redact("password correct horse!") == f"password {HIDDEN}!"


def test_empty_or_short_variable_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HF_TOKEN", " a ")
    assert redact("a plain text") == "a plain text"
    assert secret_error("a plain text") is None


# --- in a config -------------------------------------------------------------------------------------------------------


def planted(kind: Any, secret: str) -> Iterator[Any]:
    """Yield values for a field of this type with a secret: as the whole value, and at every position inside."""
    yield secret
    if isinstance(kind, type) and issubclass(kind, Section):
        yield {secret: 1}
        for key, spec in kind.model_fields.items():
            for value in planted(spec.annotation, secret):
                yield {key: value}
    elif get_origin(kind) is tuple:
        for value in planted(get_args(kind)[0], secret):
            yield [value]
    elif get_origin(kind) is dict:
        yield {secret: "x"}
        yield {"x": secret}
    elif get_origin(kind) in (Annotated, UnionType) or type(None) in get_args(kind) or get_origin(kind) is not None:
        for inner in get_args(kind):
            if isinstance(inner, type) or get_origin(inner) is not None:
                yield from planted(inner, secret)


def with_value(section: str, key: str, value: Any) -> dict[str, Any]:
    return {**SMALLEST, section: {**SMALLEST.get(section, {}), key: value}}


FIELDS = [
    (section, key, value)
    for section, spec in RunConfig.model_fields.items()
    for key, field in spec.annotation.model_fields.items()
    for value in {json.dumps(value): value for value in planted(field.annotation, CANARIES["hf"])}.values()
]
"""Every field of the schema with a secret at every position inside."""


def test_planted_fields_include_sources_and_mappings() -> None:
    values = [json.dumps(value).replace(CANARIES["hf"], "S") for _, key, value in FIELDS if key in ("train", "columns")]
    assert {'"S"', '[{"path": "S"}]', '[{"columns": {"S": "x"}}]', '[{"columns": {"x": "S"}}]', '{"S": "x"}'} <= {
        *values
    }
    assert len(FIELDS) > 80


def test_secret_in_any_field_is_refused_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("run.yaml")
    for index, (section, key, value) in enumerate(FIELDS):
        file.write_text(json.dumps(with_value(section, key, value), indent=1), encoding="utf-8")
        for command in ("check", "show", "train", "data") if index % 40 == 0 else ("check",):
            assert main([command, "run.yaml"]) == 2
            output = capsys.readouterr()
            assert output.out == ""
            assert re.fullmatch(
                rf"run\.yaml:\d+: {section}\.{key}\b.*: (a key )?looks like a Hugging .*HF_TOKEN\n", output.err
            ), value
            assert seen_of(CANARIES["hf"], output.err) == []
        file.write_text(json.dumps(SMALLEST), encoding="utf-8")
        assert main(["check", "run.yaml", f"{section}.{key}={json.dumps(value)}"]) == 2
        output = capsys.readouterr()
        assert re.fullmatch(rf"override {section}\.{key}: looks like a Hugging Face token .*HF_TOKEN\n", output.err)
        assert seen_of(CANARIES["hf"], output.out + output.err) == []
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


CONFIGS = (
    "{}", "- {}", "{}: 1", "model: {}", "{}: [", "a: {} b: c", "model: &{} x", "model: *{}", "model: !{} x",
    "model:\n  {}: 1", "model:\n  ? [{}]\n  : 1", "a: 1\na: {}", "{}: 1\n{}: 2", "model: '{}", "model: \t{}\n\tx",
    "model:\n  model_name_or_path: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx {}", "train: {{optim: {}, learning_rate: [{}]}}",
)  # fmt: skip


@pytest.mark.parametrize("name", CANARIES)
def test_no_message_about_a_config_repeats_a_secret(name: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "run.yaml"
    for text in CONFIGS:
        file.write_text(text.format(*[CANARIES[name]] * text.count("{}")), encoding="utf-8")
        assert main(["check", str(file)]) == 2, text
        output = capsys.readouterr()
        assert output.err, text
        assert seen_of(CANARIES[name], output.out + output.err) == [], text
        with pytest.raises(ConfigError) as refused:
            load_config(file)
        assert seen_of(CANARIES[name], str(refused.value)) == [], text


COMMAND_LINES = (
    "check {}", "check {}.yaml", "train run.yaml --{}", "eval {}", "eval x --shots {}", "check run.yaml {}",
    "check run.yaml {}=1", "check run.yaml train.{}=1", "merge {} export.merge=true", "train run.yaml --resume {}", "{}",
)  # fmt: skip


@pytest.mark.parametrize("name", CANARIES)
def test_no_message_about_a_command_line_repeats_a_secret(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(json.dumps({**SMALLEST, "model": {"model_name_or_path": "./none"}}), encoding="utf-8")
    for line in COMMAND_LINES:
        assert main(line.format(CANARIES[name]).split(" ")) == 2, line
        output = capsys.readouterr()
        assert seen_of(CANARIES[name], output.out + output.err) == [], line


def test_value_of_the_environment_is_refused_in_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    key = random_text(40, "0123456789abcdef")  # looks like a commit
    monkeypatch.setenv("WANDB_API_KEY", key)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(with_value("model", "revision", key), indent=1), encoding="utf-8")
    assert main(["check", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{file}:4: model.revision: holds the value of WANDB_API_KEY; ")
    assert seen_of(key, message) == []


# --- in a log and a run ------------------------------------------------------------------------------------------------


def test_log_redacts_arguments_and_tracebacks() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logger = logging.Logger("of this test")
    logger.addHandler(handler)
    try:
        int(CANARIES["jwt"])
    except ValueError:
        logger.exception("at %s with %s", CANARIES["url"], CANARIES["hf"])
    text = stream.getvalue()
    assert text.count(HIDDEN) == 3
    assert "Traceback" in text
    assert [part for name in ("jwt", "url", "hf") for part in seen_of(CANARIES[name], text)] == []


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and text.encode() in path.read_bytes()]


def test_run_logs_and_writes_no_secret_of_the_environment(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    canaries = {name: f"canary {index} {random_text(24)}" for index, name in enumerate(VARIABLES)}
    for name, canary in canaries.items():
        monkeypatch.setenv(name, canary)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "rows.jsonl")
    config = {
        "model": {"model_name_or_path": str(pico_llama)},
        "data": {"train": str(rows), "eval": 0.25, "max_length": 128},
        "train": {"max_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 1},
        "run": {"output_dir": str(tmp_path / "run")},
        "export": {"merge": True, "max_loss_increase": 1.0},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    assert main([str(file)]) == 0
    assert main(["eval", str(tmp_path / "run"), "--loss-only"]) == 0
    output = capfd.readouterr()
    written = {path.relative_to(tmp_path).parts[0] for path in files_with(tmp_path, "")}
    assert {"run", "cache"} <= written
    assert files_with(tmp_path, rows.name)  # the search works
    for name, canary in canaries.items():
        assert files_with(tmp_path, canary.split()[-1]) == [], name
        assert canary.split()[-1] not in output.out + output.err, name


def test_quotes_of_a_shell_hide_no_secret_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "it's a $ecret"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
    command = command_text(["run.yaml", f"run.output_dir={secret}", "data.train=two words.jsonl"])
    assert shlex.split(command) == ["qlora-train", "run.yaml", f"run.output_dir={HIDDEN}", "data.train=two words.jsonl"]
