"""The formats that a finished run is exported to, one row each, for the CLI, `export_run` and docs/export.md.

A new format is one row here and one module with the function that writes it. Its number formats, the tools that it needs
and what must exist before belong to the row. This module loads no heavy library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_train.export.gguf.gguf_quants import ADAPTER_QUANTS, MODEL_QUANTS
from qlora_train.utils.errors import ExportError, did_you_mean
from qlora_train.utils.lazy_import import import_function

if TYPE_CHECKING:
    from qlora_train.config import RunConfig
    from qlora_train.models import BaseSource
    from qlora_train.runs import RunFolder


@dataclass(frozen=True)
class ExportOptions:
    """What a user asks of a format.

    Attributes:
        quants: number formats, each written to its own folder; empty for a format that has none.
        llama_cpp: a checkout of llama.cpp; None for the installed package.
        max_eval_minutes: for the held-out loss of a file, and the same for its answers; 0 measures nothing.
    """

    quants: tuple[str, ...] = ()
    llama_cpp: Path | None = None
    max_eval_minutes: float = 10.0


@dataclass(frozen=True)
class ExportRequest:
    """What a format is written from.

    Attributes:
        run: a finished run.
        config: its settings.
        source: the run's base where the format needs it, else None.
        options: what the user asks for.
    """

    run: "RunFolder"
    config: "RunConfig"
    source: "BaseSource | None" = None
    options: ExportOptions = ExportOptions()


@dataclass(frozen=True)
class ExportFormat:
    """A format.

    Attributes:
        name: for `--format`.
        description: for `--help` and the docs.
        function: `module:name` of the function that writes a request and returns its folders.
        needs: what must exist before: the merged model, or the base with or without its weights.
        quants: values of `--quant`, the default first; empty for a format that has no number formats.
        check_tools: `module:name` of a function that raises if a program or package is missing for `ExportOptions`; it is
            called first, since a merge takes long. Empty for a format that needs none.
    """

    name: str
    description: str
    function: str
    needs: Literal["merged model", "base weights", "base config"]
    quants: tuple[str, ...] = ()
    check_tools: str = ""

    def choose_quants(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the number formats to write in lower case, the default for no names.

        Raises:
            ExportError: the format does not have one of them.
        """
        if not names:
            return self.quants[:1]
        if not self.quants:
            raise ExportError(f"--quant {','.join(names)}: --format {self.name} has no number format; drop it")
        chosen = tuple(dict.fromkeys(name.lower() for name in names))
        if unknown := [name for name in chosen if name not in self.quants]:
            raise ExportError(
                f"--quant {unknown[0]}: --format {self.name} has {', '.join(self.quants)}"
                f"{did_you_mean(unknown[0], self.quants)}"
            )
        return chosen

    def check(self, options: ExportOptions) -> None:
        """Raise an ExportError if a program or package is missing."""
        if self.check_tools:
            check: Callable[[ExportOptions], None] = import_function(self.check_tools)
            check(options)

    def write(self, request: ExportRequest) -> list[Path]:
        """Write a request and return its folders."""
        function: Callable[[ExportRequest], list[Path]] = import_function(self.function)
        return function(request)


_GGUF = "qlora_train.export.gguf.gguf_export"
_TOOLS = "qlora_train.export.gguf.gguf_tools:check_tools"
EXPORT_FORMATS = {
    row.name: row
    for row in (
        ExportFormat(
            "gguf", "the merged model for llama.cpp and Ollama", f"{_GGUF}:export_merged", "merged model",
            MODEL_QUANTS, _TOOLS,
        ),
        ExportFormat(
            "lora-gguf", "the adapter for llama.cpp and Ollama", f"{_GGUF}:export_adapter", "base config",
            ADAPTER_QUANTS, _TOOLS,
        ),
        ExportFormat(
            "base-gguf", "the base that lora-gguf is applied to", f"{_GGUF}:export_base", "base weights",
            MODEL_QUANTS, _TOOLS,
        ),
        ExportFormat("vllm", "the adapter for vLLM", "qlora_train.export.vllm:export_vllm", "base config"),
    )
}  # fmt: skip
