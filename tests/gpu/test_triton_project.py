"""The Triton projection, cosine and selection in the interpreter, held to the bounds of docs/numerics.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import safelora_kernels as sk
from safelora_kernels.backends import reference
from safelora_kernels.triton import config, cosine, project, select, tables
from tests.ops import truth
from tests.ops.truth import assert_accurate, random_layer

pytestmark = pytest.mark.interpreted

FP32_BOUND = 1e-5
COSINE_BOUND = V_NORM_BOUND = 1e-6
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The last one is cut into two strips and two chunks of rows; "small" ones are multiplied in fp32.
SHAPES = [
    (1, 1, 1),
    (5, 123, 3),
    (127, 300, 7),
    (128, 128, 8),
    (130, 200, 12),
    (33, 257, 17),
    (600, 5, 2),
    (530, 2200, 5),
]


@pytest.fixture(autouse=True)
def large_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays by the tile; tests marked own_tiles keep those of the GPUs."""
    if "own_tiles" not in request.fixturenames:
        monkeypatch.setattr(config, "project", lambda *_: config.Project(128, 128, 256, 128, 4, 1, 2))
        monkeypatch.setattr(config, "gram", lambda *_: config.Gram(32, 256, 4))


@pytest.fixture
def own_tiles() -> None:
    """See large_tiles."""


def check(
    layers: Sequence[truth.Layer], normalize: str = "frobenius", out_dtype: torch.dtype | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    columns = [list(column) for column in zip(*layers, strict=True)]
    factors, norms, cosines = project.project_layers(*columns, list(range(len(layers))), normalize, out_dtype)
    for i, layer in enumerate(layers):
        expected = truth.project(layer.aligned, layer.base, layer.lora_B, normalize)
        assert factors[i].dtype == (out_dtype or layer.lora_B.dtype)
        assert factors[i].is_contiguous()
        assert_accurate(factors[i], expected, FP32_BOUND, f"lora_B of layer {i}")
        norm = truth.difference(layer.aligned, layer.base).norm()
        assert abs(float(norms[i] / norm) - 1) <= V_NORM_BOUND
        assert abs(float(cosines[i] - truth.cosine(expected, layer.lora_B, layer.lora_A))) <= COSINE_BOUND
    return factors, norms, cosines


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("weight", FLOATS)
def test_dtypes(weight: torch.dtype, factor: torch.dtype) -> None:
    """One large and one small layer of each pair of dtypes, and weights of two dtypes."""
    other = FLOATS[(FLOATS.index(weight) + 1) % 3]
    check([random_layer(136, 160, 8, weight, factor), random_layer(40, 24, 3, weight, factor)])
    check([random_layer(136, 160, 8, weight, factor, base_weight=other)], "none")


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], weight: torch.dtype) -> None:
    check([random_layer(*shape, weight)])


@pytest.mark.parametrize("rank", [1, 9, 17, 33, 64, 65, 128, 512])
def test_ranks(rank: int) -> None:
    check([random_layer(130, 140, rank, torch.bfloat16), random_layer(20, 30, min(rank, 70), torch.bfloat16)])


def test_the_tiles_of_the_gpus(own_tiles: None) -> None:
    check([random_layer(130, 160, 9, torch.bfloat16), random_layer(70, 40, 5)])


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("normalize", ["frobenius", "none"])
def test_options(normalize: str, out_dtype: torch.dtype) -> None:
    check([random_layer(130, 144, 5, torch.bfloat16, torch.bfloat16)], normalize, out_dtype)


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_layouts(weight: torch.dtype, kind: str) -> None:
    layer = random_layer(131, 136, 9, weight)
    other = truth.Layer(*(truth.layouts(t)[kind] for t in layer))
    check([other, layer._replace(base=other.base, lora_B=other.lora_B), layer])


def test_the_fp32_path_keeps_each_element_within_the_bound() -> None:
    layer = random_layer(100, 300, 4)
    (result,), _, _ = check([layer])
    v = truth.difference(layer.aligned, layer.base).abs()
    scale = (v @ (v.T @ layer.lora_B.double().abs())) / v.norm()
    error = (result.double() - truth.project(*layer[:3])).abs()
    assert bool((error <= (100 + 300 + 12) * 2.0**-24 * scale).all())


