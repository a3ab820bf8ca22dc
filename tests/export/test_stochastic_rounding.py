"""A merge into 16 bits keeps updates that are smaller than the distance between two 16-bit numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.export.merging.weight_update import stochastic_round
from tests.support.merging import merge, plain, save_adapter

DTYPES = [torch.bfloat16, torch.float16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_the_dtype_has_are_not_changed(dtype: torch.dtype) -> None:
    every_pattern = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = every_pattern[~every_pattern.isnan()]
    assert torch.equal(stochastic_round(numbers.float(), dtype, seeded()), numbers)
    assert stochastic_round(torch.full((8,), torch.nan), dtype, seeded()).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mean_of_both_neighbours_is_the_value(dtype: torch.dtype, sign: float) -> None:
    spacing = torch.finfo(dtype).eps  # of the numbers between 1 and 2
    for share in (0.05, 0.5, 0.9):
        values = torch.full((20_000,), sign * (1.25 + share * spacing))
        rounded = stochastic_round(values, dtype, seeded()).double()
        assert set(rounded.tolist()) == {sign * 1.25, sign * (1.25 + spacing)}
        above = float((rounded.abs() - 1.25).mean()) / spacing
        assert above == pytest.approx(share, abs=5 * (share * (1 - share) / len(values)) ** 0.5)


def test_a_small_update_is_merged_in_the_mean(pico_llama: Path, tmp_path: Path) -> None:
    base = pico_llama  # stored in bfloat16
    adapter = save_adapter(plain(base), tmp_path / "adapter", std=0.0001)
    exact, rounded, again = (tmp_path / name for name in ("exact", "rounded", "again"))
    merge(base, adapter, exact, dtype=torch.float32)
    merge(base, adapter, rounded, dtype=torch.bfloat16)
    merge(base, adapter, again, dtype=torch.bfloat16)
    before, wanted, found = (load_file(folder / "model.safetensors") for folder in (base, exact, rounded))
    assert (again / "model.safetensors").read_bytes() == (rounded / "model.safetensors").read_bytes()
    updated = [name for name in wanted if not torch.equal(wanted[name], before[name].float())]
    assert len(updated) > 10

    def share_kept(cast: Callable[[str], torch.Tensor]) -> float:
        """Return the share of the updates that is left, by projection on them."""
        pairs = [((wanted[name] - before[name].float()), cast(name).float() - before[name].float()) for name in updated]
        return float(sum((a * b).sum() for a, b in pairs) / sum((a * a).sum() for a, _ in pairs))

    assert share_kept(lambda name: wanted[name].bfloat16()) < 0.8, "rounding to nearest loses a part of them"
    assert share_kept(lambda name: found[name]) == pytest.approx(1, abs=0.03)
