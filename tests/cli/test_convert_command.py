"""`qlora-train convert` on the command line: files, exit status, secrets, hostile text, and no torch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_train.cli.convert_command import TRAINERS
from qlora_train.cli.main import main
from qlora_train.config import load_config
from qlora_train.config.other_trainers.all_trainers import OTHER_TRAINERS
from qlora_train.data.formats import FORMATS
from qlora_train.data.types import Record

FILES = Path(__file__).parents[1] / "files" / "other_trainers"
SMALL = "base_model: some/model\nadapter: qlora\nload_in_4bit: true\ndatasets: [{path: rows.jsonl, type: alpaca}]\n"


@pytest.fixture
def theirs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("theirs.yaml")
    path.write_text(SMALL, encoding="utf-8")
    return path


def test_output_is_written_with_the_list_on_standard_output(theirs, capsys) -> None:
    theirs.write_text(SMALL + "deepspeed: zero2.json\nlora_r: 4\n")
    assert main(["convert", str(theirs), "-o", "ours.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "theirs.yaml: a config of Axolotl; " in shown
    assert "Not carried over (1):\n  deepspeed: zero2.json; DeepSpeed is not used" in shown
    assert "Next: qlora-train check ours.yaml" in shown
    assert load_config("ours.yaml").lora.r == 4


def test_without_output_the_config_alone_is_on_standard_output(theirs, capsys) -> None:
    assert main(["convert", str(theirs)]) == 0
    shown = capsys.readouterr()
    Path("ours.yaml").write_text(shown.out)
    assert load_config("ours.yaml").model.model_name_or_path == "some/model"
    assert "a config of Axolotl" in shown.err


def test_defaults_of_the_other_trainer_are_printed(capsys) -> None:
    assert main(["convert", str(FILES / "unsloth" / "train_command.sh")]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Unsloth's defaults")]
    assert line.startswith("Unsloth's defaults, written down: ")
    assert "data.train_on: all, data.overflow: truncate" in line


@pytest.mark.parametrize("name", ["unsloth/Llama-3-8B-bnb-4bit", "unsloth/Llama-3-8B-unsloth-bnb-4bit"])
def test_base_that_is_stored_in_4_bits_is_mentioned_with_the_16_bit_one(theirs, name: str, capsys) -> None:
    theirs.write_text(SMALL.replace("some/model", name))
    assert main(["convert", str(theirs)]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  base_model: ")]
    assert line.endswith("from the 16-bit base, unsloth/Llama-3-8B")


def test_an_existing_file_is_not_replaced(theirs, capsys) -> None:
    Path("ours.yaml").write_text("mine\n")
    assert main(["convert", str(theirs), "-o", "ours.yaml"]) == 2
    assert capsys.readouterr().err == "ours.yaml: exists; give -o another name, or delete it\n"
    assert Path("ours.yaml").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (SMALL, ["--from", "axolotol"], "--from axolotol: not a known trainer; allowed: "),
        (SMALL, ["--from", "axolotol"], "did you mean axolotl?"),
        ("some_key: 1\n", [], "has keys of no known trainer (axolotl, "),
        ("learning_rate: 1e-4\n", [], "may be of axolotl or llamafactory or trl or unsloth or ms-swift; name the trainer"),
        ("- a\n- b\n", [], "theirs.yaml: not a mapping of settings; give a trainer's YAML file"),
        ("model: {model_name_or_path: a/b}\ndata: {train: x.jsonl}\n", [], "a config of qlora-train already"),
        ("base_model: a\nbase_model: b\n", [], "theirs.yaml:2: base_model: given a second time"),
        ("a: &x 1\nb: *x\n", [], "theirs.yaml:1: a: anchor &x is not allowed"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_one_line(theirs, capsys, text, arguments, message) -> None:
    theirs.write_text(text)
    assert main(["convert", str(theirs), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_one_line(theirs, capsys) -> None:
    assert main(["convert", "their.yaml"]) == 2
    assert capsys.readouterr().err == "their.yaml: no such file; did you mean theirs.yaml?\n"


def test_an_incomplete_config_is_written_and_names_what_is_missing(theirs, capsys) -> None:
    theirs.write_text("adapter: lora\nmicro_batch_size: 2\nsequence_len: 512\n")
    assert main(["convert", str(theirs), "-o", "ours.yaml"]) == 2
    shown = capsys.readouterr().out
    assert "ours.yaml: not complete: model: missing" in shown
    assert "ours.yaml: not complete: data.train: missing" in shown
    assert "per_device_train_batch_size: 2  # axolotl: micro_batch_size" in Path("ours.yaml").read_text()


def test_secrets_are_neither_printed_nor_written(theirs, capsys) -> None:
    token = "hf_" + "x" * 36
    theirs.write_text(
        SMALL + f"hub_token: {token}\nwandb_name: {token}\nswanlab_api_key: 12345678\ncomet_api_key: 87654321\n"
    )
    assert main(["convert", str(theirs), "-o", "ours.yaml"]) == 0
    everything = capsys.readouterr().out + Path("ours.yaml").read_text()
    assert token not in everything
    assert "87654321" not in everything
    assert "comet_api_key: [secret]" in everything


def test_hostile_keys_and_values_stay_comments_on_one_line(theirs, capsys) -> None:
    theirs.write_text(
        SMALL
        + json.dumps({"a\nmodel: {x: 1}": "b\nlora:\n  r: 1", "\x1b[31mred": "\x1b[2J\u202e"}, ensure_ascii=False)[
            1:-1
        ].replace(', "', '\n"')
        + "\n"
    )
    assert main(["convert", str(theirs), "-o", "ours.yaml"]) == 0
    written = Path("ours.yaml").read_text()
    assert not set("\x1b\u202e") & set(written + capsys.readouterr().out)
    assert load_config("ours.yaml").lora.r == 16


def texts_of(value: object) -> Iterator[str]:
    """Yield what a row says, without its names of roles and its topic."""
    if isinstance(value, dict):
        yield from (
            text for key, item in value.items() if key not in ("role", "from", "about") for text in texts_of(item)
        )
    elif isinstance(value, list):
        yield from (text for item in value for text in texts_of(item))
    else:
        yield str(value)


def test_rows_are_read_with_the_converted_format_and_columns(monkeypatch, tmp_path) -> None:
    """The format and columns of every local source read the file that the other trainer's config names."""
    monkeypatch.chdir(FILES)
    checked = set()
    for trainer in OTHER_TRAINERS:
        for path in sorted(Path(trainer).iterdir()):
            output = tmp_path / f"{trainer}-{path.stem}.yaml"
            assert main(["convert", str(path), "-o", str(output)]) == 0
            data = load_config(output).data
            for source in [*data.train, *(data.eval if isinstance(data.eval, tuple) else ())]:
                form = source.format or data.format
                if Path(source.path).is_file() and form != "auto":
                    text = Path(source.path).read_text(encoding="utf-8")
                    row = json.loads(text)[0] if text.startswith("[") else json.loads(text.splitlines()[0])
                    columns = source.columns if source.columns is not None else data.columns
                    assert FORMATS[form].fits(Record(source.path, row), columns), (path, source)
                    in_file = FORMATS[form].file_columns(columns)
                    values = {ours: row[theirs] for ours, theirs in in_file.items() if theirs in row}
                    read = FORMATS[form].reader()(source.path, values)
                    text = f"{read.text}{read.messages}{read.rejected}{read.desirable}"
                    assert all(words in text for words in texts_of(row)), (path, source)
                    checked.add((trainer, form))
    assert len(checked) > 12
    assert {form for _, form in checked} >= {"alpaca", "messages", "conversations", "preference", "text"}


