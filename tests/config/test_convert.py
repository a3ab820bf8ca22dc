"""`qlora-train convert`: complete configs of six trainers become configs of ours, and no key is lost silently."""

import copy
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_train.config import RunConfig, Source, load_config
from qlora_train.config.other_trainers.all_trainers import OTHER_TRAINERS
from qlora_train.config.other_trainers.conversion import Conversion, convert
from qlora_train.config.other_trainers.converted_yaml import to_yaml
from qlora_train.config.other_trainers.other_config_file import OtherConfig, read_other_config
from qlora_train.config.preflight import check_machine
from qlora_train.config.yaml_reader import core_scalar
from qlora_train.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests" / "files" / "other_trainers"
CONFIGS = sorted(path.relative_to(FILES) for name in OTHER_TRAINERS for path in (FILES / name).iterdir())
LISTS = ("todo", "differs", "lost", "unneeded")


@pytest.fixture(autouse=True)
def in_the_folder_of_their_data(monkeypatch):
    monkeypatch.chdir(FILES)


def converted(path: Path) -> Conversion:
    return convert(read_other_config(path))


def expected(path: Path, word: str) -> list[str]:
    """Return what the comments at the top of a config say: `# here: setting=value ...`, `# lost: key ...`."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(f"# {word}: ")]
    return [entry for line in lines for entry in line.removeprefix(f"# {word}: ").split()]


def value_at(config: object, setting: str) -> object:
    for name in re.findall(r"\w+", setting):
        config = (
            config[int(name)] if name.isdigit() else config[name] if isinstance(config, dict) else getattr(config, name)
        )
    return config


def test_there_are_four_configs_or_more_of_each_trainer() -> None:
    counts = Counter(str(path.parent) for path in CONFIGS)
    assert counts.keys() == set(OTHER_TRAINERS)
    assert min(counts.values()) >= 4


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_trainer_is_recognised(path: Path) -> None:
    assert read_other_config(path).trainer.name == str(path.parent)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_result_has_the_expected_settings_and_passes_check(path: Path, tmp_path: Path) -> None:
    result = converted(path)
    assert result.problems == []
    output = tmp_path / "ours.yaml"
    output.write_text(to_yaml(result, str(path)), encoding="utf-8")
    config = load_config(output, ["run.report_to=none"])
    wanted = dict(entry.split("=", 1) for entry in expected(path, "here"))
    assert len(wanted) >= 8
    written = load_config(output)
    for setting, text in wanted.items():
        value = value_at(written, setting)
        items = tuple(text[1:-1].split(",")) if text.startswith("[") else core_scalar(text)
        assert value == items, (setting, value, text)
    missing = [text for text in problems_of_machine(config) if "/tmp/Meta-Llama" not in text]
    assert missing == []


def problems_of_machine(config) -> list[str]:
    try:
        check_machine(config)
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("path", CONFIGS, ids=str)
@pytest.mark.parametrize("word", ["lost", "differs", "unneeded", "todo"])
def test_lists_name_the_expected_keys(path: Path, word: str) -> None:
    listed = {item.key for item in getattr(converted(path), word)}
    wanted = expected(path, word)
    joined = [" ".join(wanted)] if "pip" in wanted else wanted
    assert set(joined) <= listed
    if word == "todo":
        assert set(joined) == listed


def leaf_keys(values: object, begin: str = "") -> set[str]:
    """Return the dotted keys of all values, read by PyYAML."""
    if isinstance(values, dict) and values:
        return {name for key, item in values.items() for name in leaf_keys(item, f"{begin}.{key}" if begin else key)}
    if isinstance(values, list) and any(isinstance(item, dict) for item in values):
        return {name for index, item in enumerate(values) for name in leaf_keys(item, f"{begin}[{index}]")}
    return {begin}


def accounted_keys(result: Conversion) -> set[str]:
    keys = {key for setting in result.settings.values() for key in setting.keys} | set(result.unset)
    return keys | {item.key for name in LISTS for item in getattr(result, name)}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.suffix != ".sh"], ids=str)
def test_every_key_is_in_the_config_or_in_a_list(path: Path) -> None:
    result = converted(path)
    accounted = accounted_keys(result)
    keys = leaf_keys(yaml.safe_load(path.read_text(encoding="utf-8")))
    left = {key for key in keys if not any(key == known or key.startswith(f"{known}.") for known in accounted)}
    assert left == set()
    text = to_yaml(result, str(path)).replace("\n#     ", " ")
    assert {key for key in keys if key not in text and key.rpartition(".")[0] not in text} == set()


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.suffix == ".sh"], ids=str)
def test_every_option_of_a_command_is_in_the_config_or_in_a_list(path: Path) -> None:
    words = re.findall(r"(?<=\s)--([a-z][\w-]*)", path.read_text(encoding="utf-8"))
    options = {word.replace("-", "_").removeprefix("no_") for word in words}
    assert len(options) > 8
    assert options <= accounted_keys(converted(path))


def test_every_mapped_setting_exists() -> None:
    settings = {
        f"{name}.{key}" for name, spec in RunConfig.model_fields.items() for key in spec.annotation.model_fields
    }
    sources = {f"{name}[].{key}" for name in ("data.train", "data.eval") for key in Source.model_fields}
    for trainer in OTHER_TRAINERS.values():
        mapped = {
            row.setting.replace("[0]", "[]").partition(".columns.")[0] for row in trainer.keys.values() if row.setting
        }
        unknown = mapped - settings - sources - set(RunConfig.model_fields)
        assert {name.removesuffix(".columns") for name in unknown} <= {"data.train[]", "data.eval[]"}, trainer.name
        assert set(trainer.defaults) <= settings


def test_page_is_made_from_the_tables(tmp_path: Path) -> None:
    made = tmp_path / "convert.md"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "conversion_page.py"), str(made)], check=True)
    assert (ROOT / "docs" / "convert.md").read_text() == made.read_text(), "run: python scripts/conversion_page.py"


STRANGE = (
    None, True, -1, 0, 0.5, math.nan, 10**30, "", "a,b", "x" * 300, "\n\x1b[31m", [], [1, 2], ["a", {"b": 1}], {},
    {"a": {"b": [1]}},
)  # fmt: skip


def places(values: object, begin: tuple = ()) -> Iterator[tuple]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, item in items:
        yield (*begin, key)
        yield from places(item, (*begin, key))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_strange_value_is_converted_or_listed(data, tmp_path: Path) -> None:
    other = read_other_config(data.draw(st.sampled_from(CONFIGS)))
    values = copy.deepcopy(dict(other.values))
    *parents, last = data.draw(st.sampled_from(list(places(values))))
    holder = values
    for key in parents:
        holder = holder[key]
    holder[last] = data.draw(st.sampled_from(STRANGE))
    result = convert(OtherConfig(other.path, other.trainer, values))
    output = tmp_path / "ours.yaml"
    output.write_text(to_yaml(result, "theirs"), encoding="utf-8")
    if result.problems:
        with pytest.raises(ConfigError):
            load_config(output)
    else:
        load_config(output)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_converted_or_a_config_error(data, tmp_path: Path) -> None:
    path = data.draw(st.sampled_from(CONFIGS))
    text = path.read_text(encoding="utf-8")
    begin = data.draw(st.integers(0, len(text)))
    inserted = data.draw(st.text(alphabet="ab1-:[]{}'\"#&*!|>%@`,.~? \n\t\0$", max_size=6))
    damaged = tmp_path / f"damaged{path.suffix}"
    damaged.write_text(text[:begin] + inserted + text[begin + data.draw(st.integers(0, 10)) :], encoding="utf-8")
    try:
        to_yaml(convert(read_other_config(damaged)), "theirs")
    except ConfigError as error:
        problems = error.problems
    else:
        problems = ()
    assert all(len(problem.splitlines()) == 1 for problem in problems)
