"""`qlora-train export RUN`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import Offline, RunPath, comma_list, refuse_unused
from qlora_train.cli.output import print_text
from qlora_train.export.export_formats import EXPORT_FORMATS, ExportOptions

FormatName = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="|".join(EXPORT_FORMATS),
        help="; ".join(f"{row.name}: {row.description}" for row in EXPORT_FORMATS.values()),
    ),
]
Push = Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload to this Hub repository")]
Quant = Annotated[
    str | None,
    typer.Option(
        metavar="QUANT,...",
        help="With --format: number formats, each written to its own folder; "
        + "; ".join(f"{row.name}: {', '.join(row.quants)}" for row in EXPORT_FORMATS.values() if row.quants),
    ),
]
MaxEvalMinutes = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="MINUTES",
        help="With --format gguf: for the held-out loss in llama.cpp, and as long for answers (10); 0: do not measure",
    ),
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="With --format: llama.cpp checkout whose converters and llama-quantize are used"
    ),
]
What = Annotated[Literal["adapter", "merged"] | None, typer.Option(help="With --push: what to upload (adapter)")]
Public = Annotated[bool, typer.Option("--public", help="With --push: make a new repository public, not private")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With --push: print what would be uploaded; no connection")]


def export(
    run: RunPath,
    format_name: FormatName = None,
    push: Push = None,
    quant: Quant = None,
    llama_cpp: LlamaCpp = None,
    max_eval_minutes: MaxEvalMinutes = None,
    what: What = None,
    public: Public = False,
    dry_run: DryRun = False,
    offline: Offline = False,
) -> None:
    """Write a run for llama.cpp, Ollama or vLLM, or upload it to the Hub with its card."""
    if (format_name is None) == (push is None):
        raise typer.BadParameter("give either --format or --push")
    if format_name is not None and format_name not in EXPORT_FORMATS:
        raise typer.BadParameter(f"--format {format_name}; allowed: {', '.join(EXPORT_FORMATS)}")
    if push is None:
        refuse_unused({"--what": what, "--public": public, "--dry-run": dry_run}, "needs --push")
    else:
        unused = {"--quant": quant, "--llama-cpp": llama_cpp, "--max-eval-minutes": max_eval_minutes}
        refuse_unused(unused, "is for --format; drop it")
    prepare_libraries(offline=offline or dry_run)
    if push is None:
        from qlora_train.export import export_run
        from qlora_train.report.write_report import try_write_report

        options = ExportOptions(comma_list(quant) if quant else (), llama_cpp)
        if max_eval_minutes is not None:
            options = replace(options, max_eval_minutes=max_eval_minutes)
        folders = export_run.export(run, format_name=str(format_name), options=options)
        try_write_report(run)
        for folder in folders:
            print(f"exported: {folder}")
        return
    from qlora_train.export import hub_upload

    upload = hub_upload.plan_run_upload(run, push, what=what or "adapter", private=not public)
    print_text("\n".join(upload.lines()) if dry_run else f"pushed: {hub_upload.push(upload)}")
