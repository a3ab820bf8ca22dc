"""The command line: commands only. Nothing heavy is imported before a command needs it.

Exit status: 0 done; 2 something the user can fix, one line a problem; 130, 143 and 75 stopped by SIGINT, SIGTERM, and
SIGUSR1 or the clock, what was done is saved; 1 a defect of ours, with its traceback.
"""

import argparse
import io
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from qlora_train import __version__
from qlora_train.export.export_formats import EXPORT_FORMATS
from qlora_train.utils import network, signals
from qlora_train.utils.errors import ConfigError, UserError, did_you_mean, explain
from qlora_train.utils.launcher import clear_launcher_environment
from qlora_train.utils.secrets import RedactingFormatter, redact

if TYPE_CHECKING:
    from qlora_train.config import RunConfig

COMMANDS = ("train", "check", "show", "data", "schema", "merge", "export", "eval", "chat")
CONFIG_SUFFIXES = (".yaml", ".yml")
MODELS = ("base", "adapter", "merged")
SENT = ("adapter", "merged")
EPILOG = """\
The first word is a command or the path of a config, which is trained.
Settings are changed with section.key=value, for example train.learning_rate=1e-4 or data.train=my.jsonl.
Exit status: 0 done; 2 something you can fix; 130, 143, 75 stopped by Ctrl-C, by SIGTERM, by SIGUSR1 or run.max_minutes,
with a checkpoint of the last step (the same command goes on); 1 a defect.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    try:
        with signals.handle_signals():
            return _answer(sys.argv[1:] if arguments is None else arguments)
    except signals.Stop as stop:
        print(f"{stop.cause}: stopped; the same command goes on: {command_line(arguments)}", file=sys.stderr)
        return stop.status


def _answer(arguments: Sequence[str]) -> int:
    set_up_logging()
    try:
        options = parse(arguments)
        status: int = options.command(options)
    except UserError as error:
        for problem in error.problems:
            print(redact(problem), file=sys.stderr)
        return 2
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(redact(line), file=sys.stderr)
        return 2
    return status


def command_line(arguments: Sequence[str] | None) -> str:
    """Return what was typed, for a shell."""
    return redact(shlex.join(["qlora-train", *(sys.argv[1:] if arguments is None else arguments)]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; `command` is the function to call with it.

    Raises:
        ConfigError: the first word is neither a command nor a config.
    """
    words = list(arguments)
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        _refuse_no_config(words[0])
        words.insert(0, "train")
    parser = build_parser()
    options, rest = parser.parse_known_args(words)
    # argparse gives an overrides argument only the words that stand before the first option
    behind = [word for word in rest if not word.startswith("-")] if "overrides" in options else []
    if len(behind) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in behind)}")
    if behind:
        options.overrides += behind
    return options


