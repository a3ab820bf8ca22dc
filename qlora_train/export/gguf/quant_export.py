"""Write a model as GGUF in several number formats.

llama.cpp's quantizer reads a file that holds the weights exactly, in 16 or 32 bits. It is made once for all number formats,
and deleted in the end unless it is one of them. It is also what the cost of the others is measured against.
"""

import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.export.export_formats import ExportOptions
from qlora_train.export.gguf.convert_model import write_model
from qlora_train.export.gguf.converter import Converter
from qlora_train.export.gguf.export_space import check_export_space
from qlora_train.export.gguf.gguf_check import GGUFFile
from qlora_train.export.gguf.gguf_quants import EXACT, QUANTS, estimated_bytes
from qlora_train.export.gguf.llama_process import check_loads, has_library
from qlora_train.export.gguf.quant_cost import Cost, CostMeter, find_meter, report, result_entry
from qlora_train.export.gguf.quantizer import Quantizer, find_quantizer
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.runs import RunFolder, write_json
from qlora_train.utils import atomic_io

logger = logging.getLogger(__name__)

RESULTS = "results.json"
Finish = Callable[[Path, GGUFFile], None]
"""Adds files to the folder of a written file."""


def _nothing(_staging: Path, _file: GGUFFile) -> None: ...


@dataclass(frozen=True)
class ExportedModel:
    """A model folder that is exported.

    Attributes:
        format_name: of the export format; begins the names of folders.
        folder: in the format of Transformers.
        name: stated in the file and in its name.
        texts: that llama.cpp must tokenize as the tokenizer does.
        config: content of config.json where it differs from the folder's.
    """

    format_name: str
    folder: Path
    tokenizer: Any
    name: str
    texts: Sequence[str] = ()
    config: Mapping[str, Any] | None = None
    finish: Finish = _nothing

    def file_name(self, quant: str) -> str:
        """Return the name of a file."""
        return f"{self.name}-{quant}.gguf"

    def convert(self, path: Path, quant: str, converter: Converter) -> GGUFFile:
        """Write a file with the conversion script and check it."""
        file, check = write_model(
            self.folder, self.tokenizer, path, self.name, converter, quant, texts=self.texts, config=self.config
        )
        logger.info("%s: %s", path.name, check.summary())
        return file


@dataclass(frozen=True)
class _Source:
    """The file that holds the weights exactly."""

    quant: str
    file: GGUFFile
    cost: Cost | None


def write_quants(
    run: RunFolder, model: ExportedModel, options: ExportOptions, converter: Converter, *, measured: bool
) -> list[Path]:
    """Write a model in each number format and return the folders.

    Args:
        measured: whether the model answers as the run does, so that its held-out loss tells what a number format of less
            than 16 bits costs.

    Raises:
        ExportError: the disk is too small, a program failed, or a file differs from the model.
    """
    loses_bits = any(QUANTS[quant].bits < 16 for quant in options.quants)
    exact = _check_space(run, model, options.quants, with_exact=loses_bits)
    meter = find_meter(run, model.tokenizer, options.max_eval_minutes) if measured and loses_bits else None
    is_quantized = not all(QUANTS[quant].converted for quant in options.quants)
    quantizer = find_quantizer(options.llama_cpp) if is_quantized else None
    writer = _Writer(run, model, converter, quantizer, meter)
    others = [quant for quant in options.quants if quant != exact]
    entries: dict[str, Any] = {}
    with ExitStack() as stack:
        source = None
        if exact in options.quants:
            source, entries[exact] = writer.write(exact, None)
        elif is_quantized or meter is not None:
            source = stack.enter_context(writer.temporary(exact))
        for quant in others:
            _, entries[quant] = writer.write(quant, source)
    if meter is not None:
        report(entries)
    return [run.exports / f"{model.format_name}-{quant}" for quant in options.quants]


@dataclass(frozen=True)
class _Writer:
    run: RunFolder
    model: ExportedModel
    converter: Converter
    quantizer: Quantizer | None
    meter: CostMeter | None

    def write(self, quant: str, source: _Source | None) -> tuple[_Source, dict[str, Any]]:
        """Write the folder of a number format; return its file and entry of results.json."""
        folder = self.run.exports / f"{self.model.format_name}-{quant}"
        with atomic_io.atomic_folder(folder, {"format": self.model.format_name, "quant": quant}) as staging:
            path = staging / self.model.file_name(quant)
            if QUANTS[quant].converted:
                file = self.model.convert(path, quant, self.converter)
            else:
                file = self._quantize(source, path, quant)
            self.model.finish(staging, file)
            cost = None if self.meter is None else self.meter.measure(path)
            entry = result_entry(quant, file, cost, None if source is None else (source.quant, source.cost))
            write_json(staging / RESULTS, entry)
        self.run.add_results(export=self.run.read_results().get("export", {}) | {folder.name: entry})
        return _Source(quant, GGUFFile(folder / path.name), cost), entry

    @contextmanager
    def temporary(self, quant: str) -> Iterator[_Source]:
        """Yield the file that others are made of, which is deleted afterwards."""
        folder = self.run.exports / f".{self.model.format_name}-source{atomic_io.STAGING}"
        atomic_io.remove_folder(folder)
        folder.mkdir(parents=True)
        try:
            file = self.model.convert(folder / self.model.file_name(quant), quant, self.converter)
            yield _Source(quant, file, None if self.meter is None else self.meter.measure(file.path))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _quantize(self, source: _Source | None, path: Path, quant: str) -> GGUFFile:
        assert source is not None, "written before"
        assert self.quantizer is not None, "found before"
        self.quantizer.quantize(source.file, path, quant)
        file = GGUFFile(path)
        summary = file.check_quantized(source.file, quant)
        logger.info("%s: %s", path.name, summary)
        if self.meter is None and has_library():
            check_loads(path)
        return file


def _check_space(run: RunFolder, model: ExportedModel, quants: Sequence[str], *, with_exact: bool) -> str:
    """Return the number format that holds the weights exactly; raise if the disk has no room for the files."""
    with BaseCheckpoint(model.folder) as weights:
        shapes = {name: weights.shape(name) for name in weights.names}
        sizes: Counter[Any] = Counter()
        for name, shape in shapes.items():
            sizes[weights.dtype(name)] += math.prod(shape)
    exact = EXACT.get(str(sizes.most_common(1)[0][0]).removeprefix("torch."), "f32")
    written = dict.fromkeys((exact, *quants) if with_exact else quants)
    check_export_space(run.exports, {quant: estimated_bytes(quant, shapes) for quant in written})
    return exact
