"""Adapters of others are untrusted: what they name is not imported, fetched or unpickled, and another base is refused."""

import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_train.adapters import attach_adapter, load_trained
from qlora_train.adapters.adapter_folder import read_adapter_settings
from qlora_train.cli.main import main
from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.export.merging.merge_finished_run import merge
from qlora_train.models import BaseSource, LoadedModel, load_model
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ConfigError
from tests.support.runs import make_config, train_run

Change = dict[str, Any]
WITHOUT_EVAL = ["data.eval=null", "train.eval_steps=null"]
HUB, COMMIT = "owner/model", "0" * 40


@pytest.fixture(scope="module")
def run(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_run(tmp_path_factory.mktemp("run"), pico_llama, "train.max_steps=1")


@pytest.fixture(scope="module")
def run_without_eval(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_run(tmp_path_factory.mktemp("run"), pico_llama, "train.max_steps=1", *WITHOUT_EVAL)


@pytest.fixture(scope="module")
def loaded(pico_llama: Path) -> LoadedModel:
    """A base for adapters that are refused, which leave it as it is."""
    return load_model(ModelSection(model_name_or_path=str(pico_llama)), QuantizationSection())


@contextlib.contextmanager
def edited(run: RunFolder, **changes: Any) -> Iterator[None]:
    """Change the adapter of a run for a while."""
    files = {path: path.read_bytes() for path in run.adapter.iterdir() if path.is_file()}
    edit(run.adapter, **changes)
    yield
    for path, content in files.items():
        path.write_bytes(content)


@pytest.fixture
def adapter(run: RunFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.adapter, tmp_path / "adapter"))


def edit(adapter: Path, **changes: Any) -> None:
    """Change an adapter's settings as an attacker would, manifest included."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    atomic_io.write_manifest(adapter, atomic_io.read_metadata(adapter))


def warm_start(adapter: Path, base: Path, loaded: LoadedModel | None = None) -> None:
    config = make_config(adapter.parent, base, f"lora.adapter_path={adapter}")
    attach_adapter(loaded or load_model(config.model, config.quantization), config.lora, seed=1)


# --- what a file may say ----------------------------------------------------------------------------------------------

EVIL = "evil_module"
HOSTILE: dict[str, Change] = {
    "auto mapping": {"auto_mapping": {"base_model_class": "Evil", "parent_library": EVIL}},
    "import by name": {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": EVIL},
    "an unknown import": {"custom_module": EVIL},
    "another method": {"peft_type": "PREFIX_TUNING"},
    "a method of no name": {"peft_type": None},
    "a method that is a list": {"peft_type": ["LORA"]},
    "another task": {"task_type": "SEQ_CLS"},
    "layers given twice": {"layer_replication": [[0, 2], [0, 2]]},
    "one layer alone": {"layers_to_transform": 0},
    "layers by pattern": {"layers_pattern": "layers", "layers_to_transform": [0]},
    "other ranks": {"rank_pattern": {"q_proj": 64}},
    "other scales": {"alpha_pattern": {"q_proj": 4000}},
    "loftq": {"loftq_config": {"loftq_bits": 4}},
    "corda": {"corda_config": {"cache_file": "/tmp/x", "covariance_file": "/tmp/y"}},
    "an initialisation that changes the base": {"init_lora_weights": "pissa"},
    "an initialisation of no name": {"init_lora_weights": {"a": 1}},
    "rows of other tokens": {"trainable_token_indices": {"embed_tokens": [0]}},
    "rows as a list": {"trainable_token_indices": [5]},
    "rows before the first": {"trainable_token_indices": {"embed_tokens": [-1]}},
    "other parameters": {"target_parameters": ["mlp.experts"]},
    "a flag that is a text": {"use_dora": "yes"},
    "a rank that is a text": {"r": "8"},
    "a rank that is huge": {"r": 10**9},
    "a scale that is no number": {"lora_alpha": float("nan")},
    "a name that is a number": {"base_model_name_or_path": 3},
    "layers that are numbers": {"target_modules": [1]},
    "layers nested": {"target_modules": [["q_proj"]]},
    "no layers": {"target_modules": None},
    "modules that are a text": {"modules_to_save": "lm_head"},
    "a value as large as a book": {"notes": "x" * 100_000},
    "a key of several lines": {"a\nb": "c\nd"},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_unsupported_adapter_setting_is_refused_in_one_line(
    case: str, adapter: Path, pico_llama: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = adapter.parent / "imported"
    (adapter.parent / f"{EVIL}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(adapter.parent)
    edit(adapter, **HOSTILE[case])
    with pytest.raises(ConfigError) as caught:
        warm_start(adapter, pico_llama, loaded)
    key = next(iter(HOSTILE[case])).partition("\n")[0]
    assert re.search(rf"adapter_config\.json: '?{key}", str(caught.value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert not canary.exists()


FILES: dict[str, Callable[[Path], Any]] = {
    "larger than a config": lambda file: file.write_text(json.dumps({"a": "x" * 1_000_001})),
    "nested deep": lambda file: file.write_text("[" * 400_000),
    "nested deep inside": lambda file: file.write_text('{"peft_type":' + '{"a":' * 150_000),
    "a list": lambda file: file.write_text("[]"),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "a number of ten thousand digits": lambda file: file.write_text('{"r": ' + "1" * 10_000 + "}"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "empty": lambda file: file.write_text(""),
}


@pytest.mark.parametrize("case", FILES)
def test_malformed_adapter_config_is_one_line(case: str, adapter: Path, pico_llama: Path, loaded: LoadedModel) -> None:
    FILES[case](adapter / "adapter_config.json")
    with pytest.raises(ConfigError, match="holds no readable adapter") as caught:
        warm_start(adapter, pico_llama, loaded)
    assert "\n" not in str(caught.value)


def test_adapter_is_never_unpickled(adapter: Path, pico_llama: Path) -> None:
    canary = adapter.parent / "fired"

    class Canary:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return exec, (f"open({str(canary)!r}, 'w')",)

    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    warm_start(adapter, pico_llama)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is missing"):
        warm_start(adapter, pico_llama)
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(ConfigError, match="holds no readable adapter"):
        warm_start(adapter, pico_llama)
    assert not canary.exists()
    pickle.loads((adapter / "adapter_model.bin").read_bytes())
    assert canary.exists(), "the canary would have shown"


def test_adapter_written_by_peft_is_accepted(pico_llama: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(pico_llama)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=8, lora_alpha=32, target_modules=linears, task_type="CAUSAL_LM")
    PeftModel(base, settings).save_pretrained(str(tmp_path / "adapter"))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(pico_llama), "a local path, as PEFT writes it"
    warm_start(tmp_path / "adapter", pico_llama)


def test_peft_adapter_without_a_task_type_is_accepted(pico_llama: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(pico_llama)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules=linears)).save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    warm_start(tmp_path / "adapter", pico_llama)


@pytest.mark.parametrize("off", [None, False, {}])
def test_auto_mapping_that_is_off_is_accepted(off: Any, adapter: Path) -> None:
    edit(adapter, auto_mapping=off)
    assert read_adapter_settings(adapter, None).auto_mapping is None


def test_own_adapters_of_other_initializations_are_accepted(pico_llama: Path, tmp_path: Path) -> None:
    for name in ("gaussian", "eva"):
        own = train_run(tmp_path, pico_llama, "train.max_steps=1", f"lora.init_lora_weights={name}", name=name)
        warm_start(Path(shutil.copytree(own.adapter, tmp_path / f"of-{name}" / "adapter")), pico_llama)


# --- which base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "base", "commit", "is_same"),
    [
        (HUB, HUB, COMMIT, True), ("Owner/Model", HUB, COMMIT, True), (None, HUB, COMMIT, True), ("", "any", None, True),
        ("other/model", HUB, COMMIT, False), ("owner/other", HUB, COMMIT, False),
        ("/home/me/model", HUB, COMMIT, True), ("../models/model/", HUB, COMMIT, True), ("model", HUB, COMMIT, True),
        (r"C:\\models\\model", HUB, COMMIT, True), ("/home/me/other", HUB, COMMIT, False),
        (HUB, "model", None, True), (HUB, "other", None, False), ("other/model", "model", None, True),
        ("/a/model", "model", None, True), ("/a/model.gguf", "model", None, True), ("/a/other", "model", None, False),
        (f"/cache/models--owner--model/snapshots/{COMMIT}", HUB, COMMIT, True),
        (f"/cache/models--other--model/snapshots/{COMMIT}", HUB, COMMIT, False),
        (f"/cache/models--owner--model/snapshots/{COMMIT}", "model", None, True),
    ],
)  # fmt: skip
def test_bases_are_equal_by_hub_id_or_last_part_of_the_path(
    named: str | None, base: str, commit: str | None, is_same: bool, adapter: Path
) -> None:
    edit(adapter, base_model_name_or_path=named)
    source = BaseSource(adapter, base, commit, {})
    if is_same:
        assert read_adapter_settings(adapter, source).base_model_name_or_path == named
        return
    with pytest.raises(ConfigError, match=r"is another base than .* if they are the same model, set it to null"):
        read_adapter_settings(adapter, source)


def test_adapter_without_a_base_is_checked_by_its_tensors(adapter: Path, pico: Callable[..., Path]) -> None:
    edit(adapter, base_model_name_or_path=None)
    warm_start(adapter, pico("llama"))
    with pytest.raises(ConfigError, match="does not fit the base model"):
        warm_start(adapter, pico("llama", intermediate_size=192))


# --- a run's own adapter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["auto mapping", "import by name", "another method", "other scales", "no layers"])
def test_changed_adapter_of_a_run_is_not_merged_or_evaluated(
    case: str, run: RunFolder, run_without_eval: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["eval", str(run.path), "--models", "adapter", "--loss-only"]
    commands = [
        (run, [["merge", str(run.path)], evaluate]),
        (run_without_eval, [["merge", str(run_without_eval.path)]]),
    ]
    for own, arguments in commands:
        with edited(own, **HOSTILE[case]):
            for command in arguments:
                capsys.readouterr()
                assert main(command) == 2
                error = capsys.readouterr().err
                assert f"adapter_config.json: {next(iter(HOSTILE[case]))}" in error.replace("'", "")
                assert "Traceback" not in error
        assert not own.merged.exists()


def test_adapter_of_another_run_with_another_base_is_not_merged(run: RunFolder, loaded: LoadedModel) -> None:
    with edited(run, base_model_name_or_path="someone/else"):
        with pytest.raises(ConfigError, match="is another base"):
            merge(run.path)
        with pytest.raises(ConfigError, match="is another base"):
            load_trained(loaded, run.adapter)


def test_peft_reads_the_finished_adapter_on_its_own(run: RunFolder, pico_llama: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_llama), str(run.adapter))
    assert isinstance(model(input_ids=torch.tensor([[5, 6]])).logits, torch.Tensor)
