"""The table of export formats is complete, and what it names exists."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from qlora_train.export.export_formats import EXPORT_FORMATS
from qlora_train.utils.errors import ExportError

DOCS = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_every_format_has_its_function_and_its_line_in_the_docs(name: str) -> None:
    module, _, function = EXPORT_FORMATS[name].function.partition(":")
    if "gguf" in name:
        pytest.importorskip("gguf")
    assert callable(getattr(import_module(module), function))
    assert f"--format {name}" in DOCS.read_text(encoding="utf-8")


def test_quant_is_the_default_or_one_that_the_format_has() -> None:
    assert [row.choose_quant(None) for row in EXPORT_FORMATS.values()] == ["f16", "f16", "f16", ""]
    assert EXPORT_FORMATS["gguf"].choose_quant("q8_0") == "q8_0"
    with pytest.raises(ExportError, match="--quant q4_k_m: allowed are f16, f32, bf16, q8_0; for Q4_K_M export f16"):
        EXPORT_FORMATS["gguf"].choose_quant("q4_k_m")
    with pytest.raises(ExportError, match="--quant f16: --format vllm has no number format; drop it"):
        EXPORT_FORMATS["vllm"].choose_quant("f16")


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, qlora_train.export.export_formats; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
