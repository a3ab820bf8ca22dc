"""Bases as they come from the wild: each damage is one line that names the file or the tensor, before training."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_train.cli.main import main
from qlora_train.config.writer import to_yaml
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.utils.errors import MergeError
from tests.support.pico import build_pico
from tests.support.runs import make_config, train_run

pytestmark = pytest.mark.usefixtures("preserve_library_settings")

LOG = re.compile(
    r":\d+: format \w+$|^device: |^data\.|^tokenizer: |^compute dtype: |^attention: |^quantization: "
    r"|^adapter: starts from |^plan: |^base: "
)
"""Lines of the log before training starts."""

Damage = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]
Capture = pytest.CaptureFixture[str]
SHARD = "model-00002-of-00005.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama in five shards."""
    folder = build_pico(tmp_path_factory.mktemp("sharded"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / SHARD).is_file()
    return folder


def train(base: Path, folder: Path, *overrides: str) -> int:
    """Run `qlora-train CONFIG` on a base, for one step."""
    config = make_config(folder, base, "train.max_steps=1", *overrides)
    (folder / "whole.yaml").write_text(to_yaml(config))
    return main([str(folder / "whole.yaml")])


def refused(base: Path, folder: Path, capsys: Capture, *overrides: str) -> str:
    """Run it, and return the one line that it ends with."""
    capsys.readouterr()
    assert train(base, folder, *overrides) == 2
    err = capsys.readouterr().err
    problems = [line for line in err.splitlines() if not LOG.search(line)]
    assert len(problems) == 1, err
    assert not (folder / "run" / "adapter").exists()
    assert "training: starts" not in err
    return problems[0]


# --- damages ----------------------------------------------------------------------------------------------------------


def edited(file: str, **changes: Any) -> Damage:
    def damage(base: Path) -> None:
        content = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps({**content, **changes}))

    return damage


def without(file: str) -> Damage:
    return lambda base: (base / file).unlink()


def written(file: str, text: str) -> Damage:
    def damage(base: Path) -> None:
        (base / file).write_text(text)

    return damage


def cut(share: float) -> Damage:
    def damage(base: Path) -> None:
        content = (base / WEIGHTS).read_bytes()
        (base / WEIGHTS).write_bytes(content[: int(share * len(content))])

    return damage


def tensors(change: Callable[[Tensors], Tensors]) -> Damage:
    return lambda base: save_file(change(load_file(base / WEIGHTS)), base / WEIGHTS, metadata={"format": "pt"})


def lacking(part: str) -> Damage:
    return tensors(lambda all_of_them: {name: tensor for name, tensor in all_of_them.items() if part not in name})


