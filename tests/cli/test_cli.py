"""The command line: light commands import no torch, one line per problem, and exit statuses."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from qlora_train.cli import config_commands
from qlora_train.cli.main import main
from qlora_train.config import load_config, preflight
from qlora_train.config.writer import to_yaml
from qlora_train.utils.errors import CheckpointError, ConfigError
from tests.support.runs import make_config, train_run, write_rows

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "files"
CONFIG = ROOT / "configs" / "llama7b.yaml"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "numpy")
LOG = re.compile(
    r":\d+: format \w+$|^device: |^chat template: |^compute dtype: |: has not begun|^held-out |^tokenizer: "
    r"|^data\.\w+: tokenising |^data\.\w+: .*: tokenised before"
)
"""Log lines before an error in settings or data."""
Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("preserve_library_settings")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False
    )


def write_config(folder: Path, base: Path, *overrides: str, name: str = "run") -> Path:
    """Write the resolved config of `make_config`."""
    file = folder / f"{name}-whole.yaml"
    file.write_text(to_yaml(make_config(folder, base, *overrides, name=name)), encoding="utf-8")
    return file


def refused(capsys: Capture, *arguments: str | Path) -> list[str]:
    """Run a command that fails with status 2 before a model is loaded; return its error lines."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    assert "base:" not in output.err
    return [line for line in output.err.splitlines() if not LOG.search(line)]


# --- without torch ----------------------------------------------------------------------------------------------------

