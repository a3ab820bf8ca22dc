"""The reference of 4-bit quantization against the paper's values and bitsandbytes' storage."""

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import nf4_reference

PUBLISHED_NF4 = (
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
)  # fmt: skip
NESTED_RESOLUTION = 2.0**-15
"""Error of bitsandbytes' 8-bit rounding on CPUs beyond the nearest value, relative to the scale."""


def random_blocks(*, seed: int = 0, shape: tuple[int, ...] = (64, 192), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_outliers() -> Tensor:
    x = random_blocks(shape=(32, 64))
    x[::3, 5] = 1e4
    x[1::3, 60] = -1e-6
    return x


BLOCKS = {
    "random float32": random_blocks(),
    "random bfloat16": random_blocks(dtype=torch.bfloat16),
    "random float16": random_blocks(dtype=torch.float16),
    "weights of a model": random_blocks(dtype=torch.bfloat16) * 0.02,
    "constant": torch.full((4, 64), 0.37),
    "constant negative": torch.full((4, 64), -2.5, dtype=torch.bfloat16),
    "zero": torch.zeros(4, 64),
    "one zero block among others": torch.cat([torch.zeros(1, 64), random_blocks(shape=(3, 64))]),
    "outliers": with_outliers(),
    "tiny": random_blocks() * 1e-30,
    "last block short": random_blocks(shape=(3, 50)),
}


def zero_has_one_sign(codes: Tensor, quant_type: str) -> Tensor:
    """FP4 has two codes for zero; bitsandbytes picks by the sign of the rounded value."""
    return torch.where(codes == 8, torch.zeros_like(codes), codes) if quant_type == "fp4" else codes


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", BLOCKS)
def test_codes_absmax_and_values_equal_bitsandbytes(name: str, quant_type: str) -> None:
    x = BLOCKS[name]
    packed, absmax = nf4_reference.quantize_4bit(x, quant_type)
    stored, state = bnb.quantize_4bit(x, quant_type=quant_type)

    ours, theirs = (zero_has_one_sign(nf4_reference.unpack_codes(p), quant_type) for p in (packed, stored))
    assert torch.equal(ours, theirs)
    assert torch.equal(absmax, state.absmax)
    values = nf4_reference.dequantize_4bit(packed, absmax, tuple(x.shape), quant_type, dtype=x.dtype)
    assert torch.equal(values, bnb.dequantize_4bit(stored, state))


@given(seed=st.integers(0, 2**32), exponent=st.integers(-12, 12), rows=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_codes_equal_at_any_scale(seed: int, exponent: int, rows: int) -> None:
    x = random_blocks(seed=seed, shape=(rows, 64)) * 10.0**exponent
    packed, absmax = nf4_reference.quantize_4bit(x)
    stored, state = bnb.quantize_4bit(x, quant_type="nf4")
    assert torch.equal(packed, stored.reshape(-1))
    assert torch.equal(absmax, state.absmax)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_every_code_is_the_nearest_value(seed: int) -> None:
    x = random_blocks(seed=seed, shape=(16, 64))
    packed, absmax = nf4_reference.quantize_4bit(x)
    distance = (x.double() / absmax.double().unsqueeze(1)).reshape(-1, 1) - nf4_reference.nf4_codebook().double()
    chosen = distance.abs().gather(1, nf4_reference.unpack_codes(packed).long().unsqueeze(1)).squeeze(1)
    assert torch.allclose(chosen, distance.abs().amin(dim=1), rtol=0, atol=1e-7)


@given(seed=st.integers(0, 2**32), quant_type=st.sampled_from(["nf4", "fp4"]))
@settings(max_examples=20, deadline=None)
def test_quantization_is_idempotent(seed: int, quant_type: str) -> None:
    once = nf4_reference.dequantize_4bit(
        *nf4_reference.quantize_4bit(random_blocks(seed=seed), quant_type), (64, 192), quant_type
    )
    again = nf4_reference.dequantize_4bit(*nf4_reference.quantize_4bit(once, quant_type), (64, 192), quant_type)
    assert torch.equal(once, again)


def test_nf4_codebook_is_the_published_one() -> None:
    assert nf4_reference.nf4_codebook().tolist() == pytest.approx(PUBLISHED_NF4, abs=5.1e-5)
    assert torch.equal(nf4_reference.nf4_codebook(), bnb.get_4bit_type("nf4", device="cpu"))


def test_nf4_codebook_follows_from_the_normal_distribution() -> None:
    assert nf4_reference.derive_nf4_codebook().tolist() == pytest.approx(
        nf4_reference.nf4_codebook().tolist(), abs=2e-6
    )


def test_fp4_codebook_and_dynamic_map_are_those_of_bitsandbytes() -> None:
    assert torch.equal(nf4_reference.fp4_codebook(), bnb.get_4bit_type("fp4", device="cpu"))
    assert torch.allclose(nf4_reference.dynamic_map(), bnb.create_dynamic_map(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_double_quantized_absmax_matches_the_nested_state(name: str) -> None:
    _, absmax = nf4_reference.quantize_4bit(BLOCKS[name])
    _, state = bnb.quantize_4bit(BLOCKS[name], quant_type="nf4", compress_statistics=True)
    ours = nf4_reference.double_quantize(absmax)
    theirs = nf4_reference.QuantizedAbsmax(state.absmax, state.state2.absmax, state.offset)

    assert torch.equal(ours.offset, theirs.offset)
    assert torch.equal(ours.scales, theirs.scales)
    nearest, stored = ((nf4_reference.double_dequantize(q) - absmax).abs() for q in (ours, theirs))
    assert ((stored - nearest) <= ours.scales.max() * NESTED_RESOLUTION).all()
    restored = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(nf4_reference.double_dequantize(theirs), restored)


def test_most_indices_of_the_nested_state_are_nearest() -> None:
    x = random_blocks(shape=(1024, 1024))
    _, absmax = nf4_reference.quantize_4bit(x)
    _, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    assert (nf4_reference.double_quantize(absmax).indices == state.absmax).float().mean() > 0.99


def test_double_quantization_error_is_below_1_percent_of_the_spread() -> None:
    _, absmax = nf4_reference.quantize_4bit(random_blocks(shape=(512, 512)))
    error = (nf4_reference.double_dequantize(nf4_reference.double_quantize(absmax)) - absmax).abs().max()
    assert error <= (absmax - absmax.mean()).abs().max() * 0.01


def test_storage_is_4_127_bits_per_weight_double_quantized_and_4_5_single() -> None:
    x = torch.zeros(1024, 1024)
    packed, absmax = nf4_reference.quantize_4bit(x)
    nested = nf4_reference.double_quantize(absmax)
    bits = [
        sum(8 * t.nbytes for t in tensors) / x.numel()
        for tensors in ((packed, absmax), (packed, nested.indices, nested.scales))
    ]
    assert bits == pytest.approx([4.5, 4 + 8 / 64 + 32 / (64 * 256)])
