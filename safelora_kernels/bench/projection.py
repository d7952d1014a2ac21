"""Cases of the projection, the cosine and the selection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import functional, reference
from ..types import LayerFactors
from . import baselines
from .case import OURS, Case, Draw, Prepared, Variant, nbytes, read_all, relative_error
from .models import MODELS, Shape

BOUND = 1e-5
CHAIN, COMPILED, AUTHORS = "best torch chain", "torch.compile of the chain", "published formulation"
BASELINES = {CHAIN: baselines.torch_project, COMPILED: baselines.torch_project, AUTHORS: baselines.authors_project}
# A baseline takes each layer alone; as many as it takes to fill so many elements of weights.
ENOUGH = {CHAIN: 16 << 20, COMPILED: 16 << 20, AUTHORS: 0}


def draw_layers(
    draw: Draw, shapes: Sequence[Shape], rank: int, dtype: torch.dtype, adapters: int = 1
) -> list[LayerFactors]:
    """Weights whose difference has the size that alignment makes, in ``dtype``; fp32 factors."""
    layers = []
    for d_out, d_in in shapes:
        base = draw.normal(d_out, d_in, scale=0.02)
        aligned = base + draw.normal(d_out, d_in, scale=0.002)
        lora_B: Tensor | list[Tensor]
        lora_A: Tensor | list[Tensor | None]
        if adapters == 1:
            lora_B, lora_A = draw.normal(d_out, rank), draw.normal(rank, d_in)
        else:
            lora_B = [draw.normal(d_out, rank) for _ in range(adapters)]
            lora_A = [draw.normal(rank, d_in) for _ in range(adapters)]
        layers.append(LayerFactors(aligned.to(dtype), base.to(dtype), lora_B, lora_A))
    return layers


def traffic(shapes: Sequence[Shape], rank: int, dtype: torch.dtype, adapters: int = 1) -> int:
    """Both weights and lora_A once, lora_B read and written."""
    weights = sum(2 * d_out * d_in * dtype.itemsize for d_out, d_in in shapes)
    return weights + sum(4 * rank * adapters * (2 * d_out + d_in) for d_out, d_in in shapes)


def arithmetic(shapes: Sequence[Shape], rank: int, adapters: int = 1) -> float:
    """Two thin products, the subtraction and the norm."""
    return float(sum((4 * rank * adapters + 3) * d_out * d_in for d_out, d_in in shapes))


def weights_of(layers: Sequence[LayerFactors]) -> list[Tensor]:
    return [weight for layer in layers for weight in (layer.aligned, layer.base)]


def factors_of(layer: LayerFactors) -> list[Tensor]:
    return [layer.lora_B] if isinstance(layer.lora_B, Tensor) else list(layer.lora_B)


def error_of(layer: LayerFactors, project: Callable[[LayerFactors], Sequence[Tensor]]) -> float:
    """The worst error of the factors of one layer, against fp64 in strips of columns."""
    given = factors_of(layer)
    stacked = torch.cat(given, dim=1)
    truth, _ = reference.difference_apply(layer.aligned, layer.base, stacked, "frobenius", torch.float64)
    truths = truth.split([b.shape[1] for b in given], dim=1)
    return max(relative_error(b, t) for b, t in zip(project(layer), truths, strict=True))


def ours_alone(layer: LayerFactors) -> list[Tensor]:
    result = functional.project_layers([layer])[0].lora_B
    return [result] if isinstance(result, Tensor) else result


def each_alone(project: Callable[..., object], layers: Sequence[LayerFactors]) -> None:
    for layer in layers:
        project(*layer)


def smallest_subset(layers: Sequence[LayerFactors], elements: int) -> list[LayerFactors]:
    chosen: list[LayerFactors] = []
    for layer in layers:
        if not chosen or sum(taken.aligned.numel() for taken in chosen) < elements:
            chosen.append(layer)
    return chosen


def _baseline(name: str, layers: Sequence[LayerFactors]) -> Variant:
    call: Callable[..., tuple[Tensor, Tensor]] = BASELINES[name]
    if name == COMPILED:
        call = torch.compile(call)
    few = smallest_subset(layers, ENOUGH[name])
    share = nbytes(weights_of(few)) / nbytes(weights_of(layers))

    def error() -> float:
        return error_of(few[0], lambda layer: [call(*layer)[0]])

    return Variant(name, partial(each_alone, call, few), error, share=share)


def projection(
    name: str,
    shapes: Sequence[Shape],
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    against: Sequence[str] = (CHAIN,),
    default: bool = False,
    adapters: int = 1,
    of: str = "",
) -> Case:
    """One call of project_layers over ``shapes``, beside the baselines ``against``."""
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    widest = largest[0] * largest[1]

    def prepare(draw: Draw) -> Prepared:
        layers = draw_layers(draw, shapes, rank, dtype, adapters)
        biggest = max(layers, key=lambda layer: layer.aligned.numel())

        def error() -> float:
            return error_of(biggest, ours_alone)

        ours = Variant(OURS, partial(functional.project_layers, layers), error, BOUND)
        moved = [*weights_of(layers), *(b for layer in layers for b in factors_of(layer))]
        return Prepared([ours, *(_baseline(name, layers) for name in against)], partial(read_all, moved))

    strips = 3 * 8 * largest[0] * (reference.STRIP_COLUMNS + rank * adapters)
    dense = 4 * (3 * widest + (2 * largest[0] ** 2 + 2 * widest if AUTHORS in against else 0))
    needed = traffic(shapes, rank, dtype, adapters) + 4 * 4 * widest + max(strips, dense if against else 0)
    parameters = {"modules": len(shapes), "rank": rank, "adapters": adapters, "dtype": _name(dtype), "of": of}
    return Case(
        "project_layers", name, traffic(shapes, rank, dtype, adapters), arithmetic(shapes, rank, adapters), needed,
        prepare, _products(dtype), parameters, default,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _products(dtype: torch.dtype) -> torch.dtype:
    """The ceiling of the products: bf16 on GPUs, whose tensor cores take them; the CPU's paths but AMX use fp32."""
    return torch.float32


