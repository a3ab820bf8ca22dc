"""Whether the packages and programs of a GGUF export are there, before anything is merged or imported."""

import importlib.util

from qlora_train.export.export_formats import ExportOptions
from qlora_train.export.gguf.converter import INSTALL, find_converter
from qlora_train.export.gguf.gguf_quants import QUANTS
from qlora_train.utils.errors import ExportError


def check_tools(options: ExportOptions) -> None:
    """Raise an ExportError if a package or the converter is missing, or the quantizer where a number format needs it."""
    find_converter(options.llama_cpp)
    if importlib.util.find_spec("gguf") is None:
        raise ExportError(f"export: the package gguf is not installed: {INSTALL}")
    if not all(QUANTS[quant].converted for quant in options.quants):
        from qlora_train.export.gguf.quantizer import find_quantizer  # which needs that package

        find_quantizer(options.llama_cpp)
