"""Chat with a finished run: one line in, one answer out, token by token.

Answers go to standard output, everything else to the log, so that a conversation can be piped. They are decoded as in the
evaluation: greedily unless a temperature is set, with the same end tokens, without the checkpoint's generation_config.
"""

import logging
import os.path
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from qlora_train.architectures import detect, max_positions
from qlora_train.data.chat_template import encode_chat
from qlora_train.data.types import Message
from qlora_train.evaluation.generation import make_generation_config, stop_token_ids, tokens_beyond_embedding
from qlora_train.export.finished_run import FinishedRun
from qlora_train.inference.run_models import run_models
from qlora_train.utils import signals
from qlora_train.utils.device import catch_out_of_memory
from qlora_train.utils.errors import first_line

logger = logging.getLogger(__name__)

HELP = """\
/adapter off|on   answer without or with the adapter, in the same conversation
/again            answer the last question again, for example after /adapter off
/system TEXT      set the system message; without TEXT, remove it
/reset            start a new conversation; the system message stays
/quit             leave; so does the end of input
A line that ends with \\ continues in the next one; //TEXT asks a question that starts with /TEXT.
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class ChatSettings:
    """Model and decoding; `system` None is the system prompt of the training rows."""

    merged: bool = False
    max_new_tokens: int = 512
    temperature: float = 0.0
    system: str | None = None


def chat(run: FinishedRun, settings: ChatSettings) -> None:
    """Answer standard input until it ends, or until /quit.

    Raises:
        UserError: the model cannot be loaded.
        BrokenPipeError: standard output was closed.
    """
    [(name, model, tokenizer)] = run_models(run, ["merged" if settings.merged else "adapter"])
    session = Chat(model, tokenizer, settings, run, _write, system=_system_prompt(run, settings))
    ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(stop_token_ids(model, tokenizer))))
    logger.info("chat: %s model of %s (temperature %g, at most %d tokens, end tokens %s; /help lists the commands)",
                name, run.folder.path, settings.temperature, settings.max_new_tokens, ends)  # fmt: skip
    with signals.on_interrupt(session.interrupt):
        for line in _lines():
            if line.strip() == "/quit":
                break
            session.handle(line)


@dataclass
class Chat:
    """A conversation with a model."""

    model: Any
    tokenizer: Any
    settings: ChatSettings
    run: FinishedRun
    write: Callable[[str], None]
    turns: list[Message] = field(default_factory=list)
    system: str = ""
    adapter_on: bool = True
    answering: bool = False
    interrupted: bool = False

    def handle(self, line: str) -> None:
        """Run a command, or answer a question."""
        if not line.strip():
            return
        if line.startswith("//") or not line.startswith("/"):
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
            return
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/adapter":
                self._switch_adapter(argument)
            case "/again" if self.turns:
                del self.turns[-1]
                self._ask(self.turns.pop()["content"])
            case "/again":
                logger.info("/again: there is no question yet")
            case "/system":
                self.system = argument
                logger.info("system message: %s", argument or "none")
            case "/reset":
                self.turns.clear()
                logger.info("new conversation (system message: %s)", self.system or "none")
            case "/help":
                logger.info(HELP)
            case _:
                logger.info("no such command; start a question that begins with / by //\n%s", HELP)

    def interrupt(self) -> None:
        """Stop the answer after its current token; at the prompt, raise KeyboardInterrupt."""
        if not self.answering:
            raise KeyboardInterrupt
        self.interrupted = True

    def _switch_adapter(self, argument: str) -> None:
        if self.settings.merged:
            logger.info("/adapter: this is the merged model; start without --merged to switch the adapter off and on")
        elif argument not in ("on", "off"):
            logger.info("/adapter: it is %s; type /adapter off or /adapter on", "on" if self.adapter_on else "off")
        elif argument == "off" and any(config.bias != "none" for config in self.model.peft_config.values()):
            logger.info("/adapter: it has trained the base's biases (lora.bias) and cannot be switched off; see: "
                        "qlora-train eval %s", self.run.folder.path)  # fmt: skip
        else:
            self.adapter_on = argument == "on"
            again = "; /again answers the last question anew" if self.turns else ""
            logger.info("adapter: %s%s", argument, again)

    def _ask(self, question: str) -> None:
        """Answer a question and add both to the conversation; a question that cannot be answered is dropped."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        turns: list[Message] = [*self.turns, {"role": "user", "content": question}]
        try:
            ids = encode_chat(self.tokenizer, [*system, *turns], date=self.run.date, add_generation_prompt=True)
        except TemplateError as error:
            logger.warning("the chat template refuses this conversation: %s; try /system or /reset", first_line(error))
            return
        if beyond := tokens_beyond_embedding(self.model, self.tokenizer, ids):
            logger.warning("the model's embedding has no rows for %s; rephrase the question without them", beyond)
            return
        config = self.model.config.get_text_config().to_dict()
        positions = max_positions(config, detect(config)) or sys.maxsize
        if len(ids) >= positions:
            logger.warning("the conversation has %d tokens, the model %d positions; /reset starts a new one",
                           len(ids), positions)  # fmt: skip
            return
        max_new_tokens = min(positions - len(ids), self.settings.max_new_tokens)
        answer, reason = catch_out_of_memory(partial(self._answer, ids, max_new_tokens))
        if answer is None:
            logger.warning("out of memory: %d tokens and %d new ones do not fit (%s); /reset starts a new conversation, "
                           "--max-new-tokens shortens answers", len(ids), max_new_tokens, reason)  # fmt: skip
            return
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _answer(self, ids: list[int], max_new_tokens: int) -> str:
        generation = make_generation_config(
            self.model, self.tokenizer, max_new_tokens=max_new_tokens, temperature=self.settings.temperature
        )
        streamer = _AnswerStreamer(self.tokenizer, generation.eos_token_id or [], self.write)
        tokens = torch.tensor([ids], device=self.model.device)
        self.answering, self.interrupted = True, False
        try:
            with nullcontext() if self.adapter_on else self.model.disable_adapter():
                self.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    generation_config=generation,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_StopOnInterrupt(self)]),
                )
        finally:
            self.answering = False
            self.write("\n")
        if not streamer.has_ended:
            reason = "by Ctrl-C" if self.interrupted else f"after {max_new_tokens} tokens (--max-new-tokens)"
            logger.info("the answer was stopped %s", reason)
        return streamer.text


