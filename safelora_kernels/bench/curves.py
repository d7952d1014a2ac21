"""Cost curves: one call each along an axis, taking turns, so that a drift of the machine does not bend the line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import functional
from ..types import LayerFactors
from .case import Case, Draw, Prepared, Variant
from .projection import BOUND, draw_layers, error_of, ours_alone, traffic

D = 2048


def _curve(
    axis: str,
    points: Sequence[float],
    prepare: Callable[[Draw], Sequence[tuple[Callable[[], object], LayerFactors]]],
    memory: int,
    fixed: str,
    default: bool,
) -> Case:
    def prepared(draw: Draw) -> Prepared:
        made = prepare(draw)
        variants = [
            Variant(f"{point:g}", call, partial(error_of, layer, ours_alone), BOUND, at=float(point))
            for point, (call, layer) in zip(points, made, strict=True)
        ]
        return Prepared(variants)

    return Case("cost of project_layers", f"against {axis}", 0, 0.0, memory, prepared, parameters={"fixed": fixed},
                default=default, axis=axis)  # fmt: skip


def _project(layers: Sequence[LayerFactors]) -> tuple[Callable[[], object], LayerFactors]:
    return partial(functional.project_layers, layers), layers[-1]


def against_elements(sides: Sequence[int]) -> Case:
    """The same number of layers of growing squares: time against the elements of one."""

    def prepare(draw: Draw) -> list[tuple[Callable[[], object], LayerFactors]]:
        return [_project(draw_layers(draw, [(d, d)] * 4, 16, torch.bfloat16)) for d in sides]

    memory = sum(traffic([(d, d)] * 4, 16, torch.bfloat16) for d in sides) + 4 * 4 * max(sides) ** 2
    return _curve("elements of a weight", [d * d for d in sides], prepare, memory, "4 layers, r=16, bf16", True)


def against_rank(ranks: Sequence[int]) -> Case:
    def prepare(draw: Draw) -> list[tuple[Callable[[], object], LayerFactors]]:
        layers = draw_layers(draw, [(D, D)] * 8, max(ranks), torch.bfloat16)
        narrow: Callable[[LayerFactors, int], LayerFactors] = lambda layer, r: layer._replace(  # noqa: E731
            lora_B=_narrowed(layer.lora_B, r, 1), lora_A=_narrowed(layer.lora_A, r, 0)
        )
        return [_project([narrow(layer, rank) for layer in layers]) for rank in ranks]

    memory = 3 * traffic([(D, D)] * 8, max(ranks), torch.bfloat16)
    return _curve("rank", ranks, prepare, memory, f"8 layers of {D}², bf16", True)


def _narrowed(factor: object, rank: int, dim: int) -> Tensor:
    assert isinstance(factor, Tensor)
    return factor.narrow(dim, 0, rank).contiguous()


def against_layers(counts: Sequence[int]) -> Case:
    def prepare(draw: Draw) -> list[tuple[Callable[[], object], LayerFactors]]:
        layers = draw_layers(draw, [(D, D)] * max(counts), 16, torch.bfloat16)
        return [_project(layers[:count]) for count in counts]

    memory = 2 * traffic([(D, D)] * max(counts), 16, torch.bfloat16)
    return _curve("layers", counts, prepare, memory, f"{D}², r=16, bf16", True)


def against_adapters(counts: Sequence[int]) -> Case:
    """Adapters over one pair, which share its reads."""

    def prepare(draw: Draw) -> list[tuple[Callable[[], object], LayerFactors]]:
        layers = draw_layers(draw, [(D, D)] * 4, 8, torch.bfloat16, max(2, *counts))
        taken = [
            [layer._replace(lora_B=list(layer.lora_B)[:n], lora_A=list(layer.lora_A or ())[:n]) for layer in layers]
            for n in counts
        ]
        return [_project(few) for few in taken]

    memory = 3 * traffic([(D, D)] * 4, 8, torch.bfloat16, max(counts))
    return _curve("adapters", counts, prepare, memory, f"4 pairs of {D}², r=8 each, bf16", True)


def against_threads(counts: Sequence[int]) -> Case:
    def prepare(draw: Draw) -> list[tuple[Callable[[], object], LayerFactors]]:
        layers = draw_layers(draw, [(D, D)] * 8, 16, torch.bfloat16)

        def with_threads(threads: int) -> None:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                functional.project_layers(layers)
            finally:
                torch.set_num_threads(before)

        return [(partial(with_threads, count), layers[-1]) for count in counts]

    memory = 2 * traffic([(D, D)] * 8, 16, torch.bfloat16)
    return _curve(
        "1 / threads", [1 / count for count in counts], prepare, memory, f"8 layers of {D}², r=16, bf16", True
    )


def cases(device: str) -> Iterator[Case]:
    yield against_elements((512, 1024, 2048, 4096))
    yield against_rank((8, 16, 32, 64, 128, 256))
    yield against_layers((1, 2, 4, 8, 16))
    yield against_adapters((1, 2, 4, 8, 16, 32, 64))
    if torch.device(device).type == "cpu":
        cores = os.cpu_count() or 1
        yield against_threads(sorted({*(t for t in (1, 2, 4, 8, 16, 32, 64) if t <= cores), cores}))
