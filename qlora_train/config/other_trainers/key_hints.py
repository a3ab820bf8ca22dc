"""Answers for errors about keys that other trainers have, and about words of other programs."""

import re
from collections.abc import Iterator

from qlora_train.config.other_trainers import transformers_arguments as shared
from qlora_train.config.other_trainers.all_trainers import OTHER_TRAINERS
from qlora_train.config.other_trainers.key_mapping import KeyMapping, OtherTrainer, lost, to

COMMON_WORDS: dict[str, KeyMapping] = {
    **dict.fromkeys(("model_id", "base"), to("model.model_name_or_path")),
    **dict.fromkeys((f"model.{name}" for name in ("name", "id", "path", "base")), to("model.model_name_or_path")),
    **dict.fromkeys((f"data.{name}" for name in ("path", "file", "files", "data_files")), to("data.train")),
    **dict.fromkeys((f"datasets[].{name}" for name in ("file", "files", "file_name")), to("data.train[].path")),
    **dict.fromkeys(("train_file", "train_data", "train_path"), to("data.train")),
    **dict.fromkeys(("eval_file", "validation", "validation_file"), to("data.eval")),
    "prompt_template": to("model.chat_template"),
    "load_in_4_bit": to("quantization.load_in_4bit"),
    **dict.fromkeys(("rank", "lora_rank"), to("lora.r")),
    "alpha": to("lora.lora_alpha"),
    "dropout": to("lora.lora_dropout"),
    **dict.fromkeys(("gradient_clipping", "grad_clip"), to("train.max_grad_norm")),
    **dict.fromkeys(("max_seq_len", "max_tokens"), to("data.max_length")),
    **dict.fromkeys(("distributed_type", "data_parallel"), to("parallel.strategy")),
    **dict.fromkeys(("num_gpus", "n_gpu", "gpus", "devices"), to("parallel.processes")),
    "deepspeed_config": lost(shared.NO_DEEPSPEED),
    "zero_stage": lost(shared.NO_DEEPSPEED),
    **dict.fromkeys(("cp_size", "sp_size"), lost(shared.NO_CONTEXT_PARALLEL)),
    **dict.fromkeys(("tp_size", "pp_size", "pipeline_parallel_size"), lost(shared.NO_TENSOR_PARALLEL)),
}
"""Names of other programs, such as accelerate's and DeepSpeed's files."""
MAX_ANSWERS = 3


def key_hint(key: str, *, whole: bool = False, patterns: bool = False) -> str | None:
    """Return what a key of other trainers is here, or None if none has it.

    Args:
        key: dotted, as in their file; an index such as `[0]` is ignored.
        whole: only a key with all its parts, not the section it is, or one that ends like it.
        patterns: with `whole`, also keys that a trainer's table has as a pattern, such as `checkpointer.*`.
    """
    if word := COMMON_WORDS.get(_normalised(key)):
        return word.hint()
    answers: dict[str, list[str]] = {}
    for trainer in OTHER_TRAINERS.values():
        name = _normalised(key)
        exact = trainer.mapping_of(name) if patterns else trainer.keys.get(name)
        if row := exact if whole else next(_rows(trainer, name), None):
            answers.setdefault(row.hint(), []).append(trainer.title)
    return _joined(answers)


def pattern_hint(key: str) -> str | None:
    """Return what the keys of other trainers that begin or end like `key` are here, or None if there are none."""
    rows = (trainer.mapping_of(_normalised(key)) for trainer in OTHER_TRAINERS.values())
    return next((row.hint() for row in rows if row), None)


def _normalised(key: str) -> str:
    return re.sub(r"\[\d+\]", "[]", key.lower()).removesuffix("[]")


def _rows(trainer: OtherTrainer, key: str) -> Iterator[KeyMapping]:
    """Yield the rows that fit a key: its own, those of the section it is, those of its last part."""
    last = key.rpartition(".")[2]
    yield from (trainer.keys[name] for name in (key, last) if name in trainer.keys)
    yield from trainer.below.get(key, ())
    yield from trainer.by_last_part.get(last, ())


def _joined(answers: dict[str, list[str]]) -> str | None:
    """Return the answers as one text; those with a setting here win over those without."""
    begin = "here it is "
    chosen = {text: titles for text, titles in answers.items() if text.startswith(begin)} or answers
    texts = _without_shorter(chosen)
    if len(texts) <= 1:
        return next(iter(texts), None)
    parts = [f"{text.removeprefix(begin)} for {' and '.join(titles)}" for text, titles in texts.items()]
    return (begin if next(iter(texts)).startswith(begin) else "") + ", ".join(parts[:MAX_ANSWERS])


def _without_shorter(answers: dict[str, list[str]]) -> dict[str, list[str]]:
    """Drop an answer that another one repeats and explains."""
    return {
        text: titles
        for text, titles in answers.items()
        if not any(other != text and other.startswith(f"{text} (") for other in answers)
    }
