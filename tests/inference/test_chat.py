"""Chat: real processes on a real run; answers equal those of the evaluation."""

import io
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.cli.main import main
from qlora_train.data.types import Message
from qlora_train.evaluation.generation import generate_answers
from qlora_train.export.finished_run import FinishedRun, open_finished_run
from qlora_train.inference.chat import Chat, ChatSettings
from qlora_train.inference.run_models import run_models
from qlora_train.runs import RunFolder
from tests.support.pico import build_pico
from tests.support.runs import train_run, write_rows

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
LENGTH = 12
SYSTEM: Message = {"role": "system", "content": "Add up the numbers."}
CHAT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test that runs in the background would ignore it
from qlora_train.cli.main import main
sys.exit(main(["chat", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished and merged run on a base with many positions, whose adapter changes what it says.

    Its rows share a system prompt.
    """
    folder = tmp_path_factory.mktemp("chat")
    base = build_pico(folder / "base", max_position_embeddings=4096)
    write_rows(folder / "rows.jsonl", system=SYSTEM["content"])
    return train_run(folder, base, "train.max_steps=2", "export.merge=true", "export.max_loss_increase=1")


@pytest.fixture(scope="module")
def run(run_folder: RunFolder) -> FinishedRun:
    return open_finished_run(run_folder.path)


@pytest.fixture(scope="module")
def model(run: FinishedRun) -> Any:
    return next(iter(run_models(run, ["adapter"])))


def command(run_folder: RunFolder, *options: str) -> list[str]:
    return [sys.executable, "-c", CHAT, str(run_folder.path), *options]


def piped(run_folder: RunFolder, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(run_folder, *options), input=lines, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def expected(run: FinishedRun, name: str, turns: list[Message], length: int = LENGTH) -> str:
    """Return the evaluation's answer to these turns, from a newly loaded model."""
    [(_, model, tokenizer)] = run_models(run, [name])
    return generate_answers(model, tokenizer, [turns], max_new_tokens=length, batch_size=1, date=run.date)[0]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


class Talk:
    """A chat in this process, with its output."""

    def __init__(self, run: FinishedRun, model: Any, **settings: Any) -> None:
        self.written: list[str] = []
        _, network, tokenizer = model
        settings = {"max_new_tokens": LENGTH, **settings}
        self.chat = Chat(network, tokenizer, ChatSettings(**settings), run, self.written.append)

    def __call__(self, line: str) -> str:
        self.written.clear()
        self.chat.handle(line)
        return "".join(self.written).removesuffix("\n")


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], preserve_library_settings: None
) -> Callable[..., tuple[int, str, str]]:
    """Chat in this process on typed lines; return exit status, output and log."""

    def chat(lines: str, run_folder: RunFolder, *options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = main(["chat", str(run_folder.path), *options])
        return status, *capsys.readouterr()

    return chat


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("qlora_train")
    before = logger.propagate
    logger.propagate = True
    with caplog.at_level(logging.DEBUG, logger="qlora_train"):
        yield caplog
    logger.propagate = before


# --- as a process -----------------------------------------------------------------------------------------------------


def test_piped_conversation_is_answered_like_the_evaluation(run_folder: RunFolder, run: FinishedRun) -> None:
    first = expected(run, "adapter", [SYSTEM, user("1 + 2")])
    second = expected(run, "adapter", [SYSTEM, user("1 + 2"), assistant(first), user("3 + 4")])
    done = piped(run_folder, "1 + 2\n\n3 + 4\n/quit\n5 + 6\n", "--max-new-tokens", str(LENGTH))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}\n{second}\n"
    assert "(temperature 0, at most 12 tokens, end tokens '<|im_end|>'; /help" in done.stderr
    assert "system prompt of the training rows: Add up the numbers. (--system TEXT replaces it" in done.stderr
    assert done.stderr.count(f"the answer was stopped after {LENGTH} tokens (--max-new-tokens)") == 2
    assert first != expected(run, "adapter", [user("1 + 2")])


def test_merged_model_answers_and_has_no_adapter_to_switch(
    run_folder: RunFolder, run: FinishedRun, typed: Callable[..., tuple[int, str, str]]
) -> None:
    options = ("--merged", "--max-new-tokens", str(LENGTH), "--temperature", "0", "--system", "")
    status, out, err = typed("1 + 2\n/adapter off\n", run_folder, *options)
    assert status == 0, err
    assert out == expected(run, "merged", [user("1 + 2")]) + "\n"
    assert "/adapter: this is the merged model" in err
    assert "system prompt" not in err


def test_ctrl_c_stops_answers_and_not_the_chat(run_folder: RunFolder) -> None:
    process = subprocess.Popen(
        command(run_folder, "--max-new-tokens", "3500"),
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answers = []
    for question in (b"1 + 2\n", b"3 + 4\n"):
        process.stdin.write(question)
        process.stdin.flush()
        begun = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        answers.append(begun + process.stdout.readline())
    out, err = process.communicate(b"/reset\n", timeout=60)
    assert process.returncode == 0, err.decode()
    assert out == b""
    assert err.count(b"the answer was stopped by Ctrl-C") == 2
    assert all(2 < len(answer) < 3000 for answer in answers)
    assert b"new conversation" in err
    assert b"Traceback" not in err


def test_a_terminal_has_a_prompt_and_ctrl_c_discards_the_line(run_folder: RunFolder, run: FinishedRun) -> None:
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        command(run_folder, "--max-new-tokens", "4"),
        env={**ENVIRONMENT, "TERM": "dumb"}, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(terminal)

    def until_prompt(prompt: bytes) -> bytes:
        screen = b""
        while not screen.endswith(prompt):
            readable, _, _ = select.select([keyboard], [], [], 60)
            assert readable, screen
            screen += os.read(keyboard, 1)
        return screen

    until_prompt(b"> ")
    os.write(keyboard, b"given up \\\n")
    until_prompt(b"... ")
    time.sleep(0.5)  # readline hears no Ctrl-C between the prompt and the first wait for a key
    process.send_signal(signal.SIGINT)
    until_prompt(b"> ")
    os.write(keyboard, b"1 + 2\n")
    screen = until_prompt(b"\n> ").decode()
    os.write(keyboard, b"\x04")
    _, err = process.communicate(timeout=60)
    os.close(keyboard)
    assert process.returncode == 0, err.decode()
    assert b"/quit or the end of input leaves" in err
    assert expected(run, "adapter", [SYSTEM, user("1 + 2")], 4) in screen


def test_continued_lines_are_one_question_and_invalid_utf8_is_replaced(run_folder: RunFolder, run: FinishedRun) -> None:
    done = subprocess.run(
        command(run_folder, "--max-new-tokens", "4", "--system", "the quick brown fox"),
        input=b"1 + \\\n2 \xff",
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    told: Message = {"role": "system", "content": "the quick brown fox"}
    asked = [told, user("1 + \n2 \N{REPLACEMENT CHARACTER}")]
    assert done.stdout.decode() == expected(run, "adapter", asked, 4) + "\n"


def test_a_closed_output_ends_the_chat_without_traceback(run_folder: RunFolder) -> None:
    process = subprocess.Popen(
        command(run_folder), env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(b"1 + 2\n3 + 4\n", timeout=60)
    assert process.returncode == 0, err.decode()
    assert b"Traceback" not in err


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf", "hot"])
def test_invalid_temperature_is_refused(temperature: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "runs/any", f"--temperature={temperature}"]) == 2
    error = capsys.readouterr().err
    assert "--temperature" in error
    assert "Traceback" not in error


def test_missing_merged_model_is_one_line(
    pico_llama: Path, tmp_path: Path, typed: Callable[..., tuple[int, str, str]]
) -> None:
    run_folder = train_run(tmp_path, pico_llama, "train.max_steps=1")
    status, out, err = typed("1 + 2\n", run_folder, "--merged")
    assert (status, out) == (2, "")
    assert re.search(r"there is no merged model; make one with: qlora-train merge \S+\n$", err)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_adapter_goes_off_and_on_in_the_same_conversation(run: FinishedRun, model: Any) -> None:
    talk = Talk(run, model)
    first = talk("1 + 2")
    assert first == expected(run, "adapter", [user("1 + 2")])
    assert talk("/adapter off") == ""
    plain = talk("/again")
    assert plain == expected(run, "base", [user("1 + 2")]) != first
    assert talk("/adapter on") == ""
    assert talk("3 + 4") == expected(run, "adapter", [user("1 + 2"), assistant(plain), user("3 + 4")])


def test_system_message_is_set_and_outlives_a_reset(run: FinishedRun, model: Any) -> None:
    talk = Talk(run, model)
    without = talk("1 + 2")
    talk("/system be the quick brown fox")
    talk("/reset")
    told = talk("1 + 2")
    system: Message = {"role": "system", "content": "be the quick brown fox"}
    assert told == expected(run, "adapter", [system, user("1 + 2")]) != without
    talk("/system")
    talk("/reset")
    assert talk("1 + 2") == without


def test_unknown_commands_answer_with_the_known_ones(
    run: FinishedRun, model: Any, said: pytest.LogCaptureFixture
) -> None:
    talk = Talk(run, model)
    for line, note in {
        "/adaptor off": "no such command", "/help": "/system TEXT", "/again": "there is no question yet",
        "/adapter": "it is on; type /adapter off or /adapter on",
    }.items():  # fmt: skip
        said.clear()
        assert talk(line) == ""
        assert note in said.text
    assert talk.chat.turns == []
    talk("//again")
    assert talk.chat.turns[0] == user("/again")


def test_conversation_that_fills_the_positions_is_not_answered(
    run: FinishedRun, model: Any, said: pytest.LogCaptureFixture
) -> None:
    talk = Talk(run, model)
    assert talk("x " * 4096) == ""
    assert re.search(r"the conversation has \d+ tokens, the model 4096 positions; /reset", said.text)
    assert talk("1 + 2") == expected(run, "adapter", [user("1 + 2")])


def test_conversation_that_does_not_fit_into_memory_loses_the_question_only(
    run: FinishedRun, model: Any, said: pytest.LogCaptureFixture
) -> None:
    def allocate(*_arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    talk = Talk(run, model)
    with model[1].get_base_model().register_forward_pre_hook(allocate):
        assert talk("1 + 2") == ""
    assert re.search(
        r"out of memory: \d+ tokens and 12 new ones do not fit \(CUDA .*/reset starts .*--max-new", said.text
    )
    assert talk.chat.turns == []
    assert talk("1 + 2") == expected(run, "adapter", [user("1 + 2")])


def test_template_that_refuses_a_system_message_loses_the_question_only(
    run: FinishedRun, model: Any, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(run, model)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    monkeypatch.setattr(model[2], "chat_template", refusing + model[2].chat_template)
    talk("/system be brief")
    assert talk("1 + 2") == ""
    assert "the chat template refuses this conversation: no system role; try /system or /reset" in said.text
    talk("/system")
    assert talk("1 + 2") == expected(run, "adapter", [user("1 + 2")])


def test_temperature_draws_and_near_0_is_greedy(run: FinishedRun, model: Any) -> None:
    torch.manual_seed(0)
    greedy = Talk(run, model)("1 + 2")
    assert Talk(run, model, temperature=1e-4)("1 + 2") == greedy
    hot = {Talk(run, model, temperature=50.0)("1 + 2") for _ in range(3)}
    assert len(hot) == 3, "of a vocabulary of 320, drawn almost evenly"


def test_adapter_with_biases_is_not_switched_off(pico: Any, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    run = open_finished_run(train_run(tmp_path, pico("qwen2"), "train.max_steps=1", "lora.bias=lora_only").path)
    talk = Talk(run, next(iter(run_models(run, ["adapter"]))))
    talk("/adapter off")
    assert "trained the base's biases (lora.bias) and cannot be switched off" in said.text
    assert talk.chat.adapter_on
