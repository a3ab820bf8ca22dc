"""The tokenizer of a GGUF file, built as llama.cpp reads it.

A file has the vocabulary, its merges or scores, the type of each token, and a name for the rule that splits text before
merging. Transformers' reader splits like GPT-2 where it does not know the name; here an unknown name refuses the file.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_train.architectures.gguf_header import GGUFHeader

logger = logging.getLogger(__name__)

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Values of `tokenizer.ggml.token_type`."""

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LINES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LINES
_QWEN3_5 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{_PATHS}"
_O200K = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_PATHS}"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """A rule that splits text: patterns in the order in which they split what the one before left.

    Attributes:
        ignore_merges: a piece that is a token is that token, before any merge.
        adds_bos: if the file does not say it.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2 = _Split((_WORDS,))
_DIGITS = _Split((r"\p{N}", _WORDS))
_LLAMA3 = _Split((_CL100K,), ignore_merges=True, adds_bos=True)
SPLITS: Mapping[str, _Split] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum"), _GPT2),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _Split((_CL100K,))),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        _Split((_QWEN2,)),
    ),
    "qwen35": _Split((_QWEN3_5,)),
    "tekken": _Split((_TEKKEN,), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _Split((_O200K,))),
    "deepseek-coder": _Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense"),
        _Split((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)),
    ),
    "falcon": _Split((r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _Split((_BLOOM,))),
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
"""llama.cpp's rules by `tokenizer.ggml.pre`."""


def gguf_tokenizer(header: GGUFHeader) -> PreTrainedTokenizerFast:
    """Return the tokenizer, with special tokens and chat template.

    Raises:
        ModelError: a kind of tokenizer or a split rule that is not known.
    """
    kind = header.tokenizer.get("model")
    tokens = header.vocabulary("tokens")
    if kind not in ("gpt2", "llama") or tokens is None or len(set(tokens)) != len(tokens):
        raise header.refused(f"holds a tokenizer of kind {kind!r}; converted are 'gpt2' and 'llama' with unique tokens")
    types = header.vocabulary("token_type") or [_NORMAL] * len(tokens)
    build = _byte_level if kind == "gpt2" else _sentencepiece
    backend, adds_bos = build(header, tokens, types)
    backend.add_special_tokens(_added(tokens, types, _CONTROL, special=True))
    backend.add_tokens(_added(tokens, types, _USER_DEFINED, special=False))
    special = {
        f"{name}_token": tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := header.tokenizer.get(f"{key}_token_id")) is not None
    }
    _add_ends(backend, header, special, adds_bos)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False,
        **{"bos_token": None, "eos_token": None, **special},
    )  # fmt: skip
    tokenizer.chat_template = header.chat_template
    return tokenizer


def _byte_level(header: GGUFHeader, tokens: Sequence[str], _types: Sequence[int]) -> tuple[Tokenizer, bool]:
    name = header.tokenizer.get("pre", "default")
    if name not in SPLITS:
        raise header.refused(f"splits text by a rule that is not known here (tokenizer.ggml.pre: {name!r})")
    if name == "default":
        logger.warning(
            "%s: no rule for splitting text (tokenizer.ggml.pre); llama.cpp's default is used", header.path.name
        )
    split = SPLITS[name]
    merges = [tuple(merge.split(" ")) for merge in header.vocabulary("merges") or ()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, split.adds_bos


def _sentencepiece(header: GGUFHeader, tokens: Sequence[str], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    scores = header.vocabulary("scores")
    normal = [index for index, kind in enumerate(types) if kind == _NORMAL]
    if scores is None or len({scores[index] for index in normal}) < 2:
        raise header.refused("has no scores of its tokens, without which text cannot be split as in training")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = next((tokens[index] for index, kind in enumerate(types) if kind == _UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=list(_merges(vocabulary, scores, normal)), fuse_unk=True, unk_token=unknown,
            byte_fallback=_BYTE in types,
        )
    )  # fmt: skip
    has_prefix = header.tokenizer.get("add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], normal: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yield the pairs that make a token, from the highest score to the lowest, as SentencePiece merges them."""
    tokens = list(vocabulary)
    for index in sorted(normal, key=lambda index: -scores[index]):
        token = tokens[index]
        for end in range(1, len(token)):
            if token[:end] in vocabulary and token[end:] in vocabulary:
                yield token[:end], token[end:]


def _added(tokens: Sequence[str], types: Sequence[int], kind: int, *, special: bool) -> list[AddedToken]:
    chosen = (token for token, found in zip(tokens, types, strict=True) if found == kind)
    return [AddedToken(token, normalized=False, special=special) for token in chosen]


def _add_ends(backend: Tokenizer, header: GGUFHeader, special: Mapping[str, str], adds_bos: bool) -> None:
    """Add the bos and eos tokens that the file asks for to every text."""
    bos, eos = special.get("bos_token"), special.get("eos_token")
    before = [bos] if bos and header.tokenizer.get("add_bos_token", adds_bos) else []
    after = [eos] if eos and header.tokenizer.get("add_eos_token", False) else []
    if before or after:
        ids: list[Any] = [(token, backend.token_to_id(token)) for token in (*before, *after)]
        backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
