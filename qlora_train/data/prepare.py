"""The data stage's entry: sources -> rows -> tokens and masks -> train and eval, with nothing lost in silence.

It needs the tokenizer only, so that bad data stops a run before any weights are loaded.
"""

import datetime
import hashlib
import json
import logging
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_train.config.schema import DataSection, Source
from qlora_train.data.chat import is_dated
from qlora_train.data.formats import read_rows
from qlora_train.data.template import Renderer
from qlora_train.data.types import Example, PreparedData, Row, Unusable, UnusableRowError
from qlora_train.errors import DataError

log = logging.getLogger("qlora_train")

NUM_NAMED_ROWS = 5
"""Rows of one kind that a message names."""
NUM_NAMED_REASONS = 8
"""Reasons that a message gives, the most frequent ones first."""


@dataclass(slots=True)
class _Part:
    """The rows of `data.train` or of `data.eval`, each usable one beside what it says (`content_digest`)."""

    key: str
    examples: list[Example] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)


def prepare_data(data: DataSection, tokenizer: Any, seed: int, *, date: datetime.date | None = None) -> PreparedData:
    """Read, render and split the rows.

    Args:
        data: the section of the config.
        tokenizer: a fast Transformers tokenizer, with a chat template unless the rows are plain text.
        seed: decides which rows are held out when `data.eval` is a share.
        date: the day that a chat template which writes the current date is rendered for; None is today. A run that is
            to be resumed or measured later must remember it and pass it again, or its tokens change overnight.

    Raises:
        ConfigError: `data.columns` does not fit `data.format`.
        DataError: a source is missing or malformed, more rows than `data.max_dropped` cannot be used, or nothing is
            left to train on or to hold out.
    """
    day = date or datetime.date.today()
    renderer = Renderer(tokenizer, data, day)
    parts = [_read_part(data.train, data, renderer, "data.train")]
    if isinstance(data.eval, tuple):
        parts.append(_read_part(data.eval, data, renderer, "data.eval"))
        _warn_of_overlap(*parts)
    _log_date(tokenizer, parts, day)
    if renderer.merged_rows:
        log.warning(
            "%d rows train on a prompt whose last tokens differ from those of inference: a token reaches over the border "
            "and counts as the answer's (begin answers, not end prompts, with white space), or the template's "
            "generation prompt says more than its turns: %s",
            len(renderer.merged_rows), named(renderer.merged_rows),
        )  # fmt: skip
    train, held_out = parts[0].examples, parts[1].examples if len(parts) > 1 else []
    if isinstance(data.eval, float):
        train, held_out = _split(parts[0], data.eval, seed)
    dropped = Counter(f"{part.key}: {row.reason}" for part in parts for row in part.unusable)
    return PreparedData(tuple(train), tuple(held_out), dict(dropped), fingerprint(train, held_out))


def _log_date(tokenizer: Any, parts: Sequence[_Part], day: datetime.date) -> None:
    if is_dated(tokenizer) and any(example.answer is not None for part in parts for example in part.examples):
        log.info("chat template: writes the current date; every row is rendered for %s", day.isoformat())


def _read_part(sources: Sequence[Source], data: DataSection, renderer: Renderer, key: str) -> _Part:
    part = _Part(key)
    for row in read_rows(sources, data, key):
        if isinstance(row, Unusable):
            part.unusable.append(row)
            continue
        try:
            part.examples.append(renderer.render(row))
            part.digests.append(content_digest(row))
        except UnusableRowError as error:
            part.unusable.append(Unusable.because(row.where, error))
    _report_unusable(part, data.max_dropped)
    log.info(
        "%s: %d rows (%d of them repeat an earlier one), %d tokens, %d of them with loss, the longest row %d tokens",
        key,
        len(part.examples),
        len(part.digests) - len(set(part.digests)),
        sum(len(example.input_ids) for example in part.examples),
        sum(sum(example.loss_mask) for example in part.examples),
        max(len(example.input_ids) for example in part.examples),
    )
    return part