def _refuse_no_config(word: str) -> None:
    if Path(word).suffix in CONFIG_SUFFIXES or "/" in word or Path(word).exists():
        return  # what is wrong with it as a config is answered when it is read
    hint = did_you_mean(word, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
    raise ConfigError(f"{word}: neither a command nor a config{hint}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="qlora-train",
        usage="qlora-train CONFIG [section.key=value ...] [--resume auto|never|CHECKPOINT]\n"
        "       qlora-train COMMAND ...",
        description="Fine-tune a language model with QLoRA from one YAML file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qlora-train {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="qlora-train")

    command = commands.add_parser("train", help="train a config, or go on where its run stopped; merge if it says so")
    _takes_config(command)
    command.add_argument("--resume", default="auto", metavar="auto|never|CHECKPOINT", help="where to go on (auto)")
    _takes_offline(command)
    command.set_defaults(command=_train)

    command = commands.add_parser(
        "check", help="check a config, and what it names on this machine: no torch, no download"
    )
    _takes_config(command)
    command.set_defaults(command=_check)

    command = commands.add_parser("show", help="print the resolved config, each value with where it came from")
    _takes_config(command)
    command.set_defaults(command=_show)

    command = commands.add_parser("data", help="check the data and show what is learnt of it, without the model")
    _takes_config(command)
    command.add_argument("--show", type=_count, default=5, metavar="N", help="training rows shown with their loss (5)")
    command.add_argument("--json", action="store_true", help="print one JSON object: the report, with these rows")
    _takes_offline(command)
    command.set_defaults(command=_data)

    command = commands.add_parser("schema", help="print the JSON schema of the config, for editors")
    command.set_defaults(command=_schema)

    command = commands.add_parser("merge", help="merge a run's adapter into 16-bit weights")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, for example runs/llama7b")
    command.add_argument(
        "overrides", nargs="*", metavar="export.key=value", help="export settings changed for this time"
    )
    command.add_argument(
        "--device",
        choices=["cpu"],
        help="merge and check in host memory, for models larger than the GPU (default: GPU)",
    )
    _takes_offline(command)
    command.set_defaults(command=_merge)

    _add_export(commands)
    _add_eval(commands)
    _add_chat(commands)
    return parser


def _add_export(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = commands.add_parser("export", help="write a run for llama.cpp, Ollama or vLLM, or send it to the Hub")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, for example runs/llama7b")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--format", choices=EXPORT_FORMATS, help="GGUF of the merged model, the adapter or its base; vLLM"
    )
    which.add_argument("--push", metavar="OWNER/NAME", help="send adapter or merged model with its card to the Hub")
    _takes_offline(command)
    written = command.add_argument_group("with --format")
    written.add_argument("--quant", metavar="f32|f16|bf16|q8_0", help="numbers in a GGUF file (f16)")
    written.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="checkout whose conversion scripts are run")
    sent = command.add_argument_group("with --push")
    sent.add_argument("--what", choices=SENT, help="which to send (adapter)")
    sent.add_argument("--public", action="store_true", help="make a new repository public, not private")
    sent.add_argument("--dry-run", action="store_true", help="print what would be sent, and connect to nothing")
    command.set_defaults(command=_export)


def _add_eval(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = commands.add_parser("eval", help="base, adapter and merged model on the held-out rows, or on --tasks")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, for example runs/llama7b")
    command.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which to measure (all)")
    command.add_argument(
        "--batch-size", type=_positive, default=32, help="most rows at a time; halved where memory runs out (32)"
    )
    _takes_offline(command)
    rows = command.add_argument_group("on the held-out rows")
    rows.add_argument("--shots", type=_count, help="solved examples shown to the base model (3)")
    rows.add_argument("--max-new-tokens", type=_positive, help="longest generated answer in tokens (256)")
    rows.add_argument("--loss-only", action="store_true", help="do not generate answers")
    tasks = command.add_argument_group("on tasks of lm-evaluation-harness instead")
    tasks.add_argument("--tasks", type=_names, metavar="NAME[,NAME]", help="its tasks, or those of --task-path")
    tasks.add_argument("--task-path", type=Path, metavar="DIR", help="task files of your own; their code is run")
    tasks.add_argument("--limit", type=_positive, metavar="N", help="rows of each task (all)")
    tasks.add_argument(
        "--chat-template",
        action="store_true",
        help="ask in turns, with the system prompt that the training rows share; not as plain text",
    )
    command.set_defaults(command=_eval)


def _add_chat(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = commands.add_parser("chat", help="talk to a finished run; reads a terminal or a pipe")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, for example runs/llama7b")
    command.add_argument("--merged", action="store_true", help="the merged model, not the adapter on its 4-bit base")
    command.add_argument(
        "--system",
        metavar="TEXT",
        help="system prompt, empty for none (what at least 90 %% of the training rows share)",
    )
    command.add_argument(
        "--max-new-tokens", type=_positive, default=512, help="longest generated answer in tokens (512)"
    )
    command.add_argument(
        "--temperature", type=_temperature, default=0.0, help="0 takes the likeliest token each time, as eval does (0)"
    )
    _takes_offline(command)
    command.set_defaults(command=_chat)


def set_up_logging() -> None:
    """Send our log to standard error as plain lines."""
    handler = _StandardErrorHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    root = logging.getLogger("qlora_train")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


class _Parser(argparse.ArgumentParser):
    """Quotes what it does not understand, but no secret; its commands are parsed by the same class."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


class _StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment: the live progress line replaces it while it is shown."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _takes_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, for example configs/llama7b.yaml")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings changed for this time")


def _takes_offline(command: argparse.ArgumentParser) -> None:
    command.add_argument("--offline", action="store_true", help="connect to nothing; HF_HUB_OFFLINE=1 is the same")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names with commas between them")
    return names


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def _load(options: argparse.Namespace) -> "RunConfig":
    from qlora_train.config import load_config

    config = load_config(options.config, options.overrides)
    if config.run.output_dir is not None:
        return config
    output_dir = f"runs/{options.config.stem}"
    return config.model_copy(update={"run": config.run.model_copy(update={"output_dir": output_dir})})


def _train(options: argparse.Namespace) -> int:
    config = _load(options)
    prepare_libraries(offline=options.offline)
    from qlora_train.pipeline import run

    folder = run(config, resume=options.resume)
    print(f"finished: {folder.path}")
    return 0


def prepare_libraries(*, offline: bool = False) -> None:
    """Settle network and device before a library looks at either, and leave the talking to our own log.

    What the libraries repeat at every load is either said there or checked.
    """
    import warnings

    clear_launcher_environment()
    if offline or network.is_offline():
        network.go_offline()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a wholly local run would call the Hub

    from qlora_train.utils.cpu_threads import choose_wait_policy

    choose_wait_policy()
    from qlora_train.utils.device import prepare_cuda

    prepare_cuda()
    import transformers

    with redirect_stdout(io.StringIO()):  # at import it prints there how W&B runs, whether or not it is used
        from transformers.integrations import integration_utils  # noqa: F401
    network.limit_hub_retries()
    for library in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|accelerate|bitsandbytes|torch|datasets)\.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _check(options: argparse.Namespace) -> int:
    from qlora_train.config.preflight import check_machine

    check_machine(_load(options))
    print(f"{options.config}: ok")
    return 0


def _show(options: argparse.Namespace) -> int:
    from qlora_train.config.writer import provenance

    settings = provenance(options.config, options.overrides)
    width = max(len(setting.key) for setting in settings)
    for setting in settings:
        print(f"{setting.key:<{width}}  {json.dumps(setting.value)}  # {setting.source}")
    return 0


def _data(options: argparse.Namespace) -> int:
    prepare_libraries(offline=options.offline)
    from rich.console import Console

    from qlora_train.data.terminal_view import shown_rows
    from qlora_train.planning.inspect_data import inspect

    data = inspect(_load(options), num_shown=options.show)
    if options.json:
        print_text(json.dumps({"data_fingerprint": data.fingerprint, **data.report.to_json()}, indent=2))
    else:
        rows = shown_rows(data.report.first_rows, Console())
        findings = (f"warning: {finding.key}: {finding.text}" for finding in data.report.findings())
        print_text("\n".join([*([rows] if rows else []), *data.report.lines(), *findings]))
    return 0


def print_text(text: str) -> None:
    """Print what may be long, and whatever characters data and paths have."""
    with _any_text():
        print(text, flush=True)


@contextmanager
def _any_text() -> Iterator[None]:
    """Let all characters be printed, escaped where need be; whoever reads them, such as head, may have seen enough."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _schema(_options: argparse.Namespace) -> int:
    from qlora_train.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))
    return 0


def _merge(options: argparse.Namespace) -> int:
    prepare_libraries(offline=options.offline)
    from qlora_train.config import load_config
    from qlora_train.pipeline import merge
    from qlora_train.runs import finished_run

    folder = finished_run(options.run)
    merge(folder, load_config(folder.config_file, options.overrides), device=options.device)
    return 0


def _export(options: argparse.Namespace) -> int:
    _refuse_ignored(
        options,
        ("quant", "llama_cpp") if options.push else ("what", "public", "dry_run"),
        "is for --format; drop it" if options.push else "needs --push",
    )
    if options.push:
        return _push(options)
    prepare_libraries(offline=options.offline)
    from qlora_train.pipeline import export
    from qlora_train.runs import finished_run

    written = export(
        finished_run(options.run), format_name=options.format, quant=options.quant, llama_cpp=options.llama_cpp
    )
    print(f"exported: {written}")
    return 0


def _push(options: argparse.Namespace) -> int:
    prepare_libraries(offline=options.offline or options.dry_run)
    from qlora_train.export.hub_upload import push
    from qlora_train.pipeline import planned_upload
    from qlora_train.runs import finished_run

    folder = finished_run(options.run)
    upload = planned_upload(folder, options.push, what=options.what or "adapter", private=not options.public)
    print_text("\n".join(upload.lines()) if options.dry_run else f"pushed: {push(upload)}")
    return 0


def _refuse_ignored(options: argparse.Namespace, keys: Sequence[str], why: str) -> None:
    """Refuse options that are given and would have no effect."""
    given = [key for key in keys if getattr(options, key) is not None and getattr(options, key) is not False]
    if given:
        raise ConfigError([f"--{key.replace('_', '-')}: {why}" for key in given])


def _eval(options: argparse.Namespace) -> int:
    ignored = ("shots", "max_new_tokens", "loss_only") if options.tasks else ("task_path", "limit", "chat_template")
    why = "is for the held-out rows; drop it or --tasks" if options.tasks else "needs --tasks"
    _refuse_ignored(options, ignored, why)
    return _eval_tasks(options) if options.tasks else _eval_rows(options)


def _eval_rows(options: argparse.Namespace) -> int:
    prepare_libraries(offline=options.offline)
    from qlora_train.inference.eval_report import EvalSettings
    from qlora_train.pipeline import evaluate
    from qlora_train.runs import finished_run

    settings = EvalSettings(
        models=tuple(options.models),
        num_shots=3 if options.shots is None else options.shots,
        max_new_tokens=options.max_new_tokens or 256,
        batch_size=options.batch_size,
        generate=not options.loss_only,
    )
    evaluate(finished_run(options.run), settings)
    return 0


def _eval_tasks(options: argparse.Namespace) -> int:
    prepare_libraries(offline=options.offline)
    from qlora_train.inference.finished_run import open_finished_run
    from qlora_train.inference.lm_eval import TaskSettings, check_harness, measure_tasks
    from qlora_train.runs import run_lock

    check_harness()
    run = open_finished_run(options.run)
    settings = TaskSettings(
        names=options.tasks,
        models=tuple(options.models),
        limit=options.limit,
        batch_size=options.batch_size,
        path=options.task_path,
        chat_template=options.chat_template,
    )
    with run_lock(run.folder):
        measure_tasks(run, settings)
    return 0


def _chat(options: argparse.Namespace) -> int:
    prepare_libraries(offline=options.offline)
    from qlora_train.inference.chat import ChatSettings, chat
    from qlora_train.inference.finished_run import open_finished_run

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    with _any_text():
        settings = ChatSettings(options.merged, options.max_new_tokens, options.temperature, options.system)
        chat(open_finished_run(options.run), settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
