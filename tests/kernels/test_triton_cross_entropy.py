"""The cross-entropy kernel against the reference and against autograd in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qlora_train.kernels.ops import cross_entropy as reference
from tests.support.triton_interpreter import CLOSE, DEVICE, needs_its_device, use_kernels

pytestmark = needs_its_device
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 50), (5, 4096), (2, 4097), (4, 12345)], ids=str)


def batch(rows: int, vocabulary: int, dtype: torch.dtype, scale: float = 5.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = scale * torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[0], targets[-1] = 0, vocabulary - 1
    return logits.to(DEVICE, dtype), targets.to(DEVICE)


@SHAPES
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_losses_and_gradient_match_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from qlora_train.kernels.ops import cross_entropy_triton as kernels

    logits, targets = batch(*shape, dtype)
    wanted_gradient, gradient = logits.clone(), logits.clone()
    expected = reference.reference_(wanted_gradient, targets)
    actual = kernels.losses_and_gradient_(gradient, targets)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=CLOSE[dtype]["rtol"] + 1e-5, atol=CLOSE[dtype]["atol"])


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_losses_and_gradient_match_autograd_in_float64(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)
    logits, targets = batch(6, 5000, torch.float32, scale)
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    actual = reference.losses_and_gradient_(logits, targets)
    torch.testing.assert_close(actual.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-3, atol=1e-6)


def test_view_of_some_rows_and_columns() -> None:
    from qlora_train.kernels.ops import cross_entropy_triton as kernels

    logits, targets = batch(4, 300, torch.bfloat16)
    whole = logits.clone()
    kernels.losses_and_gradient_(whole[1:3, :200], targets[1:3] % 200)
    assert torch.equal(whole[[0, 3]], logits[[0, 3]])
    assert torch.equal(whole[:, 200:], logits[:, 200:])
    assert whole[1:3, :200].float().sum(1).abs().max() < 1e-2, "gradients of a row sum to 0"


def test_nan_logit_gives_a_nan_loss() -> None:
    from qlora_train.kernels.ops import cross_entropy_triton as kernels

    logits, targets = batch(3, 300, torch.float32)
    logits[1, 7] = float("nan")
    losses = kernels.losses_and_gradient_(logits, targets)
    assert losses.isnan().tolist() == [False, True, False]


def test_logits_of_minus_infinity_have_no_gradient() -> None:
    from qlora_train.kernels.ops import cross_entropy_triton as kernels

    logits, targets = batch(2, 5000, torch.float32)
    logits[:, :4500] = float("-inf")  # more than one iteration of a program
    targets[:] = 4700
    losses = kernels.losses_and_gradient_(logits, targets)
    assert losses.isfinite().all()
    assert (logits[:, :4500] == 0).all()
    assert (logits[:, 4500:] != 0).all()


def test_autograd_detects_the_write_to_the_logits() -> None:
    from qlora_train.kernels.ops import cross_entropy_triton as kernels

    logits, targets = batch(2, 300, torch.float32)
    scaled = logits.requires_grad_() * 1
    squared = scaled.square()  # saves what it squares
    kernels.losses_and_gradient_(scaled.detach(), targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    with torch.inference_mode():
        kernels.losses_and_gradient_(logits.clone(), targets)