def _report_unusable(part: _Part, max_dropped: float) -> None:
    """Log the rows that cannot be used; stop when they are too many or leave nothing."""
    num_unusable = len(part.unusable)
    num_rows = num_unusable + len(part.examples)
    if not num_unusable:
        return
    reasons = _reasons(part.unusable)
    num_allowed = int(max_dropped * num_rows + 1e-9)  # 0.29 * 100 is 28.999999999999996
    share = f"{num_unusable} of {num_rows} rows cannot be used"
    if num_unusable > num_allowed:
        raise DataError(
            f"{part.key}: {share}, data.max_dropped ({max_dropped:g}) allows {num_allowed}: {reasons}; correct the rows "
            "or raise data.max_dropped"
        )
    if not part.examples:
        raise DataError(f"{part.key}: no row can be used: {reasons}")
    log.warning("%s: %s and are left out: %s", part.key, share, reasons)


def _reasons(unusable: Sequence[Unusable]) -> str:
    """Count the rows by reason, the most frequent first, and name a few of each."""
    places: dict[str, list[str]] = defaultdict(list)
    for row in unusable:
        places[row.reason].append(row.where)
    ordered = sorted(places.items(), key=lambda item: -len(item[1]))
    told = [f"{len(where)} x {reason} ({named(where)})" for reason, where in ordered[:NUM_NAMED_REASONS]]
    rest = [place for _, where in ordered[NUM_NAMED_REASONS:] for place in where]
    return "; ".join([*told, f"{len(rest)} x other reasons ({named(rest)})"] if rest else told)


def named(where: Sequence[str]) -> str:
    """Join the first few places, and say how many more there are."""
    more = len(where) - NUM_NAMED_ROWS
    return ", ".join(where[:NUM_NAMED_ROWS]) + (f" and {more} more" if more > 0 else "")


def content_digest(row: Row) -> bytes:
    """Return a digest of what the row says, whatever file and line it stands in."""
    content = json.dumps([row.messages, row.prompt, row.text, row.loss_from], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(content.encode()).digest()


def is_held_out(digest: bytes, share: float, seed: int) -> bool:
    """Decide a row's side from its content and the seed alone: other rows come and go without moving it."""
    number = int.from_bytes(hashlib.sha256(f"{seed}:".encode() + digest).digest()[:8], "big")
    return number < share * 2**64


def _split(part: _Part, share: float, seed: int) -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    held_out: list[Example] = []
    for example, digest in zip(part.examples, part.digests, strict=True):
        (held_out if is_held_out(digest, share, seed) else train).append(example)
    for name, side in (("to train on", train), ("to hold out", held_out)):
        if not side:
            raise DataError(
                f"data.eval: a share of {share:g} of {len(part.examples)} rows leaves none {name} (rows are chosen by "
                "a hash, equal rows together); change the share, give more rows, or name a file in data.eval"
            )
    log.info("data.eval: %d rows to train on, %d held out", len(train), len(held_out))
    return train, held_out


def _warn_of_overlap(train: _Part, held_out: _Part) -> None:
    seen = set(train.digests)
    both = [
        example.where for example, digest in zip(held_out.examples, held_out.digests, strict=True) if digest in seen
    ]
    if both:
        log.warning(
            "%d of %d rows of data.eval stand in data.train too, so the evaluation flatters: %s",
            len(both), len(held_out.examples), named(both),
        )  # fmt: skip


def fingerprint(*parts: Iterable[Example]) -> str:
    """Return the sha256 of all tokens and masks, in order; it changes when anything that is trained on does."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            digest.update(len(example.input_ids).to_bytes(8, "little"))
            digest.update(array("q", example.input_ids).tobytes())
            digest.update(bytes(example.loss_mask))
        digest.update(b"end of part")
    return digest.hexdigest()