def test_help_and_conversion_import_no_torch(theirs) -> None:
    for arguments in (["convert", "--help"], ["convert", str(theirs)]):
        code = (
            "import sys; from qlora_train.cli.main import main; status = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(status)"
        )
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_names_all_trainers() -> None:
    assert ", ".join(OTHER_TRAINERS) == TRAINERS


@pytest.mark.parametrize(
    ("option", "setting"),
    [("--learning_rate", "train.learning_rate"), ("--micro-batch-size=4", "train.per_device_train_batch_size"),
     ("--lora_r", "lora.r")],
)  # fmt: skip
def test_a_setting_as_an_option_names_the_override(option, setting, capsys) -> None:
    assert main(["check", "my.yaml", option]) == 2
    assert capsys.readouterr().err.endswith(
        f"; settings are overrides without dashes, section.key=value: here it is {setting}\n"
    )


def test_an_unclosed_quote_and_two_commands_are_refused(tmp_path, capsys) -> None:
    script = tmp_path / "run.sh"
    script.write_text("swift sft --model 'a/b\n")
    assert main(["convert", str(script)]) == 2
    assert "a quote is not closed, in: swift sft --model 'a/b; close it" in capsys.readouterr().err
    script.write_text("swift sft --model a\nswift sft --model b\n")
    assert main(["convert", str(script)]) == 2
    assert "run.sh: 2 commands of a trainer; allowed: one, of axolotl, " in capsys.readouterr().err


def test_quoted_text_over_several_lines_is_one_value(tmp_path, capsys) -> None:
    script = tmp_path / "run.sh"
    script.write_text("swift sft --model a/b --use_hf true --system 'two\nlines' --dataset rows.jsonl\n")
    assert main(["convert", str(script)]) == 0
    shown = capsys.readouterr().out
    assert "# Not carried over:\n#   system:" in shown
    assert "path: rows.jsonl  # ms-swift: dataset" in shown


def test_a_value_that_our_schema_refuses_is_listed_with_the_reason(theirs, capsys) -> None:
    theirs.write_text(
        SMALL + "learning_rate: 7\nsample_packing: true\ngroup_by_length: true\nload_best_model_at_end: true\n"
    )
    assert main(["convert", str(theirs), "-o", "ours.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 7; train.learning_rate: out of range (found 7); allowed: a number > 0 and <= 1" in shown
    assert "group_by_length: true; train.group_by_length: has no effect with data.packing: true" in shown
    assert "load_best_model_at_end: true; train.load_best_model_at_end: needs held-out rows" in shown
    config = load_config("ours.yaml")
    assert (config.train.learning_rate, config.data.packing, config.train.group_by_length) == (2e-4, True, False)


@pytest.mark.parametrize(
    "command",
    ["axolotl train theirs.yaml --lora-r 4", "accelerate launch -m axolotl.cli.train theirs.yaml --lora-r 4",
     "axolotl train missing.yaml --base-model some/model --lora-r 4"],
)  # fmt: skip
def test_options_of_a_command_win_over_its_config_file(theirs, capsys, command) -> None:
    theirs.write_text(SMALL + "lora_r: 64\nmicro_batch_size: 3\n")
    Path("run.sh").write_text(command + "\n")
    status = main(["convert", "run.sh", "-o", "ours.yaml"])
    shown = capsys.readouterr().out
    if "missing" in command:
        assert status == 2
        assert "missing.yaml: true; not a key of Axolotl" in shown
    else:
        assert status == 0
        config = load_config("ours.yaml")
        assert (config.lora.r, config.train.per_device_train_batch_size) == (4, 3)