def test_the_split_keeps_each_element_within_the_bound() -> None:
    for weight, terms in ((torch.bfloat16, 10), (torch.float32, 6)):
        layer = random_layer(130, 300, 4, weight)
        (result,), _, _ = check([layer])
        v = truth.difference(layer.aligned, layer.base).abs()
        scale = (v @ (v.T @ layer.lora_B.double().abs())) / v.norm()
        error = (result.double() - truth.project(*layer[:3])).abs()
        assert bool((error <= ((130 + 300 + 12) * 2.0**-24 + terms * 2.0**-16) * scale).all())


def test_a_ragged_batch_gives_each_layer_the_bits_it_has_alone() -> None:
    layers = [
        random_layer(130, 136, 8, torch.bfloat16),
        random_layer(1, 7, 1),
        random_layer(140, 133, 20, torch.float16, torch.bfloat16),
        random_layer(200, 128, 8, torch.bfloat16),
        random_layer(129, 264, 3, torch.bfloat16),
    ]
    factors, norms, cosines = check(layers)
    for i, layer in enumerate(layers):
        (factor,), norm, cos = check([layer])
        assert torch.equal(factor, factors[i])
        assert torch.equal(norm[0], norms[i])
        assert torch.equal(cos[0], cosines[i])


def test_more_strips_than_the_ring_of_partial_sums_has_slots() -> None:
    check([random_layer(20 + i, 30, 2) for i in range(project.RING + project.LAG + 1)])


def test_several_adapters_over_one_pair() -> None:
    layer = random_layer(136, 150, 8, torch.bfloat16)
    lora_B = [layer.lora_B, torch.randn(136, 3).bfloat16(), torch.randn(136, 70).half()]
    lora_A = [layer.lora_A, torch.zeros(0, 150), torch.randn(70, 150)]
    factors, norms, cosines = project.project_layers([layer.aligned], [layer.base], lora_B, lora_A, [0, 0, 0])
    assert len(norms) == 1
    assert cosines[1].isnan()
    for f, (b, a) in enumerate(zip(lora_B, lora_A, strict=True)):
        expected = truth.project(layer.aligned, layer.base, b)
        assert_accurate(factors[f], expected, FP32_BOUND)
        if len(a):
            assert abs(float(cosines[f] - truth.cosine(expected, b, a))) <= COSINE_BOUND


def test_adapters_in_any_order_and_layers_without_one() -> None:
    first, second, third = (random_layer(d, 40, 4) for d in (30, 20, 10))
    columns = [first.aligned, second.aligned, third.aligned], [first.base, second.base, third.base]
    factors, norms, cosines = project.project_layers(
        *columns, [third.lora_B, first.lora_B], [third.lora_A, first.lora_A], [2, 0]
    )
    for i, layer in enumerate((first, second, third)):
        assert abs(float(norms[i] / truth.difference(layer.aligned, layer.base).norm()) - 1) <= V_NORM_BOUND
    for factor, cos, layer in zip(factors, cosines, (third, first), strict=True):
        expected = truth.project(*layer[:3])
        assert_accurate(factor, expected, FP32_BOUND)
        assert abs(float(cos - truth.cosine(expected, *layer[2:]))) <= COSINE_BOUND


def test_empty() -> None:
    assert project.project_layers([], [], [], [], [])[0] == []
    for d_out, d_in in ((0, 6), (5, 0), (0, 0)):
        w, b, a = torch.zeros(d_out, d_in), torch.ones(d_out, 2), torch.ones(2, d_in)
        full = random_layer(9, 12, 2)
        factors, norms, cosines = project.project_layers(
            [w, full.aligned], [w, full.base], [b, full.lora_B], [a, full.lora_A], [0, 1]
        )
        assert torch.equal(factors[0], torch.zeros(d_out, 2))
        assert norms[0] == 0
        assert cosines[0].isnan()
        assert_accurate(factors[1], truth.project(*full[:3]), FP32_BOUND)


