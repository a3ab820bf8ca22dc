"""Which attention kernel a model is loaded with, independent of installed FlashAttention packages. No GPU is needed."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_train.architectures import ARCHITECTURES
from qlora_train.models.hardware import choose_attention
from qlora_train.utils.errors import ConfigError

GPU = torch.device("cuda", 0)
WORKS = "__version__ = '2.8.3'\n"
BROKEN = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E')\n"


def install_flash_attn(folder: Path, code: str) -> Path:
    """Write a package flash-attn that does nothing."""
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn" / "__init__.py").write_text(code)
    about = folder / "flash_attn-2.8.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (about / "top_level.txt").write_text("flash_attn\n")
    return folder


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    yield monkeypatch
    sys.modules.pop("flash_attn", None)  # what the test imported


def choose(setting: str, dtype: torch.dtype = torch.bfloat16) -> str:
    return choose_attention(setting, ARCHITECTURES["llama"], GPU, dtype, has_sdpa=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [WORKS, BROKEN], ids=["works", "broken"])
def test_auto_is_sdpa_whether_or_not_flash_attn_is_installed(
    code: str, ampere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ampere.syspath_prepend(install_flash_attn(tmp_path, code))
    assert choose("auto") == choose("sdpa") == "sdpa"


def test_flash_attention_is_used_if_set(ampere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ampere.syspath_prepend(install_flash_attn(tmp_path, WORKS))
    assert choose("flash_attention_2") == "flash_attention_2"


def test_flash_attn_built_for_another_torch_is_one_line(ampere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ampere.syspath_prepend(install_flash_attn(tmp_path, BROKEN))
    importlib.invalidate_caches()
    with pytest.raises(ConfigError) as caught:
        choose("flash_attention_2")
    assert str(caught.value) == (
        "model.attn_implementation: flash_attention_2: flash-attn is installed and cannot be imported: "
        "flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E; install a build for torch "
        f"{torch.__version__}, or use auto or sdpa"
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "problem"),
    [((7, 5), torch.float16, "needs compute capability 8.0"), ((9, 0), torch.float32, "has no float32")],
)
def test_flash_attention_on_an_unsupported_gpu_or_dtype_is_one_line(
    capability: tuple[int, int], dtype: torch.dtype, problem: str, ampere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ampere.syspath_prepend(install_flash_attn(tmp_path, WORKS))
    ampere.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(ConfigError, match=problem):
        choose("flash_attention_2", dtype)


def test_broken_flash_attn_does_not_stop_a_run_without_it(pico_llama: Path, tmp_path: Path) -> None:
    """Transformers takes the package for usable wherever there is a GPU."""
    code = f"""
import torch, bitsandbytes
torch.cuda.is_available = lambda: True
import trl, peft
from qlora_train.models import load_model
from qlora_train.config.schema import ModelSection, QuantizationSection
from transformers.utils import import_utils
assert import_utils.is_flash_attn_2_available()
import qlora_train.models.loading as loader
loader.select_device = lambda: torch.device("cpu")
loaded = load_model(ModelSection(model_name_or_path={str(pico_llama)!r}), QuantizationSection())
assert loaded.model.config._attn_implementation == "sdpa"
loaded.model(torch.tensor([[5, 6, 7]]))
"""
    install_flash_attn(tmp_path, BROKEN)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
