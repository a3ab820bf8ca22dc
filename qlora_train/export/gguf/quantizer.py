"""Quantize a GGUF file with llama.cpp's own quantizer.

This is the program ``llama-quantize`` of a checkout (`--llama-cpp`) or on PATH. Without it, the functions
that quantize rows are called in the library of the package ``xllamacpp`` (extra ``gguf-export``), with the types of
`quant_mix`.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from qlora_train.export.gguf.converter import INSTALL, MAX_SILENT_SECONDS, clean_environment
from qlora_train.export.gguf.gguf_check import GGUFFile
from qlora_train.export.gguf.gguf_quants import QUANTS
from qlora_train.export.gguf.llama_process import has_library, quantize_file
from qlora_train.export.gguf.quant_mix import tensor_types
from qlora_train.utils.errors import ExportError
from qlora_train.utils.num_cores import num_cores
from qlora_train.utils.run_events import progress
from qlora_train.utils.watched_process import run_watched

PROGRAM = "llama-quantize"
_IN_CHECKOUT = (f"build/bin/{PROGRAM}", f"bin/{PROGRAM}", PROGRAM, f"build/bin/Release/{PROGRAM}.exe", f"{PROGRAM}.exe")
_ERROR = re.compile(r"failed to quantize: (.*)")


@dataclass(frozen=True)
class Quantizer:
    """llama.cpp's quantizer: a program, or None for the installed library."""

    program: Path | None

    def quantize(self, source: GGUFFile, target: Path, quant: str) -> None:
        """Write `target` from a 16-bit or 32-bit file.

        Raises:
            ExportError: it failed.
        """
        if self.program is None:
            shapes = source.shapes()
            types = tensor_types(quant, source.mix_model(), shapes)
            quantize_file(source.path, target, QUANTS[quant].file_type, types, num_tensors=len(shapes))
            return
        command = [str(self.program), str(source.path), str(target), quant.upper(), str(num_cores())]
        with progress(f"quantizing {target.name}", len(source.shapes()), "tensors") as counter:
            done = run_watched(
                command, environment=clean_environment(), max_silent_seconds=MAX_SILENT_SECONDS,
                on_line=lambda line: counter.advance(line.startswith("[")),
            )  # fmt: skip
        if done.has_failed:
            found = _ERROR.search("\n".join(done.lines))
            raise ExportError(f"{target.name}: {self.program}: {found[1] if found else done.problem()}")


def find_quantizer(llama_cpp: Path | None) -> Quantizer:
    """Return the quantizer of a checkout, on PATH, or in the installed library, in this order.

    Raises:
        ExportError: there is none.
    """
    in_checkout = [llama_cpp / name for name in _IN_CHECKOUT] if llama_cpp is not None else []
    if program := next((path for path in in_checkout if path.is_file()), None):
        return Quantizer(program)
    if on_path := shutil.which(PROGRAM):
        return Quantizer(Path(on_path))
    if has_library():
        return Quantizer(None)
    raise ExportError(
        f"export: llama.cpp's quantizer is not installed: {INSTALL}, or build llama.cpp and put {PROGRAM} on PATH"
    )
