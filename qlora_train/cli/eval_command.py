"""`qlora-train eval RUN`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import Offline, RunPath, comma_list, refuse_unused

MODELS = "base,adapter,merged"
Models = Annotated[str, typer.Option(metavar="NAME[,NAME]", help="Models to evaluate")]
BatchSize = Annotated[int, typer.Option(min=1, help="Maximum rows per batch; halved when memory runs out")]
Shots = Annotated[int | None, typer.Option(min=0, help="Held-out rows: solved examples for the base model (3)")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Held-out rows: maximum tokens of an answer (256)")]
LossOnly = Annotated[bool, typer.Option("--loss-only", help="Held-out rows: generate no answers")]
Answers = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="Held-out rows: score another model's answers too, a line for each row"),
]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAME[,NAME]", help="Evaluate tasks of lm-evaluation-harness, or of --task-path")
]
TaskPath = Annotated[Path | None, typer.Option(metavar="DIR", help="With --tasks: own task files; their code is run")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="With --tasks: rows per task (all)")]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="With --tasks: apply the chat template and the run's system prompt")
]


def evaluate(
    run: RunPath,
    models: Models = MODELS,
    batch_size: BatchSize = 32,
    shots: Shots = None,
    max_new_tokens: MaxNewTokens = None,
    loss_only: LossOnly = False,
    answers: Answers = None,
    tasks: Tasks = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    chat_template: ChatTemplate = False,
    offline: Offline = False,
) -> None:
    """Evaluate base, adapter and merged model on the held-out rows, or on --tasks."""
    names = comma_list(models)
    if not set(names) <= set(MODELS.split(",")):
        raise typer.BadParameter(f"--models: {models}; allowed: {MODELS}")
    if tasks is None:
        refuse_unused({"--task-path": task_path, "--limit": limit, "--chat-template": chat_template}, "needs --tasks")
        others = _other_answers(answers or (), loss_only=loss_only)
        prepare_libraries(offline=offline)
        from qlora_train.inference import eval_report
        from qlora_train.report.write_report import try_write_report

        settings = eval_report.EvalSettings(
            models=names,
            num_shots=3 if shots is None else shots,
            max_new_tokens=max_new_tokens or 256,
            batch_size=batch_size,
            generate=not loss_only,
            others=others,
        )
        eval_report.evaluate(run, settings)
        try_write_report(run)
        return
    refuse_unused(
        {"--shots": shots, "--max-new-tokens": max_new_tokens, "--loss-only": loss_only, "--answers": answers},
        "is for the held-out rows; drop it or --tasks",
    )
    task_names = comma_list(tasks)
    prepare_libraries(offline=offline)
    from qlora_train.export.finished_run import open_finished_run
    from qlora_train.inference.lm_eval import TaskSettings, check_harness, measure_tasks
    from qlora_train.report.write_report import try_write_report
    from qlora_train.runs import run_lock

    check_harness()
    finished = open_finished_run(run)
    task_settings = TaskSettings(
        names=task_names, models=names, limit=limit, batch_size=batch_size, path=task_path, chat_template=chat_template
    )
    with run_lock(finished.folder):
        measure_tasks(finished, task_settings)
    try_write_report(run)


def _other_answers(options: Sequence[str], *, loss_only: bool) -> dict[str, Path]:
    from qlora_train.inference.other_answers import parse_answers

    if loss_only:
        refuse_unused({"--answers": options or None}, "has no effect with --loss-only; drop one of them")
    return dict(map(parse_answers, options))
