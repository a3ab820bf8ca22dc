"""Talk to a finished run: a line in, an answer out, token by token.

Answers go to standard output, everything else to the log, so that a conversation can be piped through. They are decoded
as the evaluation decodes them: greedily unless a temperature is given, to the same ends, whatever the checkpoint's own
generation_config says. Ctrl-C stops the answer that is being written; the conversation goes on.
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
from qlora_train.inference.finished_run import FinishedRun
from qlora_train.utils import signals
from qlora_train.utils.device import catch_out_of_memory
from qlora_train.utils.errors import first_line

logger = logging.getLogger(__name__)

HELP = """\
/adapter off|on   answer without or with the adapter, on the same conversation
/again            answer the last question once more, for example after /adapter off
/system TEXT      set the system message; without a text there is none
/reset            begin a new conversation; the system message stays
/quit             leave; so does the end of input
A line that ends with \\ goes on in the next one; //TEXT asks a question that begins with /TEXT.
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class ChatSettings:
    """Which model answers, and how; `system` is None for the system prompt of the training rows."""

    merged: bool = False
    max_new_tokens: int = 512
    temperature: float = 0.0
    system: str | None = None


def chat(run: FinishedRun, settings: ChatSettings) -> None:
    """Answer standard input until it ends, or until /quit.

    Raises:
        UserError: the model cannot be loaded.
        BrokenPipeError: nobody reads the answers any more.
    """
    [(name, model, tokenizer)] = run.models(["merged" if settings.merged else "adapter"])
    talk = Chat(model, tokenizer, settings, run, _write, system=_system_prompt(run, settings))
    how = f"drawn at temperature {settings.temperature:g}" if settings.temperature else "greedy (--temperature 0)"
    ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(stop_token_ids(model, tokenizer))))
    logger.info("chat: %s model of %s; answers are %s, of at most %d tokens, and end with %s; /help lists the commands",
                name, run.folder.path, how, settings.max_new_tokens, ends)  # fmt: skip
    with signals.on_interrupt(talk.interrupt):
        for line in _lines():
            if line.strip() == "/quit":
                break
            talk.hear(line)


