"""The formats that a finished run is exported to, one row each, for the CLI, `export_run` and docs/export.md.

A new format is one row here and one module with the function that writes it. This module loads no heavy library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_train.utils.errors import ExportError
from qlora_train.utils.lazy_import import import_function

if TYPE_CHECKING:
    from qlora_train.config import RunConfig
    from qlora_train.models import BaseSource
    from qlora_train.runs import RunFolder

GGUF_QUANTS = ("f16", "f32", "bf16", "q8_0")
"""Number formats that llama.cpp's conversion scripts write; the first is the default."""


@dataclass(frozen=True)
class ExportRequest:
    """What a format is written from.

    Attributes:
        run: a finished run.
        config: its settings.
        source: the run's base where the format needs it, else None.
        quant: number format, empty for a format that has none.
        llama_cpp: a checkout of llama.cpp; None for the installed package.
    """

    run: "RunFolder"
    config: "RunConfig"
    source: "BaseSource | None" = None
    quant: str = ""
    llama_cpp: Path | None = None


@dataclass(frozen=True)
class ExportFormat:
    """A format.

    Attributes:
        name: for `--format`.
        description: for `--help` and the docs.
        function: `module:name` of the function that writes a request and returns its folder.
        needs: what must exist before: the merged model, or the base with or without its weights.
        quants: values of `--quant`, the default first; empty for a format that llama.cpp's scripts do not write.
    """

    name: str
    description: str
    function: str
    needs: Literal["merged model", "base weights", "base config"]
    quants: tuple[str, ...] = ()

    def choose_quant(self, quant: str | None) -> str:
        """Return the number format to write, the default for None and empty for a format that has none.

        Raises:
            ExportError: the format does not have it.
        """
        if quant is None:
            return self.quants[0] if self.quants else ""
        if quant in self.quants:
            return quant
        if not self.quants:
            raise ExportError(f"--quant {quant}: --format {self.name} has no number format; drop it")
        raise ExportError(
            f"--quant {quant}: allowed are {', '.join(self.quants)}; for {quant.upper()} export f16, then run llama.cpp's "
            f"llama-quantize NAME-f16.gguf NAME-{quant}.gguf {quant.upper()}"
        )

    def write(self, request: ExportRequest) -> Path:
        """Write a request and return its folder."""
        function: Callable[[ExportRequest], Path] = import_function(self.function)
        return function(request)


_GGUF = "qlora_train.export.gguf.gguf_export"
EXPORT_FORMATS = {
    row.name: row
    for row in (
        ExportFormat(
            "gguf", "the merged model for llama.cpp and Ollama", f"{_GGUF}:export_merged", "merged model", GGUF_QUANTS
        ),
        ExportFormat(
            "lora-gguf", "the adapter for llama.cpp and Ollama", f"{_GGUF}:export_adapter", "base config", GGUF_QUANTS
        ),
        ExportFormat(
            "base-gguf", "the base that lora-gguf is applied to", f"{_GGUF}:export_base", "base weights", GGUF_QUANTS
        ),
        ExportFormat("vllm", "the adapter for vLLM", "qlora_train.export.vllm:export_vllm", "base config"),
    )
}