LIGHT = """
import sys
from qlora_train.cli.main import main
try:
    status = main({arguments!r})
except SystemExit as exit:
    status = exit.code or 0
print("status", status, "loaded", [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["check", str(CONFIG)],
        ["show", str(CONFIG)],
        ["schema"],
        ["train", "--help"],
        ["data", "--help"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    done = python("-c", LIGHT.format(arguments=arguments, heavy=HEAVY))
    assert done.stderr.splitlines()[-1] == "status 0 loaded []"
    assert done.stdout


def test_help_names_the_exit_statuses(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 done; 2 an error that you can fix; 130, 143, 75 stopped" in text


def test_check_accepts_every_shipped_config(capsys: Capture) -> None:
    files = [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "recipes").glob("*.yaml"))]
    assert len(files) >= 12
    for file in files:
        if file.stem.startswith("demo"):  # whose model and rows `make demo` makes first
            continue
        assert main(["check", str(file)]) == 0
        assert capsys.readouterr() == (f"{file}: ok\n", "")


def test_check_names_everything_that_is_missing(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "train.jsonl").touch()
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{model_name_or_path: {tmp_path}/none, chat_template: llama_3, attn_implementation: flash_attention_2}}\n"
        f"data: {{train: ['{tmp_path}/trian.jsonl', owner/name], eval: '{tmp_path}/*.csv'}}\n"
        f"lora: {{adapter_path: {tmp_path}/adapter}}\nrun: {{report_to: wandb}}\n"
    )
    assert main(["check", str(file)]) == 2
    assert [line.partition("; ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"model.model_name_or_path: {tmp_path}/none does not exist",
        "model.chat_template: 'llama_3' is neither a name nor a file",
        "model.attn_implementation: flash_attention_2 needs the package flash-attn, which is not installed",
        f"lora.adapter_path: {tmp_path}/adapter does not exist",
        f"data.train: {tmp_path}/trian.jsonl does not exist",
        f"data.eval: the pattern {tmp_path}/*.csv matches no file",
        "run.report_to: wandb is not installed",
    ]
    assert main([str(file)]) == 2
    assert "run.report_to: wandb is not installed" in capsys.readouterr().err, (
        "training says all of it before it begins"
    )


def test_show_names_the_source_of_every_value(capsys: Capture) -> None:
    assert main(["show", str(CONFIG), "lora.r=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = {line.split()[0]: line.split("  # ")[-1] for line in lines}
    assert next(line for line in lines if line.startswith("lora.r ")).split()[1] == "7"
    assert values["lora.r"] != values["model.model_name_or_path"] != values["train.adam_beta1"]
    assert re.search(r"llama7b\.yaml:\d+", values["model.model_name_or_path"])


def test_schema_is_json_that_documents_every_setting(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for section in schema["properties"]:
        settings = schema["$defs"][f"{section.capitalize()}Section"]
        assert settings["additionalProperties"] is False
        assert all(setting.get("description") for setting in settings["properties"].values())


# --- the data alone ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_without_weights(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama without weights."""
    base = tmp_path_factory.mktemp("base")
    shutil.copytree(pico_llama, base, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    return base


def token_counts(base: Path, rows: Path) -> list[int]:
    """Return the tokens per row according to Transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    conversations = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    return [len(tokenizer.apply_chat_template(turns)["input_ids"]) for turns in conversations]


def test_data_needs_neither_model_nor_run(base_without_weights: Path, tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, base_without_weights)
    assert main(["data", str(config), f"data.cache_dir={tmp_path / 'cache'}", "--show", "2"]) == 0
    output = capsys.readouterr()
    rows = tmp_path / "rows.jsonl"
    num_rows = len(rows.read_text().splitlines())
    assert f"data.train: {rows}: {num_rows} rows (format messages), 0 dropped" in output.out
    shown = re.findall(r"^row (\d+): (.*):(\d+): (\d+) tokens, \d+ of them with loss$", output.out, re.MULTILINE)
    counts = token_counts(base_without_weights, rows)
    assert [(number, path) for number, path, _, _ in shown] == [("1", str(rows)), ("2", str(rows))]
    assert [int(count) for *_, count in shown] == [counts[int(line) - 1] for _, _, line, _ in shown]
    answers = [json.loads(line)["messages"][-1]["content"] for line in rows.read_text().splitlines()]
    assert re.findall("⟦(.*)⟧", output.out)[:2] == [f"{answers[int(line) - 1]}<|im_end|>" for _, _, line, _ in shown]
    assert not (tmp_path / "run").exists()


def test_data_as_json_counts_every_token(base_without_weights: Path, tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, base_without_weights, f"data.cache_dir={tmp_path / 'cache'}")
    assert main(["data", str(config), "--json", "--show", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    counts = token_counts(base_without_weights, tmp_path / "rows.jsonl")
    parts = report["splits"]
    assert sum(part["num_rows"] for part in parts.values()) == len(counts)
    assert sum(part["num_tokens"] for part in parts.values()) == sum(counts)
    assert max(part["lengths"]["max"] for part in parts.values()) == max(counts)
    assert len(report["first_rows"]) == 3
    for row in report["first_rows"]:
        assert [segment["trained"] for segment in row["segments"]][-2:] == [True, False]
    assert main(["data", str(config), "--json", "--show", "0"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["first_rows"], again["data_fingerprint"]) == ([], report["data_fingerprint"])
    assert [source["cached"] for source in report["sources"] + again["sources"]] == [False, True]


def test_data_and_training_see_the_same_rows(pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, pico_llama, "train.max_steps=1", f"data.cache_dir={tmp_path / 'cache'}")
    assert main(["data", str(config), "--json"]) == 0
    fingerprint = json.loads(capsys.readouterr().out)["data_fingerprint"]
    assert main([str(config)]) == 0
    assert "tokenised before" in (tmp_path / "run" / "run.log").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data_fingerprint"] == fingerprint


def test_data_shows_the_first_rows_of_a_stream(base_without_weights: Path, tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, base_without_weights)
    settings = ["data.streaming=true", "data.eval=null", "train.eval_steps=null"]
    assert main(["data", str(config), *settings, "--json", "--show", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    counts = token_counts(base_without_weights, tmp_path / "rows.jsonl")
    assert report["splits"]["data.train"]["num_tokens"] == sum(counts), "so few rows are all at the beginning"
    assert report["is_streamed"]
    lines = [int(row["where"].rpartition(":")[2]) for row in report["first_rows"]]
    assert [row["num_tokens"] for row in report["first_rows"]] == [counts[line - 1] for line in lines]
    assert len(lines) == 2


@pytest.mark.parametrize("output", ["text", "--json"])
def test_too_many_unusable_rows_are_one_line(output: str, data_config: Path, capsys: Capture) -> None:
    options = ["--json"] if output == "--json" else []
    [line] = refused(capsys, "data", data_config, "data.max_length=8", *options)
    assert re.search(r"^data.train: (\d+) of \1 rows cannot be used, data.max_dropped \(0.01\) allows \d+: \1 x ", line)


def test_data_shows_the_usable_rows_before_it_refuses(
    base_without_weights: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = write_config(tmp_path, base_without_weights)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(['{"messages": [{"role": "user", "content": "a"}]}\n'] * 9)
    assert main(["data", str(config), "--json", "--show", "2"]) == 2
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["sources"][0]["num_dropped"] == 9
    assert len(report["first_rows"]) == 2
    assert re.search(r"9 of \d+ rows cannot be used, data.max_dropped \(0.01\) allows 0: 9 x no assistant", output.err)


PRINT_TEXT = "from qlora_train.cli.output import print_text; print_text({text!r})"


def test_text_that_stdout_cannot_encode_is_escaped() -> None:
    code = PRINT_TEXT.format(text="⟦caf\u00e9⟧ \udcff")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u27e6caf\\xe9\\u27e7 \\udcff\n", b"")


def test_closed_pipe_is_not_an_error() -> None:
    command = f'"{sys.executable}" -c "{PRINT_TEXT.format(text="a")}" | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


SILENT_IMPORTS = """
from qlora_train.cli.libraries import prepare_libraries
prepare_libraries(offline=True)
import qlora_train.pipeline
"""


@pytest.mark.parametrize("code", [SILENT_IMPORTS, "import qlora_train, bitsandbytes"], ids=["command", "library"])
def test_libraries_print_nothing_at_import(code: str) -> None:
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- what the user can fix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--frobnicate"], ["merge"], ["check"], ["eval", "x", "--shots", "three"]])
def test_invalid_command_line_is_one_line(arguments: list[str], capsys: Capture) -> None:
    [line] = refused(capsys, *arguments)
    assert "error:" in line


@pytest.mark.parametrize("word", ["tarin", "configs/none.yaml", "configs"])
def test_unknown_first_word_is_one_line(word: str, capsys: Capture) -> None:
    [line] = refused(capsys, word)
    assert word in line


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["tain", str(CONFIG)], "did you mean train?"),
        (["chekc", str(CONFIG)], "did you mean check?"),
        (["frobnicate", str(CONFIG)], "the commands are "),
    ],
)
def test_misspelt_command_suggests_the_nearest_one(words: list[str], hint: str, capsys: Capture) -> None:
    [line] = refused(capsys, *words)
    assert line.startswith(f"{words[0]}: neither a command nor a config; {hint}")


@pytest.mark.parametrize("words", [[], ["check"], ["plan"]])
def test_data_file_as_config_leads_to_new(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    [line] = refused(capsys, *words, str(rows))
    assert line == f"{rows}: a data file, not a config; write one with: qlora-train new MODEL --data {rows}"


@pytest.mark.parametrize(
    "words",
    [
        ["data", str(CONFIG), "lora.r=0", "--show", "3", "lora.bias=x"],
        ["data", str(CONFIG), "--offline", "lora.r=0", "--show=3", "lora.bias=x"],
        [str(CONFIG), "--resume", "never", "lora.r=0", "lora.bias=x"],
    ],
)
def test_overrides_may_follow_options(words: list[str], capsys: Capture) -> None:
    lines = refused(capsys, *words)
    assert [line.split()[1] for line in lines] == ["lora.r=0:", "lora.bias=x:"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "runs/x", "--limit", "1", "lora.r=8"], "unexpected extra argument"),
        (["data", "x.yaml", "--shw", "3"], "No such option: --shw"),
        (["eval", "runs/x", "--models", "merged,bas"], "allowed: base,adapter,merged"),
        (["export", "runs/x"], "either --format or --push"),
        (["export", "runs/x", "--format", "gguf", "--push", "a/b"], "either --format or --push"),
    ],
)
def test_unknown_argument_is_refused(words: list[str], message: str, capsys: Capture) -> None:
    [line] = refused(capsys, *words)
    assert message in line


def test_malformed_config_has_the_same_errors_in_train_and_check(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DATA / "malformed_configs")
    for name in ("everything_at_once", "latin1", "two_documents", "secret_in_a_value"):
        expected = Path(f"{name}.expected").read_text().splitlines()
        assert refused(capsys, "check", f"{name}.yaml") == expected
        assert refused(capsys, f"{name}.yaml") == expected


@pytest.fixture(scope="module")
def data_config(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("data"), pico_llama, "data.max_length=64")


@pytest.mark.parametrize("name", ["broken_json.jsonl", "empty.jsonl", "missing_column.jsonl", "two_users.jsonl"])
def test_malformed_data_has_the_same_error_in_train_and_data(
    name: str, data_config: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DATA / "malformed")
    settings = data_config, f"data.train={name}", f"run.output_dir={tmp_path / 'run'}"
    [line] = refused(capsys, "data", *settings)
    assert name in line
    assert refused(capsys, *settings) == [line]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.model_name_or_path=./none", "./none does not exist"),
        ("model.model_name_or_path=nobody/none", "is not in the local cache, and offline nothing is fetched"),
        ("data.train=none.jsonl", "none.jsonl"),
        ("data.max_length=100000", "data.max_length: 100000 tokens, but this llama model has 256 positions"),
        ("lora.target_modules=[query_key_value]", "no such layer in a llama model; it has q_proj"),
        ("model.chat_template=llama3", "tokens of this"),
        (
            "model.attn_implementation=flash_attention_2",
            "model.attn_implementation: flash_attention_2 needs the package",
        ),
        ("run.report_to=wandb", "run.report_to: wandb is not installed"),
        ("lora.rank=8", "lora.rank"),
        ("lora.r", "lora.r"),
    ],
)
def test_impossible_setting_is_one_line_before_the_model_loads(
    override: str, message: str, data_config: Path, tmp_path: Path, capsys: Capture
) -> None:
    [line] = refused(capsys, data_config, override, f"run.output_dir={tmp_path / 'run'}")
    assert message in line


@pytest.mark.parametrize("command", ["merge", "eval"])
def test_unfinished_run_is_one_line(command: str, data_config: Path, tmp_path: Path, capsys: Capture) -> None:
    [line] = refused(capsys, command, tmp_path)
    assert "is not a run folder" in line
    refused(capsys, data_config, "data.train=none.jsonl", f"run.output_dir={tmp_path / 'run'}")
    [line] = refused(capsys, command, tmp_path / "run")
    assert "the run has not finished; continue it with: qlora-train" in line


@pytest.mark.parametrize("resume", ["runs/none", "never"])
def test_impossible_resume_is_one_line(resume: str, pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, pico_llama, "train.max_steps=1")
    train_run(tmp_path, pico_llama, "train.max_steps=1")
    capsys.readouterr()
    [line] = refused(capsys, config, "--resume", resume)
    assert line.startswith(f"--resume {resume}") or "--resume never" in line


def test_failed_start_leaves_the_run_folder_usable(pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, pico_llama, "train.max_steps=1")
    refused(capsys, config, "data.train=none.jsonl")
    assert main([str(config), "lora.r=5000"]) == 2
    assert main([str(config), "quantization.min_quantized_share=1.0", "lora.target_modules=[wqkv]"]) == 2
    capsys.readouterr()
    assert main([str(config)]) == 0
    assert capsys.readouterr().out == f"finished: {tmp_path / 'run'}\n"


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_train_merge_and_eval_exit_with_status_0(pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, pico_llama, "train.max_steps=2")
    assert main([str(config), "train.max_steps=1"]) == 0
    first = capsys.readouterr()
    assert first.out == f"finished: {tmp_path / 'run'}\n"
    for line in ("data.train:", "base:", "adapter:", "training: starts", "step 1/1"):
        assert line in first.err
    assert main([str(config), "train.max_steps=1"]) == 0
    assert "has finished already" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "merged" / "config.json").is_file()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--loss-only"]) == 0
    table = capsys.readouterr().out
    assert all(re.search(rf"\b{model}\b", table) for model in ("base", "adapter", "merged"))
    before = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    assert main(["eval", str(tmp_path / "run"), "--models", "adapter", "--max-new-tokens", "4"]) == 0
    assert main(["eval", str(tmp_path / "run"), "--models", "merged", "--max-new-tokens", "4"]) == 0
    table = capsys.readouterr().out
    assert all(re.search(rf"\b{model}\b", table) for model in ("base", "adapter", "merged"))
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert all({"adapter", "merged"} <= line.keys() for line in answers), "the adapter's answers stay"
    after = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    assert after["base"] == before["base"]
    assert after["adapter"]["loss"] == before["adapter"]["loss"]
    assert "exact_match" in after["adapter"]
    assert main(["merge", str(tmp_path / "run"), "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    assert again == {key: after[key] for key in ("num_rows", "base", "adapter")}, "of another merged model"
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert all("adapter" in line and "merged" not in line for line in answers)


def test_output_dir_defaults_to_the_name_of_the_config(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    config = write_config(tmp_path, pico_llama, "train.max_steps=1")
    text = config.read_text()
    (tmp_path / "mine.yaml").write_text(re.sub(r"^  output_dir:.*\n", "", text, flags=re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    assert main(["mine.yaml"]) == 0
    assert capsys.readouterr().out == f"finished: {Path('runs/mine')}\n"


def test_resume_of_a_finished_run_by_name_is_refused_and_deletes_nothing(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=2", "train.save_steps=1")
    with pytest.raises(CheckpointError, match="the run has finished"):
        train_run(tmp_path, pico_llama, "train.max_steps=2", "train.save_steps=1", resume=str(run.checkpoint(1)))
    assert run.checkpoint_steps() == [1, 2]


def test_refused_resume_deletes_no_checkpoint(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=2", "train.save_steps=1")
    shutil.rmtree(run.adapter)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(rows.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(CheckpointError, match="data_fingerprint was"):
        train_run(tmp_path, pico_llama, "train.max_steps=2", "train.save_steps=1", resume=str(run.checkpoint(1)))
    assert run.checkpoint_steps() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "brand_new_type"}, "'brand_new_type' is unknown to the installed Transformers"),
        ({"model_type": "brand_new_type", "auto_map": {"AutoConfig": "own.Own"}}, "runs Python code of its own"),
    ],
)
def test_unknown_model_type_is_one_line(
    change: dict[str, Any], message: str, pico_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico_llama, base)
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, **change}))
    make_config(tmp_path, base)
    rows = write_rows(tmp_path / "own.jsonl")
    settings = [
        f"model.model_name_or_path={base}",
        f"data.train={rows}",
        f"run.output_dir={tmp_path / 'out'}",
        "data.max_length=128",
    ]
    assert main([str(tmp_path / "run.yaml"), *settings]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_eval_of_a_missing_merged_model_keeps_other_results(
    pico_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=1")
    assert main(["eval", str(run.path), "--models", "adapter", "--loss-only"]) == 0
    before = run.read_results()["evaluation"]["adapter"]
    assert main(["eval", str(run.path), "--models", "merged", "--loss-only"]) == 2
    assert "there is no merged model" in capsys.readouterr().err
    assert main(["eval", str(run.path), "--models", "base,merged", "--loss-only"]) == 0
    assert run.read_results()["evaluation"]["adapter"] == before


def test_broken_pipe_inside_a_command_is_a_bug_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_pipe() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(config_commands, "schema", break_pipe)
    with pytest.raises(BrokenPipeError):
        main(["schema"])


@pytest.mark.parametrize("words", [["schema"], ["export", "--help"], ["--help"]])
def test_reader_that_goes_away_is_no_error(words: list[str]) -> None:
    command = (
        f"{shlex.quote(sys.executable)} -m qlora_train.cli.main {shlex.join(words)} | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr == ""
    assert done.returncode in (0, 1), "1: rich's own end of a broken pipe"


def test_missing_file_is_likely_another_of_its_kind(tmp_path: Path) -> None:
    for name in ("herbs.yaml", "herbs.jsonl", "herbs.md"):
        (tmp_path / name).write_text("")
    assert preflight.missing_data(str(tmp_path / "herb.jsonl")) == (
        f"{tmp_path / 'herb.jsonl'} does not exist; did you mean {tmp_path / 'herbs.jsonl'}?"
    )
    with pytest.raises(ConfigError, match=r"did you mean \S+herbs\.yaml\?"):
        load_config(tmp_path / "herb.yaml")
