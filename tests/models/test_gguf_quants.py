"""Every number format that the `gguf` package reads is dequantized to ggml's own values."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import _type_traits

from qlora_train.architectures.gguf_reader import read_structure
from qlora_train.models.gguf_tensors import dequantize

pytest.importorskip("xllamacpp")

SCRIPT = Path(__file__).parent.parent / "support" / "ggml_blocks.py"
FORMATS = sorted(kind for kind in _type_traits if kind.name != "NVFP4")  # ggml computes with it on GPUs alone
Blocks = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    file = tmp_path_factory.mktemp("ggml") / "blocks.npz"
    subprocess.run([sys.executable, str(SCRIPT), str(file), *(str(int(kind)) for kind in FORMATS)], check=True)
    return dict(np.load(file))


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_values_are_those_of_ggml(kind: gguf.GGMLQuantizationType, blocks: Blocks, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", blocks[str(int(kind))], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_structure(tmp_path / "one.gguf").tensors["w"]
    expected = torch.from_numpy(blocks[f"{int(kind)}.values"])
    assert expected.std() > 0.5
    ours = dequantize(tensor)
    assert torch.allclose(ours.float(), expected.to(ours.dtype).float(), rtol=2**-7, atol=1e-6)
    assert (ours.float() - expected).abs().max() < 2**-8 * expected.abs().max()
