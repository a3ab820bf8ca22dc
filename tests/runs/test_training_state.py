"""Training state survives safetensors and JSON, types included."""

import json
import pickletools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_train.runs.training_state import load_parameters, load_tree, random_state, restore_random_state, save_tree
from qlora_train.utils.errors import CheckpointError

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool,
)  # fmt: skip
PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 100
    return values.to(dtype).T if draw(st.booleans()) and len(shape) == 2 else values.to(dtype)


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            | st.dictionaries(st.integers(0, 10**6), inner, max_size=3)
        ),
        max_leaves=12,
    )


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), "keys, their types and their order"
        assert [type(key) for key in found] == [type(key) for key in wanted]
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    else:
        assert found == wanted
        assert str(found) == str(wanted), "-0.0 is not 0.0"


@given(tree=trees(PLAIN | tensors()))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_tree_comes_back_with_equal_values_of_equal_types(tree: Any, tmp_path: Path) -> None:
    save_tree(tmp_path, "state", tree)
    assert_same(load_tree(tmp_path, "state"), tree)


def test_the_state_of_a_real_optimizer_comes_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(3):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        schedule.step()
    state = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
    save_tree(tmp_path, "state", state)
    assert_same(load_tree(tmp_path, "state"), state)


def test_one_tensor_in_two_places_is_saved(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    save_tree(tmp_path, "state", {"a": shared, "b": shared, "view": shared[1:3]})
    found = load_tree(tmp_path, "state")
    assert [found[key].tolist() for key in ("a", "b", "view")] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2]]


@pytest.mark.parametrize("value", [{1, 2}, object(), {"a": {1: 2, "b": 3}}, b"bytes", {1.5: 2}])
def test_what_cannot_be_restored_exactly_is_not_saved(value: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save_tree(tmp_path, "state", value)


@pytest.mark.parametrize("key", ["__tensor__", "__tuple__", "__int_keys__"])
def test_reserved_keys_are_not_saved(key: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save_tree(tmp_path, "state", {"inner": {key: "0"}})


def test_there_is_no_pickle_on_disk(tmp_path: Path) -> None:
    save_tree(tmp_path, "state", random_state())
    assert {path.name for path in tmp_path.iterdir()} == {"state.json", "state.safetensors"}
    json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))
    with (tmp_path / "state.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert all("dtype" in entry for entry in header.values())
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=r".+"):
            list(pickletools.genops(path.read_bytes()))


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"rubbish", b"\xff\xfe"])
def test_state_that_cannot_be_read_is_one_line(name: str, content: bytes | None, tmp_path: Path) -> None:
    save_tree(tmp_path, "state", {"a": torch.ones(2)})
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state cannot be read .*; resume from an older checkpoint") as caught:
        load_tree(tmp_path, "state")
    assert "\n" not in str(caught.value)


# --- random generators ------------------------------------------------------------------------------------------------


def draws() -> dict[str, list[float]]:
    """Numbers from every generator; an odd number of gaussians, so that one stays cached."""
    return {
        "python": [random.random(), random.gauss(0, 1), random.randint(0, 10**9)],
        "numpy": [*np.random.rand(2).tolist(), *np.random.randn(3).tolist()],
        "torch": [*torch.rand(3).tolist(), *torch.randn(3).tolist()],
        "torch on the GPU": torch.rand(2, device="cuda").tolist() if torch.cuda.is_available() else [],
    }


def test_the_rng_state_of_one_gpu_is_stored_with_any_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, *_: restored.append(state))
    restore_random_state(random_state())
    assert [state.tolist() for state in restored] == [list(range(16))]


def test_a_checkpoint_of_a_cpu_is_restored_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {**random_state(), "cuda": []}
    expected = draws()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        restore_random_state(state)
    assert draws() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_generator_goes_on_where_it_was(seed: int, tmp_path: Path) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    draws()
    save_tree(tmp_path, "random", random_state())
    wanted = draws()
    for _ in range(3):
        draws()
    restore_random_state(load_tree(tmp_path, "random"))
    assert draws() == wanted


# --- parameters -------------------------------------------------------------------------------------------------------


def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.full((2, 3), value)) for name, value in (("a", 1.0), ("b", 2.0))}


def test_parameters_are_copied_bit_for_bit_into_the_live_ones() -> None:
    live = parameters()
    places = {name: parameter.data_ptr() for name, parameter in live.items()}
    stored = {name: torch.randn(2, 3) for name in live}
    stored["a"][0, 0], stored["a"][0, 1] = float("nan"), -0.0
    load_parameters(live, stored, "here")
    for name, parameter in live.items():
        assert parameter.data_ptr() == places[name]
        assert parameter.requires_grad
        assert torch.equal(parameter.detach().view(torch.int32), stored[name].view(torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "b is missing"),
        ({"c": torch.ones(1)}, "c is unknown"),
        ({"b": torch.ones(3, 2)}, r"b is \(3, 2\) torch.float32, the model has \(2, 3\) torch.float32"),
        ({"b": torch.ones(2, 3, dtype=torch.bfloat16)}, r"b is \(2, 3\) torch.bfloat16, the model has \(2, 3\)"),
        ({"b": torch.ones(1)}, "b is"),
        ({name: torch.ones(1) for name in "defg"}, r"d is unknown; e is unknown; f is unknown \.\.\."),
    ],
)
def test_parameters_that_do_not_match_are_refused_and_none_is_copied(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    live = parameters()
    stored = {
        name: value for name, value in ({n: torch.zeros(2, 3) for n in live} | change).items() if value is not None
    }
    with pytest.raises(CheckpointError, match=f"^step-3: does not fit the model: {message}") as caught:
        load_parameters(live, stored, "step-3")
    assert "\n" not in str(caught.value)
    assert [parameter[0, 0].item() for parameter in live.values()] == [1.0, 2.0]