class _StopOnInterrupt(StoppingCriteria):
    def __init__(self, session: Chat) -> None:
        self.session = session

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.session.interrupted, device=input_ids.device)


class _AnswerStreamer(BaseStreamer):
    """Writes an answer while it grows. Unlike TextStreamer, it decodes all tokens together, as the evaluation does."""

    def __init__(self, tokenizer: Any, ends: list[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.ends, self.write = tokenizer, ends, write
        self.ids: list[int] = []
        self.has_ended = False
        self._written = ""
        self._is_prompt = True

    @property
    def text(self) -> str:
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return text

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        [token] = value.flatten().tolist()
        if token in self.ends:
            self.has_ended = True
            return
        self.ids.append(token)
        if not self.text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose bytes are incomplete
            self.end()

    def end(self) -> None:
        text = self.text
        common = os.path.commonprefix([self._written, text])  # noqa: RUF071 - of characters
        self.write(text[len(common) :])
        self._written = text


def _system_prompt(run: FinishedRun, settings: ChatSettings) -> str:
    if settings.system is not None:
        return settings.system
    shared = run.folder.system_prompt()
    if shared:
        logger.info(
            "chat: system prompt of the training rows: %s (--system TEXT replaces it, --system '' removes it)", shared
        )
    return shared


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _lines() -> Iterator[str]:
    """Yield questions; a terminal has a prompt, and readline's editing where it is installed."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        import readline  # noqa: F401
    pending = ""
    while True:
        try:
            line = input(("... " if pending else "> ") if interactive else "")
        except EOFError:
            if pending:
                yield pending
            return
        except KeyboardInterrupt:
            pending = ""
            logger.info("\n/quit or the end of input leaves")
            continue
        if line.endswith("\\"):
            pending += line.removesuffix("\\") + "\n"
        else:
            yield pending + line
            pending = ""
