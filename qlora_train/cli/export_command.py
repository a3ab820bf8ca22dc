"""`qlora-train export RUN`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import Offline, RunPath, refuse_unused
from qlora_train.cli.output import print_text
from qlora_train.export.export_formats import EXPORT_FORMATS, GGUF_QUANTS

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
    str | None, typer.Option(metavar="|".join(GGUF_QUANTS), help="With --format: dtype of GGUF tensors (f16)")
]
LlamaCpp = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="With --format: llama.cpp checkout whose converters are used")
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
        refuse_unused({"--quant": quant, "--llama-cpp": llama_cpp}, "is for --format; drop it")
    prepare_libraries(offline=offline or dry_run)
    if push is None:
        from qlora_train.export import export_run

        written = export_run.export(run, format_name=str(format_name), quant=quant, llama_cpp=llama_cpp)
        print(f"exported: {written}")
        return
    from qlora_train.export import hub_upload

    upload = hub_upload.plan_run_upload(run, push, what=what or "adapter", private=not public)
    print_text("\n".join(upload.lines()) if dry_run else f"pushed: {hub_upload.push(upload)}")
