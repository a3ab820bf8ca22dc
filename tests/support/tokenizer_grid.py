"""Tokenizers of bases as they are on the Hub: what `tokenizer.json` says, under class names that promise something else.

A base of the grid is a split rule (what the file does with a text), a model type and the class that
`tokenizer_config.json` names. Files are written by `tokenizers` alone, never by Transformers, so that what Transformers
would change when it saves is still there.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.pico import CHATML, COMMON, CORPUS, TURN_END, TURN_START

VOCAB_SIZE = 420
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", TURN_START, TURN_END)
TEXTS = (
    *CORPUS,
    "[INST] 494 [/INST] 12 4 94 49 2024 19 20 0 00 000 1000 12345",
    "a\n\nb\n\n\nc   d    e\n x",
    "Hello hello WORLD don't 'll",
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace("{1,3}", "")


def _byte_level(split: Any, normalizer: Any = None) -> Tokenizer:
    """Return an untrained byte-level BPE tokenizer that splits texts with `split` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _sentencepiece(normalizer: Any = None, split: Any = None) -> Tokenizer:
    """Return an untrained BPE tokenizer in the manner of SentencePiece: spaces are U+2581, unknown characters bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _spaces(*before: Any) -> Any:
    return normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])


SPLIT_RULES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: _byte_level(_split(_GPT2)),
    "cl100k": lambda: _byte_level(_split(_CL100K)),
    "qwen2": lambda: _byte_level(_split(_QWEN2), normalizers.NFC()),
    "digits": lambda: _byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _split(_GPT2)])),
    "prepend": lambda: _sentencepiece(_spaces(normalizers.Prepend("\u2581"))),
    "first": lambda: _sentencepiece(None, pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)),
    "always": lambda: _sentencepiece(None, pre_tokenizers.Metaspace("\u2581", prepend_scheme="always", split=False)),
    "never": lambda: _sentencepiece(_spaces()),
    "gemma": lambda: _sentencepiece(
        normalizers.Replace(" ", "\u2581"), pre_tokenizers.Split(" ", "merged_with_previous")
    ),
}
"""What the file does with a text, by the tokenizer that is known for it."""
BYTE_LEVEL = ("gpt2", "cl100k", "qwen2", "digits")
PAIRS: tuple[tuple[str, str], ...] = (
    ("llama", "PreTrainedTokenizerFast"),
    ("llama", "LlamaTokenizer"),
    ("llama", "GPT2Tokenizer"),
    ("llama", "GPTNeoXTokenizerFast"),
    ("llama", "CodeGenTokenizerFast"),
    ("llama", "Qwen2Tokenizer"),
    ("llama", "GemmaTokenizerFast"),
    ("llama", "CohereTokenizerFast"),
    ("qwen2", "Qwen2Tokenizer"),
    ("qwen2", "PreTrainedTokenizerFast"),
    ("qwen3", "Qwen2TokenizerFast"),
    ("gemma2", "GemmaTokenizer"),
    ("gemma2", "LlamaTokenizer"),
    ("mistral", "LlamaTokenizerFast"),
    ("phi3", "LlamaTokenizerFast"),
    ("olmo2", "GPT2Tokenizer"),
)
"""Model types and the tokenizer classes that their checkpoints name."""


@functools.cache
def trained(split_rule: str) -> str:
    """Return the content of a trained tokenizer.json."""
    tokenizer = SPLIT_RULES[split_rule]()
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    bytes_ = [] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE + len(bytes_) // 2, special_tokens=[*SPECIAL, *bytes_], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else ["\u2581"],
    )  # fmt: skip
    splits = tokenizer.pre_tokenizer
    if not byte_level:  # merges within words: a text without splits is one word
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always")
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    if not byte_level:
        whole = SPLIT_RULES[split_rule]()
        content["pre_tokenizer"] = None if splits is None else json.loads(whole.to_str())["pre_tokenizer"]
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in bytes_]
    return json.dumps(content)


def write_tokenizer(
    folder: Path,
    split_rule: str,
    tokenizer_class: str,
    *,
    added: tuple[str, ...] = (),
    template: str | dict[str, str] | None = CHATML,
    **settings: Any,
) -> Path:
    """Write tokenizer.json and tokenizer_config.json as a checkpoint of Transformers 4 has them.

    Args:
        folder: made when missing.
        split_rule: a key of SPLIT_RULES.
        tokenizer_class: as tokenizer_config.json names it.
        added: tokens behind the vocabulary.
        template: chat template; a mapping gives several by name.
        settings: go into tokenizer_config.json, e.g. `legacy`; None leaves a setting out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(trained(split_rule))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": TURN_END, "pad_token": "<pad>"}
    decoder = {
        str(i): {**json.loads(json.dumps(token.__getstate__()))}
        for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    templates = template if isinstance(template, str) else _listed(template or {})
    content = {
        "tokenizer_class": tokenizer_class, "model_max_length": COMMON["max_position_embeddings"],
        "clean_up_tokenization_spaces": False, "added_tokens_decoder": decoder, **special,
        "chat_template": templates or None, **settings,
    }  # fmt: skip
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def sentencepiece_model(split_rule: str) -> bytes:
    """Return the tokenizer.model that belongs to a tokenizer.json in the manner of SentencePiece."""
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece

    model = sentencepiece.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = sentencepiece.TrainerSpec.BPE, True
    model.normalizer_spec.add_dummy_prefix = split_rule in ("prepend", "first", "always")
    model.normalizer_spec.remove_extra_whitespaces = False
    kinds = model.SentencePiece
    special = {"<unk>": kinds.UNKNOWN, **dict.fromkeys(SPECIAL[1:], kinds.CONTROL)}
    vocabulary: dict[str, int] = json.loads(trained(split_rule))["model"]["vocab"]
    for token, i in sorted(vocabulary.items(), key=lambda entry: entry[1]):
        kind = special.get(token, kinds.BYTE if token.startswith("<0x") else kinds.NORMAL)
        model.pieces.add(piece=token, score=-i if kind == kinds.NORMAL else 0, type=kind)
    content: bytes = model.SerializeToString()
    return content


def _listed(templates: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]
