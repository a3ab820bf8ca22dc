"""Write a finished run in one of the export formats."""

import logging
from pathlib import Path

from qlora_train.config import load_config
from qlora_train.export.export_formats import EXPORT_FORMATS, ExportRequest
from qlora_train.export.finished_run import reopen
from qlora_train.export.gguf.converter import find_converter
from qlora_train.export.merging.merge_finished_run import merge_run
from qlora_train.runs import finished_run, run_lock

logger = logging.getLogger(__name__)


def export(path: Path, *, format_name: str, quant: str | None = None, llama_cpp: Path | None = None) -> Path:
    """Write a finished run in a format of `EXPORT_FORMATS` and return its folder; merge first if the format needs it.

    Args:
        quant: number format of a GGUF file; None for the default.
        llama_cpp: a checkout of llama.cpp; None for the installed package.
    """
    export_format = EXPORT_FORMATS[format_name]
    quant = export_format.choose_quant(quant)
    folder = finished_run(path)
    if export_format.quants:
        find_converter(llama_cpp)  # before a merge that takes long
    config = load_config(folder.config_file)
    with run_lock(folder):
        source = None
        if export_format.needs != "merged model":
            source = reopen(folder, config, weights=export_format.needs == "base weights").source
        elif not folder.has_merged():
            logger.info("%s: missing or damaged (merging first)", folder.merged)
            merge_run(reopen(folder, config))
        return export_format.write(ExportRequest(folder, config, source, quant, llama_cpp))
