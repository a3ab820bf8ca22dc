"""Tokenizers: the run, its files and the base's tokenizer.json give the same tokens, or the run is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.config import ModelSection, load_config
from qlora_train.data.held_out_rows import load_rows
from qlora_train.evaluation.generation import generate_answers
from qlora_train.export.export_formats import ExportRequest
from qlora_train.export.finished_run import open_finished_run
from qlora_train.export.merging.auxiliary_files import write_auxiliary_files
from qlora_train.export.vllm import export_vllm
from qlora_train.inference.chat import Chat, ChatSettings
from qlora_train.inference.eval_report import EvalSettings, evaluate
from qlora_train.inference.run_models import merged_model, run_models
from qlora_train.models import load_tokenizer, resolve_base
from qlora_train.models.token_probes import TokenProbe, differences, encode, hard_texts
from qlora_train.models.tokenizer import check_can_be_saved, save_tokenizer
from qlora_train.pipeline import run
from qlora_train.runs import RunFolder
from qlora_train.utils.errors import ConfigError, DataError, ModelError
from tests.support.merging import merge
from tests.support.pico import CHATML, build_config, build_pico
from tests.support.runs import make_config, train_run
from tests.support.tokenizer_grid import PAIRS, SPLIT_RULES, VOCAB_SIZE, write_tokenizer

Pico = Callable[..., Path]
NUM_ROWS = VOCAB_SIZE + 128
TOOLS_TEMPLATE = "{% for tool in tools %}<tool>{{ tool | tojson }}</tool>\n{% endfor %}" + CHATML


def base_of(folder: Path, rule: str, model_type: str, tokenizer_class: str, **settings: Any) -> Path:
    """Write a base without weights."""
    write_tokenizer(folder, rule, tokenizer_class, **settings)
    build_config(model_type, vocab_size=NUM_ROWS).save_pretrained(folder)
    return folder


def tokenizer_of(folder: Path, **model: Any) -> Any:
    section = ModelSection(model_name_or_path=str(folder), **model)
    return load_tokenizer(resolve_base(section, weights=False), section)


def ids_of_file(folder: Path, texts: list[str]) -> list[tuple[int, ...]]:
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tuple(file.encode(text, add_special_tokens=False).ids) for text in texts]


def rows_of_run(run_folder: RunFolder) -> list[list[int]]:
    return [row.input_ids.tolist() for row in load_rows(run_folder.rows).train]


def write_merged(base: Path, adapter: Path, folder: Path) -> Path:
    """Write all of a merged folder but its weights."""
    folder.mkdir()
    config = build_config(json.loads((base / "config.json").read_text())["model_type"], vocab_size=NUM_ROWS)
    write_auxiliary_files(
        folder, base, adapter, config, tied=False, num_embeddings=NUM_ROWS, dtype=torch.bfloat16,
        trust_remote_code=False,
    )  # fmt: skip
    return folder


# --- the run's tokens are those of tokenizer.json -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "model_type", "tokenizer_class", "legacy", "text", "tokens"),
    [
        ("cl100k", "llama", "GPT2Tokenizer", None, "a\n\nb", ["a", "\u010a\u010a", "b"]),
        ("gpt2", "qwen2", "PreTrainedTokenizerFast", None, "494", ["4", "94"]),
        ("prepend", "llama", "LlamaTokenizer", False, "<s>[INST]", ["<s>", "\u2581[INST]"]),
    ],
)
def test_run_tokenizes_like_tokenizer_json(
    rule: str, model_type: str, tokenizer_class: str, legacy: bool | None, text: str, tokens: list[str],
    tmp_path: Path, messages: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    base = base_of(tmp_path, rule, model_type, tokenizer_class, legacy=legacy)
    changed = AutoTokenizer.from_pretrained(base)
    tokenizer = tokenizer_of(base)
    assert encode(changed, text) != encode(tokenizer, text)
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, text)) == tokens
    assert f"tokenizer: tokenizer.json unchanged ({type(changed).__name__} gives" in messages.text
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.padding_side, tokenizer.model_input_names) == (changed.padding_side, changed.model_input_names)


@pytest.mark.parametrize(("model_type", "tokenizer_class"), PAIRS, ids=map(" ".join, PAIRS))
def test_run_adapter_and_merged_tokenize_equally_or_merging_is_refused(
    model_type: str, tokenizer_class: str, tmp_path: Path
) -> None:
    for rule in SPLIT_RULES:
        for legacy in (True, False):
            folder = tmp_path / f"{rule}-{legacy}"
            base = base_of(folder / "base", rule, model_type, tokenizer_class, legacy=legacy)
            tokenizer = tokenizer_of(base)
            texts = hard_texts(tokenizer)
            assert [encode(tokenizer, text) for text in texts] == ids_of_file(base, texts)
            probes = [TokenProbe.of(tokenizer, text, add_special_tokens=True) for text in texts]
            save_tokenizer(tokenizer, folder / "adapter")
            assert differences(AutoTokenizer.from_pretrained(folder / "adapter"), probes) == []
            if model_type == "qwen2" and rule != "qwen2":  # of which Transformers knows no other tokenizer
                with pytest.raises(
                    ConfigError, match="from a merged folder AutoTokenizer reloads a different tokenizer"
                ):
                    check_can_be_saved(tokenizer, base, merged=True, trust_remote_code=False)
                continue
            check_can_be_saved(tokenizer, base, merged=True, trust_remote_code=False)
            merged = write_merged(base, folder / "adapter", folder / "merged")
            assert differences(AutoTokenizer.from_pretrained(merged), probes) == []


def test_legacy_setting_lost_by_saving_keeps_its_effect(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "always", "llama", "LlamaTokenizer", legacy=True)
    tokenizer = tokenizer_of(base)
    assert type(tokenizer).__name__ == "LlamaTokenizer", "it has the tokens of the file"
    tokenizer.save_pretrained(tmp_path / "plain")
    assert "legacy" not in json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    save_tokenizer(tokenizer, tmp_path / "adapter")
    merged = write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    for folder in (tmp_path / "adapter", merged):
        again = AutoTokenizer.from_pretrained(folder)
        assert again.convert_ids_to_tokens(encode(again, "<s>[INST] x")) == ["<s>", "\u2581[INST]", "\u2581x"]


def test_added_tokens_match_as_in_tokenizer_json(tmp_path: Path) -> None:
    base = base_of(tmp_path, "gpt2", "llama", "GPT2Tokenizer", added=tuple(f"<|{i}|>" for i in range(100)))
    content = json.loads((base / "tokenizer.json").read_text())
    settings = json.loads((base / "tokenizer_config.json").read_text())
    number = next(token for token in content["added_tokens"] if token["content"] == "<|50|>")
    number["rstrip"] = True
    del settings["added_tokens_decoder"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert [encode(tokenizer_of(base), "<|50|> x")] == ids_of_file(base, ["<|50|> x"])


# --- tokens beyond the embedding ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer has a [PAD] and a <|tool|> that the embedding has no rows for."""
    folder = build_pico(tmp_path_factory.mktemp("longer") / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_pad_token_beyond_the_embedding_trains_merges_and_evaluates(
    longer: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    run = train_run(tmp_path, longer, "train.max_steps=2", "export.merge=true")
    assert "pad token '<|pad|>' ('[PAD]' (320) is beyond the 320 embedding rows)" in messages.text
    results = evaluate(run.path, EvalSettings(models=("adapter", "merged"), max_new_tokens=2))
    assert {"adapter", "merged"} <= set(results)
    model, tokenizer = merged_model(run, trust_remote_code=False)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")
    assert model.get_input_embeddings().num_embeddings == 320
    assert encode(tokenizer, "[PAD]") == (320,)
    with pytest.raises(DataError, match=r"no rows for: '\[PAD\]' \(320\)"):
        generate_answers(model, tokenizer, ["a [PAD]"], max_new_tokens=1, batch_size=1)
    talk = Chat(model, tokenizer, ChatSettings(), open_finished_run(run.path), lambda text: None)
    talk.handle("a [PAD]")
    assert "the model's embedding has no rows for '[PAD]' (320); rephrase the question without" in messages.text
    assert talk.turns == []


def test_tokens_beyond_the_embedding_are_refused_by_name(longer: Path, tmp_path: Path) -> None:
    row = {"prompt": "a <|tool|> b", "completion": "c"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n" + json.dumps(row) + "\n")
    config = make_config(tmp_path, longer, "data.eval=0.5", "data.max_dropped=0.9")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*'<\|tool\|>' \(321\).*model\.new_tokens: \['<\|tool\|>'\]"):
        run(config)
    assert not (tmp_path / "run" / "adapter").exists()


def test_new_token_beyond_the_embedding_trains_and_merges(longer: Path, tmp_path: Path) -> None:
    run = train_run(
        tmp_path, longer, "model.new_tokens=['<|tool|>']", "train.max_steps=2", "quantization.load_in_4bit=false",
        "quantization.bnb_4bit_compute_dtype=float32", "export.merge=false",
    )  # fmt: skip
    finished = open_finished_run(run.path)
    [(_, adapter, tokenizer)] = run_models(finished, ["adapter"])
    ids = torch.tensor([tokenizer("a <|tool|>[PAD] b")["input_ids"]])
    assert {320, 321} <= set(ids[0].tolist())
    merge(
        longer, run.adapter, tmp_path / "merged", merge_base="original", quantization=finished.config.quantization,
        dtype=torch.float32,
    )  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=2e-4, rtol=0)


# --- chat templates -------------------------------------------------------------------------------------------------------


def test_tool_use_template_survives_from_base_to_merged(tmp_path: Path) -> None:
    base = build_pico(tmp_path / "base")
    (base / "chat_template.jinja").write_text(CHATML)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS_TEMPLATE)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    turns = [{"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}]
    rows = [{"messages": [{"role": "user", "content": f"1 + {i}"}, turns[1]], "tools": tools} for i in range(2, 22)]
    lines = [json.dumps(row) for row in [*rows, *({"messages": row["messages"]} for row in rows)]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    run = train_run(tmp_path, base, "train.max_steps=2", "export.merge=true")
    own = AutoTokenizer.from_pretrained(base)
    expected = own.apply_chat_template(turns, tools=tools, tokenize=False)
    assert expected.startswith("<tool>")
    for folder in (run.adapter, run.merged):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template(turns, tools=tools, tokenize=False) == expected
        assert tokenizer.apply_chat_template(turns, tokenize=False) == own.apply_chat_template(turns, tokenize=False)
    source = resolve_base(ModelSection(model_name_or_path=str(base)))
    [exported] = export_vllm(ExportRequest(run, load_config(run.config_file), source))
    assert AutoTokenizer.from_pretrained(exported).chat_template == tokenizer_of(base).chat_template
    trained = [tokenizer_of(base).decode(ids) for ids in rows_of_run(run)]
    assert {text.startswith("<tool>") for text in trained} == {True, False}


@pytest.mark.parametrize("listed", [True, False])
def test_templates_named_in_tokenizer_config_survive(listed: bool, tmp_path: Path) -> None:
    templates = {"default": CHATML, "tool_use": TOOLS_TEMPLATE}
    base = base_of(tmp_path / "base", "gpt2", "llama", "GPT2Tokenizer", template=templates)
    if not listed:
        path = base / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    tokenizer = tokenizer_of(base)
    assert tokenizer.chat_template == templates
    save_tokenizer(tokenizer, tmp_path / "adapter")
    merged = write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(merged).chat_template == templates


def test_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path, "gpt2", "llama", "GPT2Tokenizer", template={"tool_use": TOOLS_TEMPLATE})
    with pytest.raises(ModelError, match=r"the chat templates tool_use and no default one; set model\.chat_template"):
        tokenizer_of(base)
    assert tokenizer_of(base, chat_template="chatml").chat_template.count("im_start") > 0


def test_processor_template_reaches_adapter_and_merged(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gpt2", "llama", "GPT2Tokenizer", template=None)
    (base / "chat_template.json").write_text(json.dumps({"chat_template": TOOLS_TEMPLATE}))
    save_tokenizer(tokenizer_of(base), tmp_path / "adapter")
    merged = write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    for folder in (tmp_path / "adapter", merged):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TOOLS_TEMPLATE
