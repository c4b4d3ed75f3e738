"""Recycled outputs: memory comes back when its last tensor is gone, and never before."""

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from fastconv import torch_memory  # noqa: E402  (after the skip)

BIG = (torch_memory.SMALLEST // 4,)


@pytest.fixture(autouse=True)
def nothing_unused():
    torch_memory.release()
    yield
    torch_memory.release()


def test_memory_of_a_dead_output_is_used_again():
    y = torch_memory.empty(BIG, torch.float32)
    pointer = y.data_ptr()
    del y
    assert torch_memory.unused_bytes() == torch_memory.SMALLEST
    again = torch_memory.empty((4, BIG[0] // 4), torch.float32)
    assert again.data_ptr() == pointer
    assert torch_memory.unused_bytes() == 0


def test_memory_begins_at_a_cache_line():
    kept = [torch_memory.empty((n, *BIG), torch.float32) for n in (1, 2, 3)]
    assert [y.data_ptr() % torch_memory.LINE for y in kept] == [0, 0, 0]


@pytest.mark.parametrize(
    "alias",
    [
        lambda y: y[5:],
        lambda y: y.view(2, -1).movedim(0, 1),
        lambda y: y.detach(),
        lambda y: y.numpy(),
        lambda y: torch.from_numpy(y.numpy()[3:]),
        lambda y: y.untyped_storage(),
    ],
)
def test_an_alias_keeps_the_memory(alias):
    kept = alias(torch_memory.empty(BIG, torch.float32))
    gc.collect()
    assert torch_memory.unused_bytes() == 0
    del kept
    gc.collect()
    assert torch_memory.unused_bytes() == torch_memory.SMALLEST


@given(st.lists(st.tuples(st.sampled_from((1, 2, 3)), st.integers(0, 5)), max_size=30))
def test_living_outputs_never_share_memory(steps):
    living: list[tuple[torch.Tensor, int]] = []
    for number, (size, drop) in enumerate(steps):
        y = torch_memory.empty((size, *BIG), torch.float32)
        y.fill_(number)
        living.append((y, number))
        del y
        if drop < len(living):
            living.pop(drop)
    assert all(bool((y == number).all()) for y, number in living)


def test_small_outputs_are_pytorchs():
    assert torch_memory.empty((3,), torch.float64).untyped_storage().resizable()
    assert torch_memory.unused_bytes() == 0


def test_what_is_kept_has_a_limit(monkeypatch):
    monkeypatch.setattr(torch_memory, "LIMIT", 2 * torch_memory.SMALLEST)
    many = [torch_memory.empty(BIG, torch.float32) for _ in range(4)]
    many.clear()
    assert torch_memory.unused_bytes() == 2 * torch_memory.SMALLEST
