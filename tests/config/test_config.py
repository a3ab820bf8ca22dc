"""Configs: YAML 1.2 scalars, one error line per problem, overrides, and the resolved config."""

import glob
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import get_scheduler
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_train.config import RunConfig, load_config
from qlora_train.config.absolute_paths import with_absolute_paths
from qlora_train.config.rope_scaling import KEYS as KEYS_OF_ROPES
from qlora_train.config.schema import POLYNOMIAL_END, SCHEDULES
from qlora_train.config.writer import provenance, to_yaml
from qlora_train.config.yaml_reader import core_scalar
from qlora_train.utils.errors import ConfigError, nearest_names

MALFORMED = Path(__file__).parents[1] / "files" / "malformed_configs"
SMALLEST = "model:\n  model_name_or_path: some/model\ndata:\n  train: rows.jsonl\n"
KEYS = [
    (section, key) for section, spec in RunConfig.model_fields.items() for key in spec.annotation.model_fields
]  # fmt: skip


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write run.yaml into the current folder."""
    monkeypatch.chdir(tmp_path)

    def to_file(text: str) -> Path:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return Path("run.yaml")

    return to_file


def problems_of(path, overrides=()):
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    return list(raised.value.problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("on", "on"), ("no", "no"), ("yes", "yes"), ("y", "y"), ("true", True), ("False", False),
        ("tRue", "tRue"), ("010", 10), ("-7", -7), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("1_000", "1_000"),
        ("12:30:45", "12:30:45"), ("2026-07-01", "2026-07-01"), ("2e-4", 2e-4), ("2E4", 2e4), ("1.", 1.0), (".5", 0.5),
        ("1.5e+3", 1500.0), (".", "."), ("e5", "e5"), (".inf", math.inf), ("-.INF", -math.inf), ("null", None),
        ("~", None), ("", None), ("0b11", "0b11"), ("1.2.3", "1.2.3"), ("5GB", "5GB"), ("=", "="), ("٣", "٣"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_the_yaml_1_2_core_schema(text, value):
    assert core_scalar(text) == value
    assert type(core_scalar(text)) is type(value)


def test_nan_is_refused(write):
    assert math.isnan(core_scalar(".nan"))
    assert problems_of(write(SMALLEST + "train:\n  learning_rate: .nan\n")) == [
        "run.yaml:6: train.learning_rate: out of range (found nan); allowed: a number > 0 and <= 1"
    ]


@given(st.floats(allow_nan=False) | st.integers())
def test_every_printed_number_is_read_back(number):
    text = repr(number).replace("inf", ".inf")
    assert core_scalar(text) == number


def test_quoted_scalars_are_strings(write):
    config = load_config(write("model:\n  model_name_or_path: '010'\n  revision: \"no\"\ndata:\n  train: 'null'\n"))
    assert (config.model.model_name_or_path, config.model.revision, config.data.train[0].path) == ("010", "no", "null")


def test_a_data_source_is_a_path_a_mapping_or_a_list(write):
    sources = "[a.jsonl, {path: some/set, split: test, subset: en}]"
    config = load_config(write(SMALLEST.replace("rows.jsonl", sources) + "  eval: 0.05\n"))
    assert [(source.path, source.split, source.subset) for source in config.data.train] == [
        ("a.jsonl", "train", None),
        ("some/set", "test", "en"),
    ]
    assert config.data.eval == 0.05


def test_a_single_name_is_a_list_of_one(write):
    names = "run: {report_to: wandb, allow_changed: versions}\nlora: {modules_to_save: lm_head}\n"
    config = load_config(write(SMALLEST + names))
    assert (config.run.report_to, config.run.allow_changed) == (("wandb",), ("versions",))
    assert config.lora.modules_to_save == ("lm_head",)
    assert load_config(write(SMALLEST + "run: {report_to: none}\n")).run.report_to == ()


@pytest.mark.parametrize("style", ["|", ">", ">-", "|+"])
def test_final_line_break_of_a_block_scalar_is_dropped(style, write):
    text = SMALLEST.replace("rows.jsonl", f"{style}\n    rows.jsonl\n\n")
    config = load_config(write(text + f"lora:\n  target_modules: {style}\n    .*\\.q_proj\n"))
    assert (config.data.train[0].path, config.lora.target_modules) == ("rows.jsonl", ".*\\.q_proj")


def test_unusual_space_in_quotes_is_text(write):
    assert (
        load_config(write(SMALLEST.replace("rows", "'a\u00a0b'").replace("'.jsonl", ".jsonl'"))).data.train[0].path
        == "a\u00a0b.jsonl"
    )


def test_a_section_without_keys_has_the_defaults(write):
    assert load_config(write(SMALLEST + "lora:\n  # r: 8\ntrain:\n")) == load_config(write(SMALLEST))


def test_integer_is_a_valid_float_but_not_the_reverse(write):
    assert load_config(write(SMALLEST + "train:\n  num_train_epochs: 3\n")).train.num_train_epochs == 3.0
    assert problems_of(write(SMALLEST + "train:\n  save_total_limit: 2.0\n")) == [
        "run.yaml:6: train.save_total_limit: the wrong type (found 2.0); allowed: a whole number >= 1"
    ]


def test_malformed_configs_have_exactly_these_errors(monkeypatch):
    monkeypatch.chdir(MALFORMED)
    paths = sorted(MALFORMED.glob("*.yaml"))
    assert len(paths) >= 90
    assert {path.stem for path in paths} == {path.stem for path in MALFORMED.glob("*.expected")}
    for path in paths:
        expected = path.with_suffix(".expected").read_text(encoding="utf-8").splitlines()
        assert problems_of(path.name) == expected, path.name


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_config_loads_or_is_a_config_error(data, tmp_path):
    text = SMALLEST + "lora:\n  target_modules: [q_proj, v_proj]\ntrain:\n  learning_rate: 2e-4\n  max_steps: 10\n"
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(begin + 10, len(text))))
    inserted = data.draw(
        st.text(alphabet="ab1-:[]{}'\"#&*!|>%@`,.~? \n\t\0\x85\ud7ff", max_size=6) | st.text(max_size=4)
    )
    path = tmp_path / "damaged.yaml"
    path.write_text(text[:begin] + inserted + text[end:], encoding="utf-8", newline="")
    try:
        load_config(path)
    except ConfigError as error:
        for problem in error.problems:
            assert problem.startswith(str(path))
            assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    ("word", "names", "expected"),
    [
        ("template", ["deduplicate", "eval"], []),
        ("lora_r", ["lora_dropout", "r"], []),
        ("gradient_clipping", ["gradient_checkpointing"], []),
        ("bnb_4bit_quant_storage", ["bnb_4bit_quant_type"], []),
        ("nope", ["none", "demo"], ["none"]),
        ("demo", ["data", "chat"], []),
        ("rank_dropout", ["lora_dropout"], []),
        ("tain", ["train", "data", "chat"], ["train"]),
        ("trian", ["train", "data"], ["train"]),
        ("Batch_size", ["per_device_train_batch_size", "seed"], ["per_device_train_batch_size"]),
        ("adam", [f"{name}_adam" for name in "abcd"], []),
        ("", ["a"], []),
    ],
)
def test_only_similar_names_are_suggested(word, names, expected):
    assert nearest_names(word, names) == expected


def test_key_in_the_wrong_section_names_its_section(write):
    assert problems_of(write(SMALLEST + "run:\n  max_length: 512\n")) == [
        "run.yaml:6: run.max_length: unknown key; here it is data.max_length"
    ]


def test_override_replaces_a_value_and_the_last_one_wins(write):
    path = write(SMALLEST + "train:\n  learning_rate: 1e-3\n")
    config = load_config(
        path, ["train.learning_rate=5e-5", "data.train=[a.jsonl, b.jsonl]", "train.learning_rate=2e-5"]
    )
    assert config.train.learning_rate == 2e-5
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl"]


def test_override_sets_a_nested_key(write):
    path = write(SMALLEST.replace("rows.jsonl", "{path: some/set, split: train}"))
    assert load_config(path, ["data.train.split=test"]).data.train[0].split == "test"
    assert problems_of(write(SMALLEST), ["data.train.split=test"]) == [
        "override data.train.split=test: data.train is not a mapping (found 'rows.jsonl'); give data.train as a whole"
    ]


def test_override_replaces_an_invalid_value(write):
    path = write(SMALLEST + "lora:\n  r: sixteen\n")
    assert load_config(path, ["lora.r=16"]).lora.r == 16


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.trian=a.jsonl", "unknown key; did you mean train?"),
        (
            "train.fp8=true",
            "unknown key; not supported: no training in float8; remove it: "
            "quantization.bnb_4bit_compute_dtype sets the compute dtype",
        ),
        ("trian.max_steps=3", "trian: unknown section; did you mean train?"),
        ("lora.r=2.5", "the wrong type (found 2.5); allowed: a whole number >= 1 and <= 4096"),
        ("lora.r=", "the wrong type (found null); allowed: a whole number >= 1 and <= 4096"),
        ("model.revision=123", "the wrong type (found 123); allowed: text or null, in quotes"),
        ("max_steps=3", "not an override; write section.key=value: here it is train.max_steps"),
        ("lr=1e-4", "not an override; write section.key=value: here it is train.learning_rate"),
        ("max_step=3", "not an override; write section.key=value: did you mean train.max_steps?"),
        ("nonsense=3", "not an override; write section.key=value, such as train.learning_rate=1e-4"),
        ("resume", "not an override; write section.key=value, such as train.learning_rate=1e-4"),
        ("train..r=3", "not an override; write section.key=value, such as train.learning_rate=1e-4"),
        ("run.seed=&a 3", "anchor &a is not allowed; write the value where it is used"),
        ("train.load_best_model_at_end=true", "needs held-out rows; set data.eval to a file or a share like 0.05"),
    ],
)
def test_invalid_override_is_named_in_its_error(override, problem, write):
    assert problems_of(write(SMALLEST), [override]) == [f"override {override}: {problem}"]


def test_problems_of_file_and_overrides_are_sorted(write):
    path = write(SMALLEST + "train:\n  max_steps: 0\nlora:\n  r: 0\n")
    places = [problem.split(": ")[0] for problem in problems_of(path, ["run.sed=1", "data.max_length=1"])]
    assert places[:2] == ["run.yaml:6", "run.yaml:8"]
    assert sorted(places[2:]) == ["override data.max_length=1", "override run.sed=1"]


def test_missing_file_suggests_the_nearest_one(write):
    write(SMALLEST)
    assert problems_of("runn.yaml") == ["runn.yaml: no such file; did you mean run.yaml?"]
    assert problems_of("nope.yaml") == ["nope.yaml: no such file"]
    assert problems_of("elsewhere/x.yaml") == ["elsewhere/x.yaml: no such file"]
    assert problems_of("run.yaml/x") == ["run.yaml/x: no such file"]


def test_folder_large_file_and_impossible_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("large.yaml").write_text("#" * 1_000_001)
    assert problems_of("folder") == ["folder: a folder; name the YAML file"]
    assert problems_of("large.yaml") == ["large.yaml: larger than 1,000,000 bytes; this is not a config"]
    assert problems_of("x" * 5000)[0].endswith("cannot be read (File name too long); check its name and permissions")


BOMBS = {
    "lists in lists": "[" * 999_999,
    "mappings in mappings": "{" * 999_999,
    "items in items": "- " * 499_999,
    "mappings by indentation": "\n".join(" " * depth + "a:" for depth in range(1300)),
    "keys that are mappings": "? " * 499_999,
    "a billion laughs": "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a, *a]\n" for n in range(9)),
    "aliases of itself": "model: &a [*a, *a]\n",
    "anchors": "a: &a {b: 1}\n" * 10_000,
    "tags": "!x " * 300_000,
    "the same key": "a:\n" * 50_000,
    "documents": "---\n" * 200_000,
    "a number": "a: " + "1" * 900_000,
    "an exponent": "run:\n  seed: 1e" + "9" * 399,
    "a text": "model:\n  revision: 3\n  model_name_or_path: '" + "x" * 900_000 + "'",
    "escapes": 'a: "' + "\\n" * 450_000 + '"',
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_file_with_large_content_has_few_errors(name, write):
    problems = problems_of(write(BOMBS[name]))
    assert len(problems) <= 201
    assert all(len(problem) < 1000 and "\n" not in problem for problem in problems)
    deep = name.endswith(("lists", "mappings", "items", "indentation"))
    assert any("nested more than 12 deep" in problem for problem in problems) == deep
    assert any("more problems, not listed" in problem for problem in problems) == (name in ("anchors", "the same key"))


def test_depth_size_and_digits_are_limited_in_overrides_too(write):
    for value in ("[" * 20 + "]" * 20, "{a: " * 20 + "}" * 20):
        [problem] = problems_of(write(SMALLEST), [f"data.train={value}"])
        assert "nested more than 12 deep" in problem
    [problem] = problems_of(write(SMALLEST), ["run.seed=" + "1" * 500])
    assert "a number of 500 characters; at most 400" in problem


def test_thousands_of_wrong_keys_are_counted_quickly(write):
    begin = time.process_time()
    problems = problems_of(write(SMALLEST + "run:\n" + "".join(f"  wrong_{index}: 1\n" for index in range(3000))))
    assert problems[0] == "run.yaml:1: and 2900 more problems, not listed"
    assert time.process_time() - begin < 5


texts = st.text(min_size=1, max_size=20) | st.sampled_from(
    ["010", "2e-4", "0o7", "off", "null", "~", "1e5", "a: b", "#", "\x85", "a\u2028b\n", "a\u00a0b", "\u3000"]
)
paths = texts.filter(lambda text: not {"\0", "\n"} & set(text))
names = st.lists(texts, max_size=3).map(tuple)
positive = st.floats(min_value=1e-6, max_value=1, exclude_max=True) | st.sampled_from([2e-4, 1e-5])
sources = st.lists(
    st.fixed_dictionaries({"path": paths}, optional={"split": texts, "subset": texts | st.none()}),
    min_size=1,
    max_size=3,
).map(tuple)
configs = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"model_name_or_path": paths},
            optional={
                "revision": texts | st.none(),
                "new_tokens": names,
                "rope_scaling": st.fixed_dictionaries(
                    {
                        "rope_type": st.sampled_from(["linear", "dynamic", "yarn"]),
                        "factor": st.floats(1, 100) | st.integers(1, 100),
                    }
                ),
            },
        ),
        "data": st.fixed_dictionaries(
            {"train": sources},
            optional={"eval": sources | positive | st.none(), "columns": st.dictionaries(texts, texts, max_size=3)},
        ),
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "target_modules": names.filter(bool) | texts.map(lambda text: rf".*\.{re.escape(text)}"),
                "lora_alpha": positive,
                "lora_dropout": positive,
                "modules_to_save": names,
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": positive,
                "adam_epsilon": positive,
                "gradient_checkpointing": st.sampled_from(["auto", "none", "mlp", "full"]),
                "max_steps": st.none() | st.integers(1, 10**9),
            },
        ),
        "run": st.fixed_dictionaries({}, optional={"output_dir": paths | st.none(), "seed": st.integers(0, 2**32 - 1)}),
    }
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=configs)
def test_resolved_config_loads_as_an_equal_config(values, tmp_path):
    config = RunConfig.model_validate(values)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(path) == config


def test_resolved_config_has_every_value_for_any_yaml_reader(write):
    config = load_config(write(SMALLEST + "run:\n  output_dir: 2e-4x\n"))
    assert yaml.safe_load(to_yaml(config)) == json.loads(config.model_dump_json())


def test_absolute_paths_work_from_any_folder(tmp_path, monkeypatch):
    here = tmp_path / "a[1]"
    (here / "base").mkdir(parents=True)
    for name in ("rows.jsonl", "more.jsonl", "mine.jinja"):
        (here / name).touch()
    monkeypatch.chdir(here)
    config = RunConfig.model_validate(
        {
            "model": {"model_name_or_path": "base", "chat_template": "mine.jinja"},
            "data": {"train": ["rows.jsonl", "*.jsonl", "owner/name"], "eval": 0.05, "cache_dir": "cache"},
            "lora": {"adapter_path": "../adapter"},
            "run": {"output_dir": "runs/x"},
        }
    )
    found = with_absolute_paths(config)
    monkeypatch.chdir("/")
    assert Path(found.model.model_name_or_path) == here / "base"
    assert Path(found.model.chat_template) == here / "mine.jinja"
    assert Path(found.lora.adapter_path) == here / "../adapter"
    rows, pattern, hub = (source.path for source in found.data.train)
    assert (Path(rows), hub) == (here / "rows.jsonl", "owner/name")
    matches = {Path(name) for name in glob.glob(pattern)}  # noqa: PTH207
    assert matches == {here / "rows.jsonl", here / "more.jsonl"}
    assert (Path(found.data.cache_dir), found.data.eval) == (here / "cache", 0.05)
    assert found.run.output_dir == "runs/x"
    assert with_absolute_paths(found) == found


def test_absolute_paths_keep_hub_ids():
    config = RunConfig.model_validate(
        {"model": {"model_name_or_path": "some/model", "chat_template": "chatml"}, "data": {"train": "some/set"}}
    )
    assert with_absolute_paths(config) == config


def test_provenance_names_the_line_the_override_or_the_default(write):
    path = write(SMALLEST + "train:\n  learning_rate: 1e-3\n")
    found = {setting.key: (setting.value, setting.source) for setting in provenance(path, ["lora.r=8"])}
    assert list(found) == [f"{section}.{key}" for section, key in KEYS]
    assert found["train.learning_rate"] == (1e-3, "run.yaml:6")
    assert found["lora.r"] == (8, "override lora.r=8")
    assert found["run.seed"] == (42, "default")


def test_every_setting_has_documentation():
    for section, key in KEYS:
        spec = RunConfig.model_fields[section].annotation.model_fields[key]
        assert spec.description, f"{section}.{key} has no docstring"


@pytest.mark.parametrize("name", get_args(SCHEDULES))
def test_every_schedule_needs_no_further_settings(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2e-4)
    get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)


def test_polynomial_schedule_ends_at_the_constant():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2 * POLYNOMIAL_END)
    get_scheduler("polynomial", optimizer, num_warmup_steps=0, num_training_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=POLYNOMIAL_END)
    with pytest.raises(ValueError, match="lr_end"):
        get_scheduler("polynomial", optimizer, num_warmup_steps=0, num_training_steps=10)


def test_every_rope_scaling_is_known_to_transformers():
    assert set(KEYS_OF_ROPES) <= set(ROPE_INIT_FUNCTIONS)


def test_checking_a_config_imports_no_torch_and_takes_less_than_half_a_second(write):
    code = (
        "import sys; from qlora_train.cli.main import main; main(['check', 'run.yaml']); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    write(SMALLEST)
    Path("rows.jsonl").touch()
    seconds = []
    for _ in range(3):
        before = os.times()
        shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        after = os.times()  # of the CPU: other programs make it no slower
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
        assert shown == "run.yaml: ok\n[]\n"
    assert min(seconds) < 0.5
