"""New configs: complete, commented, deterministic; every recipe's example rows fit into what is chosen for them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_train.authoring import new_config
from qlora_train.authoring.choices import EPOCHS, EVAL_SHARES, MICRO_BATCH_TOKENS, STEP_ROWS, round_up
from qlora_train.authoring.new_config import write_new_config
from qlora_train.authoring.recipe_files import EXAMPLES, example_file, read_recipe, recipe_names
from qlora_train.config import RunConfig, load_config
from qlora_train.config.objectives import dataset_type_of
from qlora_train.data import prepare_data
from qlora_train.utils.errors import ConfigError, DataError, UserError
from tests.support.gguf_files import write_gguf
from tests.support.pico import build_tokenizer

LOCAL_RECIPES = [name for name in recipe_names() if read_recipe(name).settings["data.train"].value.__class__ is str]
MODEL = "Qwen/Qwen2.5-7B-Instruct"
"""Of the shipped table: planned without a network."""
PAIR = {"prompt": "What?", "chosen": "So.", "rejected": "No."}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File names and run folders are relative."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(pico: Callable[..., Path]) -> Path:
    return pico(max_position_embeddings=4096)


def write_jsonl(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def new(
    model: Path | str, *, data: str | None = None, recipe: str | None = None, output: str = "new.yaml"
) -> RunConfig:
    """Write a config and load it."""
    write_new_config(str(model), data=data, recipe=recipe, output=Path(output))
    return load_config(output)


def chat(*contents: str, **columns: Any) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": turns, **columns}


@pytest.mark.parametrize("recipe", LOCAL_RECIPES)
def test_example_rows_of_every_recipe_fit_into_its_new_config(recipe: str, base: Path) -> None:
    config = new(base, recipe=recipe)
    tokenizer = build_tokenizer()
    if recipe in ("tool_calling", "reasoning"):
        tokenizer.chat_template = (Path(__file__).parents[1] / "files/chat_templates/tools.jinja").read_text("utf-8")
    tokenizer.add_tokens(list(config.model.new_tokens))
    prepared = prepare_data(config.data, tokenizer, seed=42, dataset_type=dataset_type_of(config.train.objective))
    assert prepared.report.sources[0].summary.dropped.counts == {}
    assert len(prepared.eval) > 0
    assert config.data.max_length <= round_up(4096)


@pytest.mark.parametrize("recipe", LOCAL_RECIPES)
def test_every_setting_stands_below_its_description(recipe: str, base: Path) -> None:
    new(base, recipe=recipe)
    lines, section = Path("new.yaml").read_text(encoding="utf-8").splitlines(), ""
    keys = 0
    for number, line in enumerate(lines):
        assert len(line) <= 120 or "  # " not in line
        section = line.rstrip(":") if re.fullmatch(r"\w+:", line) else section
        if match := re.match(r"  (\w+): ", line):
            above = [comment for comment in lines[:number][::-1] if comment.startswith("  #")]
            described = RunConfig.model_fields[section].annotation.model_fields[match[1]].description  # type: ignore[union-attr]
            assert any(described.startswith(comment.removeprefix("  # ")[:20]) for comment in above[:5])
            keys += 1
    assert keys >= 15


def test_the_same_base_and_data_give_the_same_text(base: Path) -> None:
    texts = []
    for name in ("first-file", "other-file"):
        new(base, recipe="chat", output=f"{name}.yaml")
        texts.append(Path(f"{name}.yaml").read_text(encoding="utf-8").replace(name, "NAME"))
    assert texts[0] == texts[1]


def test_an_existing_file_is_not_overwritten(base: Path) -> None:
    Path("new.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"new\.yaml exists and is not overwritten"):
        new(base, recipe="chat")
    assert Path("new.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("row", "recipe"),
    [
        (chat("a", "b"), "chat"),
        (chat("a", "b", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]), "tool_calling"),
        (chat("a", "<think>b</think>c"), "reasoning"),
        ({"instruction": "a", "output": "b"}, "instruction"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"text": "a"}, "continued_pretraining"),
        (PAIR, "dpo"),
        ({**chat("a", "b"), "label": False}, "kto"),
        ({"prompt": chat("a")["messages"], "completion": chat("", "b")["messages"][1:], "kto_tag": True}, "kto"),
    ],
)
def test_the_recipe_is_the_one_for_the_rows(row: dict[str, Any], recipe: str, base: Path) -> None:
    first = write_new_config(str(base), data=write_jsonl("rows.jsonl", [row]), recipe=None, output=Path("new.yaml"))[0]
    assert first.startswith(f"wrote     new.yaml (recipe {recipe}: ")


def test_columns_of_other_names_are_renamed(base: Path) -> None:
    dolly = {"instruction": "Say it", "context": "In full", "response": "It", "category": "x"}
    config = new(base, data=write_jsonl("rows.jsonl", [dolly] * 30))
    assert config.data.columns == {"output": "response", "input": "context"}
    pairs = new(
        base,
        data=write_jsonl("pairs.jsonl", [{"instruction": "What?", "chosen": "So.", "rejected": "No."}]),
        output="b.yaml",
    )
    assert (pairs.train.objective, pairs.data.columns) == ("dpo", {"question": "instruction"})


def test_pairs_have_a_second_recipe_without_a_reference_model(base: Path) -> None:
    pairs = write_jsonl("pairs.jsonl", [PAIR] * 30)
    first = write_new_config(str(base), data=pairs, recipe=None, output=Path("new.yaml"))[0]
    assert "recipe dpo" in first
    assert "orpo is for a base that was not fine-tuned on such rows" in first
    assert new(base, recipe="orpo", data=pairs, output="b.yaml").train.objective == "orpo"


def test_pairs_of_sharegpt_are_trained_as_pairs(base: Path) -> None:
    answers = {name: {"from": "gpt", "value": text} for name, text in (("chosen", "So."), ("rejected", "No."))}
    row = {"conversations": [{"from": "human", "value": "What?"}], **answers}
    config = new(base, data=write_jsonl("pairs.jsonl", [row] * 30))
    assert (config.train.objective, config.data.columns) == ("dpo", {"prompt": "conversations"})


def test_max_length_holds_99_of_100_rows(base: Path) -> None:
    rows = [chat("hi", "x" * 400)] * 99 + [chat("hi", "x " * 5000)]
    config = new(base, data=write_jsonl("rows.jsonl", rows))
    tokens = len(build_tokenizer()("x" * 400)["input_ids"])
    assert tokens < config.data.max_length <= 2 * tokens
    assert config.data.max_dropped == 0.05


def test_max_length_ends_at_the_positions_of_the_base(base: Path) -> None:
    rows = [chat("hi", "0123456789" * 900)] * 20
    assert new(base, data=write_jsonl("rows.jsonl", rows)).data.max_length == 4096
    longer = new(base, data="rows.jsonl", recipe="long_context", output="long.yaml")
    assert longer.data.max_length > 4096
    assert longer.model.rope_scaling == {"rope_type": "linear", "factor": -(-longer.data.max_length // 4096)}


def test_batches_and_rates_follow_the_size_of_the_base() -> None:
    rows = write_jsonl("rows.jsonl", [chat("hi", "x" * 5900)] * 2000)
    found = {}
    for model in ("Qwen/Qwen2.5-1.5B-Instruct", MODEL, "meta-llama/Llama-2-70b-hf"):
        config = new(model, data=rows, output=f"{model.partition('/')[2]}.yaml")
        train = config.train
        found[model] = (train.per_device_train_batch_size, train.learning_rate)
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 16
        assert config.data.max_length == 2048
    assert list(found.values()) == [(8, 2e-4), (4, 1e-4), (1, 1e-4)]


def test_micro_batch_fits_into_the_memory_that_is_given() -> None:
    rows = write_jsonl("rows.jsonl", [chat("hi", "x" * 5900)] * 2000)
    found = []
    for memory in ("8GiB", "24GiB"):
        name = f"{memory}.yaml"
        lines = write_new_config("meta-llama/Llama-2-7b-hf", data=rows, recipe=None, output=Path(name), memory=memory)
        train = load_config(name).train
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 16
        assert any(line.startswith("fits ") for line in lines)
        found.append(train.per_device_train_batch_size)
    assert found == [2, 4]
    assert "the most that the plan fits into a GPU of 8GiB" in Path("8GiB.yaml").read_text()


def test_tables_by_number_of_rows_reach_every_size() -> None:
    for table in (STEP_ROWS, EPOCHS, EVAL_SHARES):
        limits = [limit for limit, _ in table]
        assert limits == sorted(limits)
        assert limits[-1] == float("inf")


def test_a_base_without_a_template_gets_the_one_of_its_tokens(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors" and file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    config_file = bare / "tokenizer_config.json"
    content = json.loads(config_file.read_text())
    content.pop("chat_template", None)
    config_file.write_text(json.dumps(content))
    assert new(bare, recipe="chat").model.chat_template == "chatml"
    assert new(base, recipe="chat", output="own.yaml").model.chat_template is None
    assert new(bare, recipe="completion", output="plain.yaml").model.chat_template is None


def test_a_gguf_file_is_a_base(base: Path, tmp_path: Path) -> None:
    file = write_gguf(base, tmp_path / "pico.gguf")
    config = new(file, recipe="chat")
    assert config.model.model_name_or_path == str(file)
    assert "estimated from characters" in Path("new.yaml").read_text()
    long_rows = write_jsonl("rows.jsonl", [chat("hi", "0123456789" * 2000)])
    assert new(file, data=long_rows, output="long.yaml").data.max_length == 4096  # of the header


def test_values_and_comments_of_hostile_data_stay_values_and_comments(base: Path) -> None:
    name = "rows: 1 # x\x1b[31m\u202ey\u2028z: 1 \U000e0041.jsonl"
    rows = [{"instruction": "a", "context # :\t": "", "response": "b"}] * 30
    config = new(base, data=write_jsonl(name, rows))
    text = Path("new.yaml").read_text(encoding="utf-8")
    assert config.data.train[0].path == name
    assert not set("\x1b\u202e\u2028\U000e0041") & set(text)
    assert yaml.safe_load(text).keys() == {"model", "lora", "data", "train", "run", "export"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "chatt"}, r"--recipe chatt: no such recipe; did you mean chat\?"),
        ({"data": "absent.jsonl"}, r"--data: absent\.jsonl does not exist"),
        ({"data": "https://example.org/a.jsonl"}, r"--data: a URL"),
        ({"data": "rows.jsonl", "recipe": "dpo"}, r"dpo does not train on the format messages; use --recipe chat"),
        ({"data": "strange.jsonl"}, r"strange\.jsonl:1: found the columns a, b; expected messages"),
        (
            {"data": "unusable.jsonl"},
            r"none of 2 rows of unusable\.jsonl can be used: 2 x no .* \(unusable\.jsonl:1, ",
        ),
        ({"data": "hf_" + "a" * 34 + ".jsonl"}, r"new: looks like a Hugging Face token"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(
    arguments: dict[str, Any], message: str, base: Path
) -> None:
    write_jsonl("rows.jsonl", [chat("a", "b")])
    write_jsonl("strange.jsonl", [{"a": 1, "b": 2}])
    write_jsonl("unusable.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 2)
    with pytest.raises((ConfigError, DataError, UserError), match=message):
        new(base, **arguments)
    assert not Path("new.yaml").exists()


def test_unusable_rows_are_counted_in_the_answer(base: Path) -> None:
    rows = [chat("a", "b")] * 19 + [chat("a", " ")]
    lines = write_new_config(str(base), data=write_jsonl("rows.jsonl", rows), recipe=None, output=None)
    assert lines[1] == "warning   1 of 20 rows cannot be used: 1 x empty assistant turn (rows.jsonl:20)"
    assert lines[2].split(":")[0].strip() == "a run will stop"
    assert any(line.startswith("steps ") for line in lines)


@pytest.mark.parametrize(("num_unusable", "num_rows"), [(3, 40), (1, 20), (1, 100), (2, 100), (7, 11)])
def test_new_says_what_a_run_does_with_unusable_rows(num_unusable: int, num_rows: int, base: Path) -> None:
    rows = [chat("a", " " if number < num_unusable else f"b{number}") for number in range(num_rows)]
    data = write_jsonl("rows.jsonl", rows)
    lines = write_new_config(str(base), data=data, recipe=None, output=Path("new.yaml"))
    line = next(line for line in lines if "data.max_dropped" in line)
    config = load_config("new.yaml")
    tokenizer = build_tokenizer()
    if "a run drops them" in line:
        prepare_data(config.data, tokenizer, seed=42)
        return
    assert "a run will stop" in line
    with pytest.raises(DataError, match=r"data\.max_dropped"):
        prepare_data(config.data, tokenizer, seed=42)
    advised = config.data.model_copy(update={"max_dropped": float(line.rpartition(" ")[2])})
    prepare_data(advised, tokenizer, seed=42)


def test_run_folder_of_an_earlier_run_is_not_taken(base: Path) -> None:
    Path("runs/new").mkdir(parents=True)
    assert new(base, recipe="chat").run.output_dir == "runs/new-2"


def test_example_rows_are_those_of_the_repository() -> None:
    for recipe in LOCAL_RECIPES:
        train = read_recipe(recipe).settings["data.train"].value
        assert train.startswith(EXAMPLES)
        assert example_file(train).read_bytes() == (Path(__file__).parents[2] / train).read_bytes()


def test_every_recipe_has_a_purpose_of_its_own() -> None:
    lines = new_config.recipe_lines()
    assert len(lines) == len({line.split("  ", 1)[1].strip() for line in lines}) == len(recipe_names())


def test_the_page_names_the_conventions() -> None:
    page = (Path(__file__).parents[2] / "docs" / "new.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE))
    for setting, table in (
        ("`data.eval`", EVAL_SHARES[1:]), ("rows of a step", STEP_ROWS), ("`train.num_train_epochs`", EPOCHS),
    ):  # fmt: skip
        shown = [f"{value} below {limit:,}" for limit, value in table[:-1]] + [f"else {table[-1][1]}"]
        assert [text in re.sub(r"(below \d+) rows", r"\1", rows[setting]) for text in shown] == [True] * len(shown)
    limits = [f"{tokens:,} below {limit / 1e9:g}" for limit, tokens in MICRO_BATCH_TOKENS[:-1]]
    assert all(text in rows["micro-batch"].replace("tokens ", "") for text in limits)
    assert all(f"`{option}`" in rows for option in ("--data", "--eval", "--recipe", "--memory", "-o"))
