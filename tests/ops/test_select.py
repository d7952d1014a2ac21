"""select_layers: both rules, ties, NaN, the edges of K, and independence of order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import safelora_kernels as sk

NAN = float("nan")


def chosen(cosines: list[float] | Tensor, backend: str | None = None, **options: object) -> list[int]:
    values = cosines if isinstance(cosines, Tensor) else torch.tensor(cosines, dtype=torch.float64)
    result = sk.select_layers(values, backend=backend, **options)  # type: ignore[arg-type]
    assert result.dtype == torch.bool
    assert result.shape == values.shape
    return result.nonzero().flatten().tolist()


def test_threshold_is_inclusive(backend: str) -> None:
    cosines = [0.3, 0.5, 0.5000001, NAN, 0.1]
    assert chosen(cosines, backend, threshold=0.5) == [0, 1, 4]
    assert chosen(cosines, backend, threshold=0.05) == []
    assert chosen(cosines, backend, threshold=1) == [0, 1, 2, 4]


def test_the_authors_round_to_five_decimals_first(backend: str) -> None:
    cosines = [0.350004, 0.350006, 0.35, 0.349994]
    assert chosen(cosines, backend, threshold=0.35, rule="authors") == [0, 2, 3]
    assert chosen(cosines, backend, threshold=0.35) == [2, 3]


def test_number_mode_takes_exactly_k_with_ties_to_the_lower_index(backend: str) -> None:
    cosines = [0.4, 0.2, 0.4, 0.2, 0.2, NAN]
    assert chosen(cosines, backend, num_layers=1) == [1]
    assert chosen(cosines, backend, num_layers=2) == [1, 3]
    assert chosen(cosines, backend, num_layers=4) == [0, 1, 3, 4]


def test_number_mode_of_the_authors_takes_all_that_tie_after_rounding(backend: str) -> None:
    cosines = [0.4, 0.2, 0.4, 0.200001, 0.20001, NAN]
    assert chosen(cosines, backend, num_layers=1, rule="authors") == [1, 3]
    assert chosen(cosines, backend, num_layers=3, rule="authors") == [1, 3, 4]
    assert chosen(cosines, backend, num_layers=4, rule="authors") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rule", ["strict", "authors"])
def test_edges_of_k(backend: str, rule: str) -> None:
    cosines = [0.4, NAN, 0.2]
    assert chosen(cosines, backend, num_layers=0, rule=rule) == []
    for k in (2, 3, 4, 1000):
        assert chosen(cosines, backend, num_layers=k, rule=rule) == [0, 2]
    assert chosen([], backend, num_layers=3, rule=rule) == []
    assert chosen([], backend, threshold=0.5, rule=rule) == []
    assert chosen([NAN, NAN], backend, num_layers=1, rule=rule) == []
    assert chosen([NAN, NAN], backend, threshold=2.0, rule=rule) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compares_in_fp64(backend: str, dtype: torch.dtype) -> None:
    cosines = torch.tensor([0.1, 0.7], dtype=dtype)
    above = float(cosines[0].double()) - 1e-12
    assert chosen(cosines, backend, threshold=above) == []
    assert chosen(cosines, backend, threshold=above + 2e-12) == [0]


def test_strided_and_on_its_device(backend: str) -> None:
    cosines = torch.tensor([[0.1, 9.0], [0.3, 9.0], [0.2, 9.0]])[:, 0]
    assert chosen(cosines, backend, num_layers=2) == [0, 2]
    assert sk.select_layers(torch.empty(4, device="meta"), num_layers=2).device.type == "meta"


def by_definition(cosines: list[float], threshold: float | None, num_layers: int | None, rule: str) -> set[int]:
    rounded = [c if rule == "strict" else round(c, 5) for c in cosines]
    valid = [i for i, c in enumerate(rounded) if c == c]
    if num_layers is None:
        assert threshold is not None
        return {i for i in valid if rounded[i] <= threshold}
    order = sorted(valid, key=lambda i: (rounded[i], i))[:num_layers]
    if rule == "authors" and order:
        return {i for i in valid if rounded[i] <= rounded[order[-1]]}
    return set(order)


values = st.one_of(st.floats(0, 1), st.sampled_from([0.25, 0.250004, 0.5, NAN]))


@given(st.lists(values, max_size=12), st.sampled_from(["strict", "authors"]), st.integers(0, 14), st.floats(0, 1))
def test_agrees_with_the_definition(cosines: list[float], rule: str, k: int, threshold: float) -> None:
    assert set(chosen(cosines, num_layers=k, rule=rule)) == by_definition(cosines, None, k, rule)
    assert set(chosen(cosines, threshold=threshold, rule=rule)) == by_definition(cosines, threshold, None, rule)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12, unique=True), st.randoms(), st.floats(0, 1), st.floats(0, 1))
def test_monotone_and_independent_of_order(cosines: list[float], random: object, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    order = list(range(len(cosines)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = [cosines[i] for i in order]
    for rule in ("strict", "authors"):
        assert set(chosen(cosines, threshold=low, rule=rule)) <= set(chosen(cosines, threshold=high, rule=rule))
        for options in ({"threshold": low}, {"num_layers": len(cosines) // 2}):
            back = {order[i] for i in chosen(shuffled, rule=rule, **options)}  # type: ignore[arg-type]
            assert back == set(chosen(cosines, rule=rule, **options))  # type: ignore[arg-type]


def test_wrong_arguments_are_named() -> None:
    cosines = torch.rand(3)

    def refused(error: type[Exception], match: str, values: object = cosines, **options: object) -> None:
        with pytest.raises(error, match=match):
            sk.select_layers(values, **options)  # type: ignore[arg-type]

    refused(ValueError, "exactly one of threshold and num_layers, got neither")
    refused(ValueError, "exactly one of threshold and num_layers, got both", threshold=0.5, num_layers=1)
    refused(ValueError, "rule must be one of", threshold=0.5, rule="paper")
    refused(ValueError, "threshold is NaN", threshold=NAN)
    refused(TypeError, "threshold must be a float, got str", threshold="0.5")
    refused(ValueError, "num_layers must be 0 or more, got -1", num_layers=-1)
    refused(TypeError, "num_layers must be an int, got float", num_layers=1.0)
    refused(ValueError, "cosines must be 1-D", torch.rand(2, 2), threshold=0.5)
    refused(TypeError, "got list", [0.5], threshold=0.5)
    refused(TypeError, "int64", torch.ones(3, dtype=torch.int64), threshold=0.5)
