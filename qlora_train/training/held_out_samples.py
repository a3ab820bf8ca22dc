"""`run.samples`: greedy answers to the first held-out prompts, before the first step and at every evaluation.

They are lines of samples.jsonl. Training is bitwise the same with and without them: random states, modes and buffers are
restored. A failure switches them off with a warning and never ends the run.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from transformers import TrainerCallback

from qlora_train.config import RunConfig
from qlora_train.data.types import Example, Prompt
from qlora_train.evaluation.generation import generate_answers
from qlora_train.parallel import context
from qlora_train.runs import RunFolder
from qlora_train.training.parity.preserve_state import preserve_model_state
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import first_line
from qlora_train.utils.run_events import Sampled, emit

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128
"""Of an answer; longer ones are cut."""


class SampleCallback(TrainerCallback):
    """Generates and records answers; rank 0 does, the others wait."""

    def __init__(self, config: RunConfig, run: RunFolder, tokenizer: Any, held_out: Sequence[Example]) -> None:
        self._run, self._tokenizer = run, tokenizer
        self._batch_size = config.train.per_device_eval_batch_size
        with_text = ((row, example) for row, example in enumerate(held_out) if example.prompt and example.answer)
        self._rows = list(islice(with_text, config.run.samples))
        if not self._rows and context().is_main:
            logger.warning("run.samples: no held-out row has a prompt and an answer as text; none are generated")

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Answer before the first step; of a resumed run, drop the answers of steps that it repeats."""
        if state.global_step == 0:
            self._answer(keywords["model"], 0)
        elif context().is_main:
            try:
                drop_samples_after(self._run, state.global_step)
            except OSError as error:
                logger.warning("%s: samples after step %d are not dropped (%s)", self._run.samples_file,
                               state.global_step, error.strerror)  # fmt: skip

    def on_evaluate(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._answer(keywords["model"], state.global_step)

    def measure_seconds(self, model: Any) -> float:
        """Return the seconds that answers take, without recording them; every rank calls it."""
        started = time.perf_counter()
        self._on_rank_0(0, lambda: self._generate(model))
        return time.perf_counter() - started

    def _answer(self, model: Any, step: int) -> None:
        """Generate the answers after `step`, and record them instead of those of this step and later ones."""
        self._on_rank_0(step, lambda: self._record(step, self._generate(model)))

    def _on_rank_0(self, step: int, work: Callable[[], Any]) -> None:
        if self._rows and context().is_main:
            try:
                work()
            except Exception as error:
                logger.warning("run.samples: off from step %d on (%s)", step, first_line(error))
                logger.debug("run.samples: off", exc_info=True)
                self._rows = []
        context().barrier()  # however long it takes: a gather of gradients would time out

    def _generate(self, model: Any) -> list[str]:
        started = time.perf_counter()
        prompts = [example.prompt for _, example in self._rows if example.prompt is not None]
        with preserve_model_state(model):
            answers = generate_answers(
                model, self._tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=self._batch_size,
                date=self._run.start_date(),
            )  # fmt: skip
        logger.debug("run.samples: %d answers in %.1f s", len(answers), time.perf_counter() - started)
        return answers

    def _record(self, step: int, answers: Sequence[str]) -> None:
        earlier = [line for line in recorded_samples(self._run) if line["step"] < step]
        new = [
            Sampled(step, row, prompt_text(example.prompt or ""), example.answer or "", answer)
            for (row, example), answer in zip(self._rows, answers, strict=True)
        ]
        _write(self._run, [*earlier, *map(asdict, new)])
        for sample in new:
            emit(sample)


def recorded_samples(run: RunFolder) -> list[dict[str, Any]]:
    """Read samples.jsonl; empty if there is none, or one that is damaged."""
    if not run.samples_file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in run.samples_file.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if isinstance(line["step"], int)]
    except (ValueError, KeyError, TypeError, RecursionError):
        logger.warning("%s: damaged; earlier samples are lost", run.samples_file)
        return []


def drop_samples_after(run: RunFolder, step: int) -> None:
    """Drop the samples of steps that a resumed run repeats."""
    samples = recorded_samples(run)
    kept = [line for line in samples if line["step"] <= step]
    if len(kept) < len(samples):
        _write(run, kept)


def _write(run: RunFolder, samples: Sequence[Mapping[str, Any]]) -> None:
    atomic_io.write_text(run.samples_file, "".join(f"{json.dumps(sample)}\n" for sample in samples))


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text: the one question after a system prompt, or all turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