@dataclass
class Chat:
    """A conversation with a model, and what Ctrl-C means for it."""

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

    def hear(self, line: str) -> None:
        """Do what a line says: a command, or a question to answer."""
        if not line.strip():
            return
        if line.startswith("//") or not line.startswith("/"):
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
            return
        name, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._switch, "/again": self._again, "/system": self._set_system, "/reset": self._reset,
            "/help": lambda _argument: logger.info(HELP),
        }  # fmt: skip
        commands.get(name, self._unknown)(argument.strip())

    def interrupt(self) -> None:
        """Stop the answer at its next token; at the prompt, give up the line.

        Raises:
            KeyboardInterrupt: there is no answer to stop.
        """
        if not self.answering:
            raise KeyboardInterrupt
        self.interrupted = True

    # --- commands -----------------------------------------------------------------------------------------------------

    def _switch(self, argument: str) -> None:
        if self.settings.merged:
            logger.info("/adapter: this is the merged model; leave out --merged to switch the adapter off and on")
        elif argument not in ("on", "off"):
            logger.info("/adapter: it is %s; say /adapter off or /adapter on", "on" if self.adapter_on else "off")
        elif argument == "off" and any(config.bias != "none" for config in self.model.peft_config.values()):
            logger.info("/adapter: it has trained the base's biases (lora.bias) and cannot be switched off; see: "
                        "qlora-train eval %s", self.run.folder.path)  # fmt: skip
        else:
            self.adapter_on = argument == "on"
            logger.info("adapter: %s", argument)

    def _again(self, _argument: str) -> None:
        if not self.turns:
            logger.info("/again: there is no question yet")
            return
        del self.turns[-1]
        self._ask(self.turns.pop()["content"])

    def _set_system(self, argument: str) -> None:
        self.system = argument
        logger.info("system message: %s", argument or "none")

    def _reset(self, _argument: str) -> None:
        self.turns.clear()
        logger.info("a new conversation; system message: %s", self.system or "none")

    def _unknown(self, _argument: str) -> None:
        logger.info("no such command; a question that begins with / is written with //\n%s", HELP)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _ask(self, question: str) -> None:
        """Answer a question and keep both in the conversation; a question that cannot be answered is dropped."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        asked: list[Message] = [*self.turns, {"role": "user", "content": question}]
        try:
            ids = encode_chat(self.tokenizer, [*system, *asked], date=self.run.date, add_generation_prompt=True)
        except TemplateError as error:
            logger.warning("the chat template refuses this conversation: %s; try /system or /reset", first_line(error))
            return
        if beyond := tokens_beyond_embedding(self.model, self.tokenizer, ids):
            logger.warning("the model's embedding has no rows for %s; write the question without", beyond)
            return
        room = self._positions() - len(ids)
        if room < 1:
            logger.warning("the conversation has %d tokens, the model %d positions; /reset begins a new one",
                           len(ids), self._positions())  # fmt: skip
            return
        max_new_tokens = min(room, self.settings.max_new_tokens)
        answer, reason = catch_out_of_memory(partial(self._answer, ids, max_new_tokens))
        if answer is None:
            logger.warning("out of memory: %d tokens and %d new ones do not fit (%s); /reset begins a new conversation, "
                           "--max-new-tokens shortens answers", len(ids), max_new_tokens, reason)  # fmt: skip
            return
        self.turns = [*asked, {"role": "assistant", "content": answer}]

    def _positions(self) -> int:
        config = self.model.config.get_text_config().to_dict()
        return max_positions(config, detect(config)) or sys.maxsize

    def _answer(self, ids: list[int], max_new_tokens: int) -> str:
        how = make_generation_config(
            self.model, self.tokenizer, max_new_tokens=max_new_tokens, temperature=self.settings.temperature
        )
        shown = _Shown(self.tokenizer, how.eos_token_id or [], self.write)
        tokens = torch.tensor([ids], device=self.model.device)
        self.answering, self.interrupted = True, False
        try:
            with nullcontext() if self.adapter_on else self.model.disable_adapter():
                self.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    generation_config=how,
                    streamer=shown,
                    stopping_criteria=StoppingCriteriaList([_Interrupted(self)]),
                )
        finally:
            self.answering = False
            self.write("\n")
        if not shown.has_ended:
            reason = "by Ctrl-C" if self.interrupted else f"after {max_new_tokens} tokens (--max-new-tokens)"
            logger.info("the answer was stopped %s", reason)
        return shown.text


class _Interrupted(StoppingCriteria):
    """Ends an answer when Ctrl-C asks for it, between two tokens: nothing is left half done."""

    def __init__(self, talk: Chat) -> None:
        self.talk = talk

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.talk.interrupted, device=input_ids.device)


class _Shown(BaseStreamer):
    """Writes an answer as it grows; a character waits until all of its bytes are there."""

    def __init__(self, tokenizer: Any, ends: list[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.ends, self.write = tokenizer, ends, write
        self.ids: list[int] = []
        self.has_ended = False
        self._written = ""
        self._is_prompt = True

    @property
    def text(self) -> str:
        """The answer so far, as the evaluation decodes it."""
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return text

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then every token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        [token] = value.flatten().tolist()
        if token in self.ends:
            self.has_ended = True
            return
        self.ids.append(token)
        text = self.text
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def end(self) -> None:
        """Write what still waits."""
        self._write(self.text)

    def _write(self, text: str) -> None:
        same = os.path.commonprefix([self._written, text])  # noqa: RUF071 - of characters
        self.write(text[len(same) :])
        self._written = text


def _system_prompt(run: FinishedRun, settings: ChatSettings) -> str:
    if settings.system is not None:
        return settings.system
    shared = run.folder.system_prompt()
    if shared:
        logger.info("chat: system prompt: %s (the training rows'; another: --system TEXT, none: --system '')", shared)
    return shared


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _lines() -> Iterator[str]:
    """Yield what is typed or piped; on a terminal with a prompt, and with readline's editing where there is one."""
    for_people = sys.stdin.isatty() and sys.stdout.isatty()
    if for_people:
        import readline  # noqa: F401
    begun = ""
    while True:
        try:
            line = input(("... " if begun else "> ") if for_people else "")
        except EOFError:
            if begun:
                yield begun
            return
        except KeyboardInterrupt:
            begun = ""
            logger.info("\n/quit or the end of input leaves")
            continue
        if line.endswith("\\"):
            begun += line.removesuffix("\\") + "\n"
        else:
            yield begun + line
            begun = ""