def special(layers: Sequence[truth.Layer], normalize: str) -> None:
    """What is NaN, zero or infinite must be so in the reference too; the rest is compared by the other tests."""
    columns = [list(column) for column in zip(*layers, strict=True)]
    owners = list(range(len(layers)))
    ours = project.project_layers(*columns, owners, normalize)
    theirs = reference.project_layers(*columns, owners, normalize)
    for left, right in zip([*ours[0], *ours[1:]], [*theirs[0], *theirs[1:]], strict=True):
        assert torch.equal(left.isfinite(), right.isfinite())
        assert torch.equal(left == 0, right == 0)
    for i in (1, 2):
        assert torch.equal(ours[i].isnan(), theirs[i].isnan())


@pytest.mark.parametrize("normalize", ["frobenius", "none"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("d", [40, 130])
def test_special_values(d: int, value: float, normalize: str) -> None:
    layer = random_layer(d, d + 20, 4, torch.bfloat16)
    layers = [layer]
    for name in layer._fields:
        bad = getattr(layer, name).clone()
        bad[1, 2] = value
        layers += [layer._replace(**{name: bad}), layer._replace(**{name: torch.zeros_like(bad)})]
    layers.append(layer._replace(base=layer.aligned.clone()))
    special([other for other in layers if other.aligned.any() or other.base.any()], normalize)
    factors, norms, cosines = project.project_layers(
        [layer.aligned], [layer.aligned.clone()], [layer.lora_B], [layer.lora_A], [0], normalize
    )
    assert torch.equal(factors[0], torch.zeros_like(layer.lora_B))
    assert norms[0] == 0
    assert cosines[0].isnan()


def test_small_numbers() -> None:
    layer = random_layer(136, 128, 8, torch.float16, torch.float16)
    tiny = layer._replace(lora_B=(torch.randn(136, 8) * 1e-6).half(), lora_A=(torch.randn(8, 128) * 1e-3).half())
    base = torch.randn(130, 136).bfloat16()
    aligned = base.clone()
    aligned[::7, ::5] += 2e-2
    check([tiny, truth.Layer(aligned, base, torch.randn(130, 4), torch.randn(4, 136))])


def test_every_order_of_tasks_is_complete_and_waits_for_smaller_tickets_alone() -> None:
    """The schedule itself: each task once, what it waits for before it, for layers of many sizes and panels."""
    shapes = [(4096, 4096, 8), (11008, 4096, 16), (128, 20000, 100), (300, 70, 3), (20000, 200, 8)]
    layers = [
        truth.Layer(*(torch.empty(s, device="meta") for s in ((m, k), (m, k), (m, r), (r, k)))) for m, k, r in shapes
    ]
    columns = [[layer[i].bfloat16() for layer in layers] for i in range(4)]
    batch = project._batch(*columns, list(range(len(layers))), None)
    owned = [project.kind(a, b, x.shape[1], "sm_90") for a, b, x in zip(*columns[:3], strict=True)]
    for of in set(owned):
        plan = object.__new__(project.Plan)
        plan.kind, plan.bytes_per_pair, plan.tiles = of, 4, config.project("sm_90", of.rank, of.split)
        plan.pair = 1 + of.split
        weights = []
        for layer, shape in enumerate(shapes):
            if owned[layer] == of:
                weights.append([layer, shape[0], -(-shape[1] // plan.tiles.columns), -(-shape[2] // of.rank), 0, 0])
        strips, steps, buckets = plan._schedule(torch.tensor(weights))
        begins = steps[:, 0].tolist()
        codes = steps[:-1, 1].tolist()
        assert sorted(codes) == list(range(2 * len(strips)))
        assert begins == sorted(begins)
        position = {code: i for i, code in enumerate(codes)}
        per_layer: dict[tuple[int, int], int] = {}
        for index, strip in enumerate(strips.tolist()):
            assert position[2 * index] < position[2 * index + 1]
            if index >= project.RING:
                assert position[2 * (index - project.RING)] < position[2 * index]
            link = (strip[0], strip[7])
            assert strip[1] == per_layer.get(link, 0)
            per_layer[link] = strip[1] + strip[2] * plan.tiles.columns
        for ticket in range(0, plan.tickets, max(1, plan.tickets // 200)):
            step = int(buckets[ticket // project.BUCKET])
            assert begins[step] <= ticket
    assert len(batch.outputs) == len(shapes)


# The cosine by itself.


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_update_cosine(dtype: torch.dtype) -> None:
    sizes = [(70, 45, 6), (1, 1, 1), (33, 1100, 40), (1200, 20, 17)]
    new, old = ([torch.randn(d, r).to(dtype) for d, _, r in sizes] for _ in range(2))
    a = [torch.randn(r, k).to(dtype) for _, k, r in sizes]
    found = cosine.update_cosine(new, old, a)
    for value, factors in zip(found, zip(new, old, a, strict=True), strict=True):
        assert abs(float(value - truth.cosine(*factors))) <= 1e-12
    strided = cosine.update_cosine(
        [truth.layouts(t)["strided"] for t in new], old, [truth.layouts(t)["transposed"] for t in a]
    )
    assert torch.equal(strided, found)
    alone = cosine.update_cosine(new[2:3], old[2:3], a[2:3])
    assert torch.equal(alone[0], found[2])


def test_update_cosine_with_the_tiles_of_the_gpus(own_tiles: None) -> None:
    factors = [torch.randn(70, 20), torch.randn(70, 20), torch.randn(20, 90)]
    (value,) = cosine.update_cosine(*([t] for t in factors))
    assert abs(float(value - truth.cosine(*factors))) <= 1e-12


@pytest.mark.parametrize("which", [0, 1, 2])
def test_update_cosine_special_values(which: int) -> None:
    factors = [torch.randn(30, 4), torch.randn(30, 4), torch.randn(4, 20)]
    cases = []
    for value in (0.0, torch.nan, torch.inf):
        bad = [t.clone() for t in factors]
        if value == 0:
            bad[which].zero_()
        else:
            bad[which][2, 1] = value
        cases.append(bad)
    found = cosine.update_cosine(*map(list, zip(*cases, strict=True)))
    assert found[0] == 0
    assert bool(found[1:].isnan().all())


# The selection.


@pytest.mark.parametrize("rule", ["strict", "authors"])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_select_layers(dtype: torch.dtype, rule: Any) -> None:
    cosines = torch.rand(150).to(dtype)
    cosines[::3] = cosines[70].clone()
    cosines[1::7] = cosines[70] + 3e-6
    cosines[5::11] = torch.nan
    for values in (cosines[::2], cosines[:0], cosines[5:6], torch.tensor([-0.0, 0.0, 0.1], dtype=dtype)):
        for options in (
            *({"num_layers": k} for k in (0, 1, 30, 1000)),
            *({"threshold": t} for t in (0.0, float(cosines[70]), torch.inf)),
        ):
            found = select.select_layers(values, rule=rule, **options)
            assert torch.equal(found, sk.reference.select_layers(values, rule=rule, **options))


def test_ties_of_the_rounding_go_to_the_even_digit() -> None:
    cosines = torch.tensor([0.125005, 0.125015, 0.125025, 0.300005, 1e300, -0.7000049], dtype=torch.float64)
    for bound in cosines.round(decimals=5).tolist():
        found = select.select_layers(cosines, threshold=bound, rule="authors")
        assert torch.equal(found, sk.reference.select_layers(cosines, threshold=bound, rule="authors"))


# All three in one operator.


@pytest.mark.parametrize("mode", [{"threshold": 0.9}, {"num_layers": 2}, {"num_layers": 2, "rule": "authors"}])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_project_selected_layers(mode: dict[str, Any], out_dtype: torch.dtype | None) -> None:
    layers = [random_layer(130 + 4 * i, 140, 4, torch.bfloat16, torch.bfloat16) for i in range(3)]
    layers += [random_layer(20, 30, 4), layers[1]]
    columns = [list(column) for column in zip(*layers, strict=True)]
    columns[3][2] = columns[3][2][:0]
    owners = list(range(len(layers)))
    final, norms, cosines, selected = project.project_selected_layers(*columns, owners, **mode, out_dtype=out_dtype)
    projected, v_norm, cos = project.project_layers(*columns, owners, out_dtype=out_dtype)
    assert torch.equal(norms, v_norm)
    assert torch.equal(cosines.nan_to_num(9), cos.nan_to_num(9))
    assert torch.equal(selected, select.select_layers(cos, **mode))
    assert 0 < int(selected.sum()) < len(layers)
    assert not selected[2]
    for b, new, old, chosen in zip(final, projected, columns[2], selected, strict=True):
        assert b.dtype == (out_dtype or old.dtype)
        assert b.is_contiguous()
        assert torch.equal(b, new if chosen else old.to(b.dtype))


# The operators, as a call reaches them.


def test_a_request_reaches_the_kernels_and_the_operator_is_well_formed() -> None:
    layer = random_layer(24, 30, 3, torch.bfloat16)
    asked = sk.explain("project_lowrank", *layer, backend="triton")
    assert asked.backend == "triton"
    assert sk.explain("project_lowrank", *layer).rejected["triton"].startswith("the interpreter takes a call only when")
    result = sk.project_lowrank(*layer, backend="triton")
    assert_accurate(result.lora_B, truth.project(*layer[:3]), FP32_BOUND)  # type: ignore[arg-type]
    chosen = sk.project_selected_layers([sk.LayerFactors(*layer)], num_layers=1, backend="triton")
    assert torch.equal(chosen.lora_B[0], result.lora_B)  # type: ignore[arg-type]
    args = ([layer.aligned], [layer.base], [layer.lora_B], [layer.lora_A], [0])
    for op in ("project_layers", "project_selected_layers"):
        extra = (None, 1) if op == "project_selected_layers" else ()
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.safelora_triton, op).default, (*args, *extra), test_utils=tests)


def test_fp64_goes_to_the_reference_with_the_reason() -> None:
    layer = random_layer(24, 30, 3, torch.float64)
    args = ([layer.aligned], [layer.base], [layer.lora_B], [layer.lora_A], [0])
    raw = torch.ops.safelora_triton.project_layers.default(*args)
    assert torch.equal(raw[0][0], reference.project_layers(*args)[0][0])
    with pytest.raises(RuntimeError, match="has fp64 in it"):
        sk.project_lowrank(*layer, backend="triton")
    single = random_layer(24, 30, 3)
    assert "fp64" in sk.explain("project_lowrank", *single, out_dtype=torch.float64, backend="triton").reason
    with pytest.raises(RuntimeError, match="at most 32768 cosines"):
        sk.select_layers(torch.rand(40000), num_layers=3, backend="triton")


def test_raw_calls_that_would_read_past_the_end_are_refused() -> None:
    layer = random_layer(8, 6, 2)

    def refused(match: str, **changes: Any) -> None:
        args = {name: [tensor] for name, tensor in layer._asdict().items()} | {"layer_of": [0]} | changes
        with pytest.raises(ValueError, match=match):
            project.project_layers(**args)

    refused(r"base\[0\] must have shape", base=[layer.base[:5]])
    refused(r"lora_B\[0\] must have shape", lora_B=[layer.lora_B[:5]])
    refused(r"lora_A\[0\] must have shape", lora_A=[layer.lora_A[:, :5]])
    refused(r"layer_of\[0\] = 1 is no layer", layer_of=[1])
    refused("one entry per layer", lora_A=[])
    with pytest.raises(ValueError, match=r"lora_A\[0\] must have shape"):
        cosine.update_cosine([layer.lora_B], [layer.lora_B], [layer.lora_A[:1]])
    for bad in ({}, {"threshold": 0.1, "num_layers": 1}, {"num_layers": -1}, {"num_layers": 1, "rule": "paper"}):
        with pytest.raises(ValueError, match="exactly one|0 or more|rule must be"):
            select.select_layers(torch.rand(3), **bad)  # type: ignore[arg-type]


def test_autotuning_is_opt_in_and_gives_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(130, 136, 4, torch.bfloat16)
    assert not config.AUTOTUNE
    tried = []

    def measure(call: Any, quantiles: Any) -> list[float]:
        call()
        tried.append(call)
        return [float(len(tried))] * 3

    tuned = project.tuned_kernel()
    monkeypatch.setattr(tuned, "_do_bench", measure)
    monkeypatch.setattr(tuned, "cache_results", False)
    monkeypatch.setattr(config, "AUTOTUNE", True)
    check([layer])
    assert len(tried) == len(tuned.configs)
    check([layer])
    assert len(tried) == len(tuned.configs)


def test_tables_are_aligned() -> None:
    parts = tables.upload(torch.device("cpu"), [1, 2, 3], [], torch.arange(4).reshape(2, 2))
    assert [part.tolist() for part in (parts[0], parts[2])] == [[1, 2, 3], [0, 1, 2, 3]]
    assert all(part.data_ptr() % 16 == 0 for part in parts)