def cosine(name: str, modules: int, d: int, rank: int, default: bool = False) -> Case:
    """The cosines of an adapter and the selection, as Safe LoRA takes them after the projection."""
    size = 4 * modules * 3 * d * rank

    def prepare(draw: Draw) -> Prepared:
        new, old = ([draw.normal(d, rank) for _ in range(modules)] for _ in range(2))
        for after, before in zip(new, old, strict=True):
            after.add_(before)
        a = [draw.normal(rank, d) for _ in range(modules)]
        few = 4

        def ours() -> Tensor:
            return functional.select_layers(functional.update_cosine(new, old, a), threshold=0.6)

        def grams() -> list[bool]:
            return [bool(baselines.torch_cosine(*three) <= 0.6) for three in zip(new, old, a, strict=True)]

        def flattened() -> list[bool]:
            return [bool(baselines.authors_cosine(new[i], old[i], a[i]) <= 0.6) for i in range(few)]

        def error(function: Callable[..., Tensor]) -> float:
            before, after = (x[0].double() @ a[0].double() for x in (old, new))
            return relative_error(function(new[0], old[0], a[0]), (after * before).sum() / after.norm() / before.norm())

        variants = [
            Variant(OURS, ours, partial(error, functional.update_cosine), 1e-6),
            Variant("torch, Grams in fp64", grams, partial(error, baselines.torch_cosine)),
            Variant(AUTHORS, flattened, partial(error, baselines.authors_cosine), share=few / modules),
        ]
        return Prepared(variants, partial(read_all, [*new, *old, *a]))

    flops = float(modules * 2 * rank * rank * 4 * d)
    memory = size + 6 * 8 * d * d + 4 * 4 * d * rank
    parameters = {"modules": modules, "d": d, "rank": rank, "dtype": "float32"}
    return Case("update_cosine + select_layers", name, size, flops, memory, prepare, torch.float64, parameters, default)


def cases() -> Iterator[Case]:
    bf16 = torch.bfloat16
    smol = MODELS["SmolLM2-135M"]
    whole = [*smol.attention.values(), *smol.mlp.values()] * smol.layers
    yield projection(
        "Llama-2-7B, q and v of 4 layers, r=8", [(4096, 4096)] * 8, 8, against=(CHAIN, COMPILED, AUTHORS),
        default=True, of="32 layers",
    )  # fmt: skip
    yield projection("SmolLM2-135M, all linears, r=16", whole, 16, against=(CHAIN,), default=True, of="the whole model")
    for name, default in (("Llama-2-7B", False), ("Llama-3-8B", True), ("Llama-3-70B", False)):
        model = MODELS[name]
        shapes = [*model.attention.values(), *model.mlp.values()]
        yield projection(
            f"{name}, all linears of 1 layer, r=16", shapes, 16, default=default, of=f"{model.layers} layers"
        )
    big = MODELS["Llama-3-70B"]
    yield projection(
        "Llama-3-70B, attention of 1 layer, r=16", list(big.attention.values()), 16, default=True,
        of=f"{big.layers} layers",
    )  # fmt: skip
    moe = MODELS["Qwen3-30B-A3B"]
    for experts, default in ((16, True), (128, False)):
        shapes = [*moe.attention.values(), *list(moe.mlp.values()) * experts]
        name = f"Qwen3-30B-A3B, 1 layer, {experts} of {moe.experts} experts, r=16"
        yield projection(name, shapes, 16, default=default, of=f"{moe.layers} layers")
    for rank in (8, 16, 32, 64, 128, 256):
        yield projection(f"8 × 4096², r={rank}", [(4096, 4096)] * 8, rank, default=rank in (16, 64))
    for dtype in (bf16, torch.float16, torch.float32):
        yield projection(f"8 × 2048², r=16, {_name(dtype)}", [(2048, 2048)] * 8, 16, dtype, default=dtype != bf16)
    for adapters in (1, 4, 8, 16, 64):
        yield projection(
            f"2 × 4096², r=16, {adapters} adapters a pair", [(4096, 4096)] * 2, 16, adapters=adapters, against=(),
            default=adapters == 8,
        )  # fmt: skip
    yield cosine("224 modules of 4096, r=16", 224, 4096, 16, default=True)
    yield cosine("64 modules of 4096, r=64", 64, 4096, 64)
