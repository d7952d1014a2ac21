"""The CUDA project_selected_layers: bit by bit the projection where selected, and the factor elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from safelora_kernels import reference

from ..ops.truth import random_layer
from .emulated import PROJECT_WORKSPACE, Device, emulator, need, run, run_all
from .test_cuda_project import Pair, arguments, pair

HOPPER = Device(arch=90, sm_count=2, l2_bytes=50 << 20, shared_bytes=227 << 10)
MODES: list[tuple[float | None, int | None, str]] = [(0.02, None, "strict"), (None, 3, "authors"), (None, 0, "strict")]


def layers() -> list[Pair]:
    """Every way in which a result waits: rounded or not, in fp64, by tickets or exactly, in panels, without lora_A."""
    several = random_layer(140, 150, 8, torch.bfloat16)
    adapters = [several.lora_B, torch.randn(140, 3).bfloat16(), torch.randn(140, 70).half(), torch.zeros(140, 2)]
    return [
        Pair(
            several.aligned,
            several.base,
            adapters,
            [several.lora_A, torch.empty(0, 150), torch.randn(70, 150), torch.randn(2, 150).bfloat16()],
        ),
        pair(random_layer(40, 60, 5, torch.bfloat16, torch.bfloat16)),
        pair(random_layer(133, 130, 3, torch.float32, torch.float16)),
        pair(random_layer(30, 20, 2, torch.float64)),
        pair(random_layer(20, 10, 1)._replace(lora_B=torch.randn(1, 20).t())),
    ]


def check(result: Any, pairs: list[Pair], mode: tuple[Any, ...], projection: Any) -> Tensor:
    """Returns what was selected."""
    final, v_norm, cosine, selected = result
    projected, expected_norm, expected_cosine = projection
    assert torch.equal(v_norm, expected_norm)
    assert torch.equal(cosine.view(torch.int64), expected_cosine.view(torch.int64))
    threshold, num_layers, rule = mode
    decisions = reference.select_layers(cosine, threshold=threshold, num_layers=num_layers, rule=rule)  # type: ignore[arg-type]
    assert torch.equal(selected, decisions)
    originals = [b for p in pairs for b in p.lora_B]
    for new, old, out, taken in zip(projected, originals, final, selected, strict=True):
        assert out.is_contiguous()
        assert torch.equal(out, new if taken else old.to(out.dtype))
    return selected  # type: ignore[no-any-return]


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_values(mode: tuple[Any, ...], out_dtype: torch.dtype | None) -> None:
    pairs = layers()
    projection = run("project_layers", *arguments(pairs), "none", out_dtype=out_dtype)
    result = run("project_selected_layers", *arguments(pairs), *mode, "none", out_dtype=out_dtype)
    selected = check(result, pairs, mode, projection)
    assert int(selected.sum()) == (0 if mode[1] == 0 else 3 if mode[1] else int((projection[2] <= mode[0]).sum()))


@pytest.mark.parametrize(
    ("driver", "device"), [("simt", Device(sm_count=3)), ("ptx", Device(sm_count=3)), ("ptx", HOPPER)]
)
def test_no_order_changes_a_bit(driver: str, device: Device) -> None:
    pairs, mode = layers(), (None, 4, "strict")
    projection = run("project_layers", *arguments(pairs), driver=driver, device=device)
    results = run_all("project_selected_layers", *arguments(pairs), *mode, drivers=[driver], device=device)
    assert int(check(results[driver], pairs, mode, projection).sum()) == 4


def test_layers_that_go_in_several_runs() -> None:
    d_in, rank = 3200, 32
    pairs = [pair(random_layer(4, d_in, rank, torch.bfloat16, torch.bfloat16)) for _ in range(12)]
    assert len(pairs) * 4 * d_in * rank > PROJECT_WORKSPACE  # Y alone
    mode = (None, 6, "strict")
    result = run("project_selected_layers", *arguments(pairs), *mode)
    assert int(check(result, pairs, mode, run("project_layers", *arguments(pairs))).sum()) == 6
    for new, one, taken in zip(result[0], pairs, result[3], strict=True):
        assert torch.equal(new, run("project_layers", *arguments([one]))[0][0] if taken else one.lora_B[0])


def test_more_adapters_than_one_launch_holds() -> None:
    layer = random_layer(6, 5, 1)
    adapters = [torch.randn(6, 1) for _ in range(330)]
    pairs = [Pair(layer.aligned, layer.base, adapters, [layer.lora_A] * len(adapters))]
    mode = (None, 100, "strict")
    result = run("project_selected_layers", *arguments(pairs), *mode)
    assert int(check(result, pairs, mode, run("project_layers", *arguments(pairs))).sum()) == 100


def test_special_values_keep_the_factor() -> None:
    good, equal, bad = (random_layer(20, 30, 3, factor=torch.bfloat16) for _ in range(3))
    equal = equal._replace(base=equal.aligned.clone())
    bad.aligned[2, 2] = torch.nan
    pairs = [pair(good), pair(equal), pair(bad)]
    final, *_, selected = run("project_selected_layers", *arguments(pairs), None, 3)
    assert selected.tolist() == [True, False, False]
    assert torch.equal(final[1], equal.lora_B)
    assert torch.equal(final[2], bad.lora_B)


def test_nothing_to_do() -> None:
    need("simt")
    layer = random_layer(20, 30, 0)
    final, _, cosine, selected = run("project_selected_layers", *arguments([pair(layer)]), 0.5)
    assert final[0].shape == (20, 0)
    assert (cosine.tolist(), selected.tolist()) == ([0.0], [True])
    overload = emulator("simt").ops.project_selected_layers.default
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    final, *rest = overload.redispatch(cpu, [], [], [], [], [], 0.5)
    assert final == []
    assert [(t.shape, t.dtype) for t in rest] == [((0,), torch.float64)] * 2 + [((0,), torch.bool)]


def test_wrong_arguments_are_named() -> None:
    args = arguments([pair(random_layer(20, 30, 2))])
    for options, message in (
        ((None, None), "threshold or num_layers"),
        ((0.5, 1), "threshold or num_layers"),
        ((None, -1), "num_layers must be 0 or more"),
        ((0.5, None, "paper"), "rule must be"),
        ((0.5, None, "strict", "spectral"), "normalize must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run("project_selected_layers", *args, *options)


@pytest.mark.parametrize("driver", ["asan", "tsan"])
def test_sanitizers_find_nothing(driver: str) -> None:
    pairs = [pair(random_layer(130, 133, 3, torch.bfloat16, torch.bfloat16)), pair(random_layer(9, 10, 2))]
    run_all("project_selected_layers", *arguments(pairs), None, 1, drivers=[driver])
