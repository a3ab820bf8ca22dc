"""Quantized files are those of llama.cpp's own program: types of tensors, and whole files byte by byte.

`scripts/record_quants.py` recorded what the program wrote.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_train.export.gguf.gguf_quants import QUANTS, estimated_bytes
from qlora_train.export.gguf.quant_mix import MixModel, tensor_types
from qlora_train.utils.errors import ExportError

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from qlora_train.export.gguf.gguf_check import GGUFFile
from qlora_train.export.gguf.write_quantized import write_quantized
from tests.support.quant_cases import CASES, encode_types, write_case

RECORDED = json.loads((Path(__file__).parents[1] / "files" / "llama_quantize.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_tensors_get_the_types_that_llama_quantize_gives_them(name: str, tmp_path: Path) -> None:
    file = GGUFFile(write_case(CASES[name], tmp_path / "model.gguf", with_values=False))
    unquantized = dict.fromkeys(file.shapes(), "F32")
    actual: dict[str, str | None] = {}
    for quant in RECORDED["types"][name]:
        try:
            actual[quant] = encode_types(unquantized | tensor_types(quant, file.mix_model(), file.shapes()))
        except ExportError:
            actual[quant] = None
    assert actual == RECORDED["types"][name]


def test_the_cases_tell_the_rules_apart() -> None:
    types: dict[str, dict[str, Any]] = RECORDED["types"]
    mixes = {quant for quant, row in QUANTS.items() if not row.converted} | {"q8_0"}
    assert all(set(by_quant) == mixes for by_quant in types.values())
    assert len({types["llama"][quant] for quant in mixes}) == len(mixes)
    assert types["70B"]["q4_k_m"] != types["65B"]["q4_k_m"]
    assert types["shared heads"]["iq4_xs"] != types["no shared heads, tied"]["iq4_xs"]
    assert types["8 experts"]["q4_k_m"] != types["16 experts"]["q4_k_m"]
    assert "Q5_0" in types["narrow"]["q4_k_m"]
    assert set(types["neither"].values()) == {None}
    with pytest.raises(ExportError, match=r"output.weight: rows of 80 values are no whole number of Q8_0 blocks of 32"):
        tensor_types("q4_k_m", MixModel("llama", 2, 4, 2, 0), CASES["neither"].shapes)


@pytest.mark.parametrize("case", RECORDED["sha256"])
def test_whole_files_equal_those_of_llama_quantize(case: str, tmp_path: Path) -> None:
    name, _, kind = case.partition(" from ")
    source = GGUFFile(write_case(CASES[name], tmp_path / "source.gguf", kind))
    target = tmp_path / "target.gguf"
    for quant, sha256 in RECORDED["sha256"][case].items():
        types = tensor_types(quant, source.mix_model(), source.shapes())
        write_quantized(str(source.path), str(target), QUANTS[quant].file_type, types, num_threads=2)
        assert hashlib.sha256(target.read_bytes()).hexdigest() == sha256, quant
        estimate = estimated_bytes(quant, {key: shape[::-1] for key, shape in CASES[name].shapes.items()})
        assert target.stat().st_size <= estimate


def test_values_that_a_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = GGUFFile(write_case(CASES["few layers"], tmp_path / "source.gguf"))
    content = bytearray(source.path.read_bytes())
    at = int(next(t for t in source._reader.tensors if t.name == "blk.0.ffn_up.weight").data_offset)
    content[at : at + 4] = b"\x00\x00\xc0\x7f"  # NaN
    source.path.write_bytes(content)
    types = tensor_types("q4_k_m", source.mix_model(), source.shapes())
    with pytest.raises(SystemExit, match=r"blk.0.ffn_up.weight: values that are not finite"):
        write_quantized(str(source.path), str(tmp_path / "x.gguf"), QUANTS["q4_k_m"].file_type, types, num_threads=1)
