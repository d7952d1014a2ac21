"""The AMX path of the projection, its tiles emulated: the tests of the operator, in this build.

Everything from the operator down is the code that ships; see emulation.py for what differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk
from safelora_kernels.backends import _REGISTRY, cpu

from ..ops import truth
from ..ops.test_project import (
    FP32_BOUND,
    test_error_is_at_most_twice_that_of_torch_in_the_same_dtype,
    test_ranks,
    test_shapes,
)
from ..ops.test_project_large import (
    WEIGHTS,
    test_a_difference_of_one_entry_goes_where_it_belongs,
    test_a_weight_that_is_not_finite_spoils_its_layer_alone,
    test_any_nan_in_a_factor_spoils_its_column_alone,
    test_bits_do_not_depend_on_threads_or_company,
    test_factors_in_half_precision,
    test_layouts_of_both_weights_and_of_one,
    test_panels_of_sixteen_ranks,
    test_several_adapters_share_panels,
    test_shapes_of_whole_cells_and_edges,
    test_weights_far_from_one,
    test_weights_of_two_dtypes,
    threads,
)
from ..ops.truth import assert_accurate, random_layer
from .emulation import Tiles, load_operators, missing

__all__ = [
    "test_a_difference_of_one_entry_goes_where_it_belongs",
    "test_a_weight_that_is_not_finite_spoils_its_layer_alone",
    "test_any_nan_in_a_factor_spoils_its_column_alone",
    "test_bits_do_not_depend_on_threads_or_company",
    "test_error_is_at_most_twice_that_of_torch_in_the_same_dtype",
    "test_factors_in_half_precision",
    "test_layouts_of_both_weights_and_of_one",
    "test_panels_of_sixteen_ranks",
    "test_ranks",
    "test_several_adapters_share_panels",
    "test_shapes",
    "test_shapes_of_whole_cells_and_edges",
    "test_weights_far_from_one",
    "test_weights_of_two_dtypes",
    "threads",
]

_REASON = missing() or ("" if cpu.STATUS[0] else cpu.STATUS[1])
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    return Tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def operators(tiles: Tiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return load_operators(tiles, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def backend(tiles: Tiles, operators: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The native kernels on emulated tiles; a tile that is misused fails the test."""
    launchers = _REGISTRY["cpu"].launchers
    for name, operator in operators.items():
        monkeypatch.setitem(launchers, name, operator)  # type: ignore[arg-type]
    tiles.products()
    yield "cpu"
    assert tiles.fault() == ""


def project(layer: truth.Layer, backend: str) -> Tensor:
    result = sk.project_lowrank(*layer, backend=backend).lora_B
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize(
    ("shape", "cells", "panels"),
    [((128, 128, 16), 8, 1), ((144, 256, 17), 18, 2), ((304, 1024, 64), 152, 4), ((127, 400, 16), 0, 0)],
    ids=str,
)
def test_tiles_do_the_work(backend: str, tiles: Tiles, shape: tuple[int, int, int], cells: int, panels: int) -> None:
    """For each cell of 16×128 and each panel, two products of 8 tiles and four of 4; none for a small layer."""
    project(random_layer(*shape, weight=torch.bfloat16), backend)
    assert tiles.products() == cells * panels * (2 * 8 + 4 * 4)


def test_low_parts_that_are_zero_are_not_multiplied(backend: str, tiles: Tiles) -> None:
    """Of V in the second product, by groups of 32 columns of a cell: half of their products are left out."""
    cells, panels = 8 * 2, 2
    layer = random_layer(128, 256, 20, torch.bfloat16)
    layer = layer._replace(base=torch.zeros_like(layer.base))
    assert_accurate(project(layer, backend), truth.project(*layer[:3]), FP32_BOUND)
    assert tiles.products() == cells * panels * (2 * 8 + 2 * 4)
    layer.aligned[37, 200], layer.base[37, 200] = 1, 2.0**-9
    assert_accurate(project(layer, backend), truth.project(*layer[:3]), FP32_BOUND)
    assert tiles.products() == cells * panels * (2 * 8 + 2 * 4) + panels * 2


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", [(128, 128, 3), (145, 257, 17), (400, 700, 16)], ids=str)
def test_every_element_is_within_the_promised_bound(
    backend: str, shape: tuple[int, int, int], weight: torch.dtype
) -> None:
    """docs/numerics.md: γ over rows, columns and twelve more, and what splitting into bf16 parts leaves out."""
    layer = random_layer(*shape, weight)
    v = truth.difference(layer.aligned, layer.base)
    terms = v.abs() @ (v.abs().T @ layer.lora_B.double().abs()) / v.norm()
    unit = 2.0**-24
    rounding = (shape[0] + shape[1] + 12) * unit
    split = (10 if weight == torch.bfloat16 else 6) * 2.0**-16
    expected = truth.project(*layer[:3])
    error = (project(layer, backend).double() - expected).abs()
    allowed = (rounding / (1 - rounding) + split) * terms + unit * expected.abs()
    assert bool((error <= allowed).all())


def test_the_path_differs_from_the_one_of_this_cpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(256, 256, 16, torch.bfloat16)
    emulated = project(layer, backend)
    monkeypatch.undo()
    if cpu.code_path() != "amx":
        assert not torch.equal(emulated, project(layer, backend))
