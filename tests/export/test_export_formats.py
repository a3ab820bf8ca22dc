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
    assert [row.choose_quants(()) for row in EXPORT_FORMATS.values()] == [("f16",), ("f16",), ("f16",), ()]
    assert EXPORT_FORMATS["gguf"].choose_quants(("Q4_K_M", "q8_0", "q4_k_m")) == ("q4_k_m", "q8_0")
    with pytest.raises(
        ExportError, match=r"--quant q4_k_n: --format gguf has f16, .*; did you mean q4_k_m or q4_k_s\?"
    ):
        EXPORT_FORMATS["gguf"].choose_quants(("f16", "q4_k_n"))
    with pytest.raises(ExportError, match=r"--quant q4_k_m: --format lora-gguf has f16, f32, bf16, q8_0$"):
        EXPORT_FORMATS["lora-gguf"].choose_quants(("q4_k_m",))
    with pytest.raises(ExportError, match="--quant f16: --format vllm has no number format; drop it"):
        EXPORT_FORMATS["vllm"].choose_quants(("f16",))


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, qlora_train.export.export_formats; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
