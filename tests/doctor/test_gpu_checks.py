"""Checks beside a GPU: what it is, its dtype, and the kernels that run on it."""

from collections.abc import Callable, Iterator

import pytest
import torch

from qlora_train.doctor import Check, hardware_checks
from qlora_train.kernels.ops import dispatch
from qlora_train.kernels.packed import varlen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def only(check: Callable[[], Iterator[Check]]) -> Check:
    (found,) = check()
    return found


def test_every_gpu_is_named_with_its_memory() -> None:
    found = list(hardware_checks.devices())
    assert len(found) == torch.cuda.device_count()
    for index, check in enumerate(found):
        assert check.status == "ok"
        assert torch.cuda.get_device_name(index) in check.text
        assert f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.1f} GiB" in check.text


def test_dtype_is_the_one_that_a_run_chooses() -> None:
    check = only(hardware_checks.compute_dtype)
    expected = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    assert check.text.startswith(f"{expected} (")
    assert (check.status == "ok") == (expected == "bfloat16")


def test_kernels_are_those_that_a_run_uses() -> None:
    device = torch.device("cuda")
    packed, triton = only(hardware_checks.packed_attention), only(hardware_checks.triton_kernels)
    assert (packed.status == "ok") == varlen.works_on(device)
    assert (triton.status == "ok") == (dispatch.HAS_TRITON and dispatch.works_on(device))


def test_a_kernel_that_fails_is_a_note_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        return "RuntimeError: no compiler"

    monkeypatch.setattr(varlen, "varlen_problem", fails)
    monkeypatch.setattr(dispatch, "triton_problem", fails)
    monkeypatch.setattr(hardware_checks, "find_spec", lambda _: True)
    for check in (only(hardware_checks.packed_attention), only(hardware_checks.triton_kernels)):
        assert check.status == "note"
        assert "(RuntimeError: no compiler)" in check.text