def having(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Damage:
    return tensors(lambda all_of_them: {**all_of_them, name: torch.zeros(shape, dtype=dtype)})


def linears_as(dtype: torch.dtype) -> Damage:
    return tensors(lambda found: {name: t.to(dtype) if "proj" in name else t for name, t in found.items()})


def index_that_names_more(base: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.layers.0.mlp.gate_proj.bias"] = SHARD
    (base / INDEX).write_text(json.dumps(index))


def pickled(base: Path) -> None:
    torch.save(load_file(base / WEIGHTS), base / "model.pt")
    (base / WEIGHTS).unlink()


def without_vocabulary(base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"] |= {"vocab": {}, "merges": []}
    (base / "tokenizer.json").write_text(json.dumps(content))


LAYER_1 = r"model\.layers\.1\.input_layernorm\.weight, .* and 6 more"
ONE_MODEL = "use config.json and weights of one model$"
DAMAGED = "is truncated or damaged: .*; download it again$"
BROKEN: dict[str, tuple[Damage, str]] = {
    "weights cut in the head": (cut(0.001), rf"model\.safetensors \(\d+ bytes\) {DAMAGED}"),
    "weights cut in the middle": (cut(0.5), rf"model\.safetensors \([\d,]+ bytes\) {DAMAGED}"),
    "weights cut at the end": (cut(0.999), rf"model\.safetensors \([\d,]+ bytes\) {DAMAGED}"),
    "weights empty": (written(WEIGHTS, ""), r"model\.safetensors \(0 bytes\) is truncated or damaged"),
    "weights a pointer": (written(WEIGHTS, POINTER), r"model\.safetensors is a Git LFS pointer .*; run: git lfs pull"),
    "weights nowhere": (without(WEIGHTS), r"holds neither model\.safetensors nor \S+\.index\.json; download the weights$"),
    "weights pickled": (pickled, r"model\.pt is a pickle other than .*; choose a revision with"),
    "config without a type": (edited("config.json", model_type=None), r"config\.json: model_type: found None.*; use a "),
    "config no JSON": (written("config.json", "{model"), r"config\.json cannot be read \("),
    "config of an unknown type": (
        edited("config.json", model_type="perceptron", transformers_version="4.0"),
        rf"config\.json: model_type: 'perceptron' is unknown to the installed Transformers "
        rf"{re.escape(transformers.__version__)} \(written by 4\.0\); check its spelling, or upgrade Transformers$",
    ),
    "config of a newer library": (
        edited("config.json", model_type="llama9", transformers_version="99.1.0"),
        "'llama9' is unknown .* .written by 99.1.0.; check its spelling, or upgrade Transformers$",
    ),
    "config that contradicts itself": (
        edited("config.json", num_attention_heads=5),
        r"config\.json cannot be read: .*64\) is not a multiple of the number of attention heads \(5\); download it again$",
    ),
    "config with a value of another kind": (
        edited("config.json", intermediate_size=[128]),
        r"config\.json cannot be read: .*'intermediate_size' expected int, got list.*; download it again$",
    ),
    "config of no causal language model": (
        edited("config.json", model_type="t5"), "cannot be loaded: .*T5Config.*; use a causal language model",
    ),
    "a pad token beyond the vocabulary": (
        edited("config.json", pad_token_id=320),
        r"config\.json: pad_token_id: 320 is beyond the 320 tokens of vocab_size; set it to null$",
    ),
    "hidden size of another model": (
        edited("config.json", hidden_size=96),
        rf"21 tensors have another shape .*: lm_head\.weight is \(320, 64\) in the file and \(320, 96\) .*; {ONE_MODEL}",
    ),
    "4-bit layers of another size": (
        edited("config.json", intermediate_size=96),
        rf"6 tensors .*: model\.layers\.0\.mlp\.down_proj\.weight is \(64, 128\) in .* and \(64, 96\) .*; {ONE_MODEL}",
    ),
    "one tensor of another shape": (
        having("model.layers.1.self_attn.q_proj.weight", 32, 64),
        rf"1 tensors have .*: model\.layers\.1\.self_attn\.q_proj\.weight is \(32, 64\) in .* \(64, 64\) .*; {ONE_MODEL}",
    ),
    "a layer missing": (lacking("layers.1."), f"the weights lack {LAYER_1}, which would be random; download them again"),
    "one norm missing": (lacking("model.norm"), r"the weights lack model\.norm\.weight, which would be random"),
    "the head missing": (lacking("lm_head"), r"the weights lack lm_head\.weight, which would be random"),
    "a layer too many": (
        edited("config.json", num_hidden_layers=1),
        f"the weights hold {LAYER_1}, but config.json has 1 layers .*; {ONE_MODEL}",
    ),
    "weights in fp8": (linears_as(torch.float8_e4m3fn), r"holds model\.layers\.0\..* as F8_E4M3, .*; use the original"),
    "weights in int8": (linears_as(torch.int8), r"holds model\.layers\.0\..* as I8, .*; use the original 16-bit model$"),
    "no tokenizer": (without("tokenizer.json"), r"no usable tokenizer: .*; download tokenizer\.json and tokenizer_config"),
    "a tokenizer cut": (written("tokenizer.json", '{"version'), r"no usable tokenizer: .*; download tokenizer\.json and "),
    "a tokenizer without vocabulary": (without_vocabulary, r"no vocabulary beside its 4 added .*; download tok"),
}  # fmt: skip
BROKEN_SHARDS: dict[str, tuple[Damage, str]] = {
    "a shard missing": (without(SHARD), rf"{SHARD} is missing, which {INDEX} names; download it$"),
    "a shard cut": (written(SHARD, "{"), rf"{SHARD} \(1 bytes\) is truncated or damaged"),
    "an index that names more": (
        index_that_names_more, rf"{SHARD} lacks model\.layers\.0\.mlp\.gate_proj\.bias, which {INDEX} names; download",
    ),
    "an index no JSON": (written(INDEX, "{"), rf"{INDEX} cannot be read \(JSONDecodeError: .*\); download it again$"),
    "an index without a map": (written(INDEX, "{}"), rf"{INDEX} cannot be read \(KeyError: 'weight_map'\); download it"),
    "an index of nothing": (written(INDEX, '{"weight_map": {}}'), rf"{INDEX} names no tensor; download it again$"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_base_is_one_line(name: str, pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    damage, message = BROKEN[name]
    base = Path(shutil.copytree(pico_llama, tmp_path / "base"))
    damage(base)
    line = refused(base, tmp_path / "run", capsys)
    assert re.search(message, line), line


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_broken_shards_are_one_line(name: str, sharded: Path, tmp_path: Path, capsys: Capture) -> None:
    damage, message = BROKEN_SHARDS[name]
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    damage(base)
    line = refused(base, tmp_path / "run", capsys)
    assert line.startswith("model.model_name_or_path: base")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    "name", ["4-bit layers of another size", "a layer missing", "a layer too many", "weights in int8"]
)
def test_16_bit_loading_has_the_same_checks(name: str, pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    damage, message = BROKEN[name]
    base = Path(shutil.copytree(pico_llama, tmp_path / "base"))
    damage(base)
    line = refused(base, tmp_path / "run", capsys, "quantization.load_in_4bit=false")
    assert re.search(message, line), line


def test_two_sets_of_weights_are_refused_by_training_and_merging(
    sharded: Path, pico_llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    shutil.copyfile(pico_llama / WEIGHTS, base / WEIGHTS)
    expected = rf"two sets of weights, {WEIGHTS} and the 5 files of {INDEX}; move one of them out of the folder$"
    line = refused(base, tmp_path / "run", capsys)
    assert re.search(expected, line), line
    with pytest.raises(MergeError, match=expected):
        BaseCheckpoint(base)


# --- unusual and harmless ---------------------------------------------------------------------------------------------


def test_unused_tensors_integer_buffers_and_an_index_of_one_file_are_harmless(
    pico_llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = Path(shutil.copytree(pico_llama, tmp_path / "base"))
    (base / "generation_config.json").unlink()
    having("vision_tower.layers.30.weight", 8, 8)(base)
    having("model.position_ids", 1, 256, dtype=torch.int64)(base)
    names = dict.fromkeys(load_file(base / WEIGHTS), WEIGHTS)
    (base / INDEX).write_text(json.dumps({"weight_map": names}))
    assert train(base, tmp_path / "run") == 0
    line = "weights: unused tensors in the files: model.position_ids, vision_tower.layers.30.weight (not part of the model)"
    assert capsys.readouterr().err.count(line) == 1


def test_shards_train_like_one_file(sharded: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train(sharded, tmp_path / "run") == 0
    assert "unused tensors" not in capsys.readouterr().err


def test_token_ids_beyond_the_embedding_are_refused(tmp_path: Path, capsys: Capture) -> None:
    base = build_pico(tmp_path / "base", vocab_size=300)
    assert train(base, tmp_path / "run") == 2
    assert "model.new_tokens" in capsys.readouterr().err.splitlines()[-1]


def test_a_regular_expression_that_matches_the_head_warns(pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train(pico_llama, tmp_path / "run", "lora.target_modules='.*(q_proj|lm_head)'") == 0
    assert "also matches the output head lm_head, which has no adapter" in capsys.readouterr().err


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapter_of_another_base_or_other_shapes_is_one_line(pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    base = build_pico(tmp_path / "wide", hidden_size=96)
    adapter = train_run(tmp_path / "first", base, "train.max_steps=1").adapter
    line = refused(pico_llama, tmp_path / "other", capsys, f"lora.adapter_path={adapter}")
    assert re.search(r"adapter_config\.json: base_model_name_or_path: 'wide' is another base than", line)
    renamed = Path(shutil.copytree(pico_llama, tmp_path / "again" / "wide"))
    line = refused(renamed, tmp_path / "shapes", capsys, f"lora.adapter_path={adapter}")
    assert re.search(r"does not fit the base model: \d+ tensors differ, e\.g\. \S+lora_B\S* has shape \(96, 8\)", line)


def test_adapter_set_as_base_names_lora_adapter_path(pico_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter = train_run(tmp_path / "first", pico_llama, "train.max_steps=1").adapter
    line = refused(adapter, tmp_path / "other", capsys)
    assert re.search(r"holds an adapter and no model; .* this folder as lora\.adapter_path$", line), line
