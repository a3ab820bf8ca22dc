"""Write a finished run in one of the export formats."""

import logging
from dataclasses import replace
from pathlib import Path

from qlora_train.config import load_config
from qlora_train.export.export_formats import EXPORT_FORMATS, ExportOptions, ExportRequest
from qlora_train.export.finished_run import reopen
from qlora_train.export.merging.merge_finished_run import merge_run
from qlora_train.runs import finished_run, run_lock

logger = logging.getLogger(__name__)


def export(path: Path, *, format_name: str, options: ExportOptions | None = None) -> list[Path]:
    """Write a finished run in a format of `EXPORT_FORMATS` and return its folders; merge first if the format needs it."""
    export_format = EXPORT_FORMATS[format_name]
    options = options or ExportOptions()
    options = replace(options, quants=export_format.choose_quants(options.quants))
    folder = finished_run(path)
    export_format.check(options)
    config = load_config(folder.config_file)
    with run_lock(folder):
        folder.remove_stale_files()
        source = None
        if export_format.needs != "merged model":
            source = reopen(folder, config, weights=export_format.needs == "base weights").source
        elif not folder.has_merged():
            logger.info("%s: no complete merged model yet (merging first)", folder.merged)
            merge_run(reopen(folder, config))
        return export_format.write(ExportRequest(folder, config, source, options))
