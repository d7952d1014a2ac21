"""Projecting the modules of a plan batch by batch: cosines out, projected tensors to a writer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .adapter import LoraModule
from .checkpoint import TensorInfo
from .errors import SafeLoraError
from .full import FullTensor
from .mapping import PlannedModule
from .stream import MappedRange, ReadAhead
from .weights import MAX_RANK, Difference, Normalize, OpenWeight, WeightMatch, project_delta

if TYPE_CHECKING:
    import torch

BATCH_BYTES = 64 << 20
_NORM_ELEMENTS = 1 << 20  # widened to fp64 at a time


class Source(Protocol):
    """What the updates are read from: an adapter, or a fine-tuned model."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype and shape."""

    def file_of(self, info: TensorInfo) -> Path:
        """The file to name in an error about a tensor."""


class Target(Protocol):
    """Where changed tensors go."""

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor."""

    def written(self, name: str) -> torch.Tensor:
        """A tensor as it was last written."""


@dataclass
class Pair:
    """One weight pair and the modules that use it."""

    aligned: WeightMatch
    base: WeightMatch
    modules: list[LoraModule] = field(default_factory=list)
    full: list[FullTensor] = field(default_factory=list)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return self.aligned.parts + self.base.parts

    @property
    def nbytes(self) -> int:
        return self.aligned.nbytes + self.base.nbytes

    @property
    def batched(self) -> bool:
        """Whether the kernels can take the weights as they lie, many pairs at once."""
        return bool(self.modules) and all(match.dense or match.convert for match in (self.aligned, self.base))

    def open(self, mapped: Sequence[MappedRange]) -> Difference:
        count = len(self.aligned.parts)
        return Difference(OpenWeight(self.aligned, mapped[:count]), OpenWeight(self.base, mapped[count:]))


@dataclass(frozen=True)
class Measured:
    """The numbers of one module; cosine and shrinkage are None where V = 0 (and shrinkage where the update is)."""

    cosine: float | None
    v_norm: float
    shrinkage: float | None
    distance: float
    zero_update: bool

    def kept_because(self, rule: str) -> str | None:
        """Why the module takes no part in the selection, or None. The authors' rule does select zero updates."""
        if self.cosine is None:
            return "V = 0: base and aligned are equal here, there is nothing to project onto"
        return "the update is zero" if self.zero_update and rule == "strict" else None


def pairs_of(plan: Sequence[PlannedModule]) -> list[Pair]:
    """Distinct weight pairs in file order, each with all modules that use it."""
    pairs: dict[tuple[WeightMatch, WeightMatch], Pair] = {}
    for planned in plan:
        if planned.base and planned.aligned and not planned.skipped:
            pair = pairs.setdefault((planned.aligned, planned.base), Pair(planned.aligned, planned.base))
            if isinstance(planned.module, FullTensor):
                pair.full.append(planned.module)
            else:
                pair.modules.append(planned.module)
    return sorted(pairs.values(), key=lambda pair: (pair.aligned.info.file, pair.aligned.info.begin))


def batches_of(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Consecutive pairs of at most BATCH_BYTES together; fixed by the input alone, never by timing."""
    batches: list[list[Pair]] = []
    room = 0
    for pair in pairs:
        if pair.nbytes > room:
            batches.append([])
            room = BATCH_BYTES
        batches[-1].append(pair)
        room -= pair.nbytes
    return batches


class Rewriter:
    """Puts projected matrices into the tensors that they are parts of, and takes unselected ones back."""

    def __init__(self, source: Source, target: Target | None, plan: Sequence[PlannedModule]) -> None:
        self._source = source
        self._target = target
        self._modules = [planned.module for planned in plan if planned.base and planned.aligned and not planned.skipped]
        self._open = Counter(module.output.name for module in self._modules)
        self._changed: dict[str, torch.Tensor] = {}

    def put(self, module: LoraModule | FullTensor, projected: torch.Tensor | None) -> None:
        """The projected d_out × r (or d_out × d_in) matrix of a module, None to leave it; each module once."""
        if self._target is None:
            return
        name = module.output.name
        if projected is not None:
            if name not in self._changed:
                self._changed[name] = self._source.read(name).clone()
            place = module.place(self._changed[name])
            place.copy_(projected)
            if not bool(place.isfinite().all()):
                raise SafeLoraError(
                    f"{self._source.file_of(module.output)}: the projected {name} does not fit its dtype "
                    f"{module.output.dtype} (largest value {float(projected.abs().max()):.3g}). Save it in fp32 first."
                )
        self._open[name] -= 1
        if not self._open[name] and name in self._changed:
            self._target.replace(name, self._changed.pop(name))

    def restore(self, measured: dict[str, Measured], selected: set[str]) -> None:
        """Give every measured module that was not selected its input's bits again."""
        if self._target is None:
            return
        by_tensor: dict[str, list[LoraModule | FullTensor]] = {}
        for module in self._modules:
            by_tensor.setdefault(module.output.name, []).append(module)
        for name, modules in by_tensor.items():
            kept = [module for module in modules if module.name not in selected]
            if not any(measured[module.name].v_norm for module in kept):
                continue
            tensor = self._source.read(name)
            if len(kept) < len(modules):
                original, tensor = tensor, self._target.written(name)
                for module in kept:
                    module.place(tensor).copy_(module.place(original))
            self._target.replace(name, tensor)


def measure(
    source: Source,
    batches: Sequence[Sequence[Pair]],
    stream: ReadAhead,
    normalize: Normalize,
    rewriter: Rewriter,
    ready: Future[Any],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Measured]:
    """Project every module; the projected tensors go to `rewriter`, once `ready`, the numbers are returned by name."""
    total = sum(pair.nbytes for batch in batches for pair in batch)
    done = 0
    measured: dict[str, Measured] = {}
    for batch, mapped in zip(batches, stream, strict=True):
        opened = []
        first = 0
        for pair in batch:
            count = len(pair.tensors)
            opened.append((pair, pair.open(mapped[first : first + count])))
            first += count
        together = [entry for entry in opened if entry[0].batched]
        _measure_together(source, together, normalize, rewriter, ready, measured)
        ready.result()
        for pair, difference in opened:
            if not pair.batched:
                for module in pair.modules:
                    _measure_alone(source, pair, module, difference, normalize, rewriter, measured)
            for full in pair.full:
                _measure_full(source, pair, full, difference, normalize, rewriter, measured)
        done += sum(pair.nbytes for pair in batch)
        del opened, together, difference
        if progress is not None:
            progress(done, total)
    return measured


def _measure_together(
    source: Source,
    opened: Sequence[tuple[Pair, Difference]],
    normalize: Normalize,
    rewriter: Rewriter,
    ready: Future[Any],
    measured: dict[str, Measured],
) -> None:
    import torch

    import safelora_kernels as sk

    read: dict[str, torch.Tensor] = {}  # the experts of a stack share two tensors
    for module in (module for pair, _ in opened for module in pair.modules):
        for name in (module.lora_B.name, module.lora_A.name):
            if name not in read:
                read[name] = source.read(name)
    factors = [
        [module.factors(read[module.lora_A.name], read[module.lora_B.name]) for module in pair.modules]
        for pair, _ in opened
    ]
    layers = [
        sk.LayerFactors(
            difference.aligned.matrix(), difference.base.matrix(), [b for b, _ in parts], [a for _, a in parts]
        )
        for (_, difference), parts in zip(opened, factors, strict=True)
    ]
    wide = any(module.lora_B.dtype == "F64" for pair, _ in opened for module in pair.modules)
    results = sk.project_layers(layers, normalize=normalize, out_dtype=torch.float64 if wide else torch.float32)
    ready.result()
    for (pair, difference), parts, result in zip(opened, factors, results, strict=True):
        v_norm = float(result.v_norm)
        found: Any = zip(pair.modules, parts, result.lora_B, result.cosine or (), strict=True)
        for module, (lora_B, lora_A), projected, cosine in found:
            _record(source, pair, module, difference, (lora_B, lora_A, projected, v_norm, float(cosine)), measured)
            rewriter.put(module, projected if v_norm else None)


def _measure_alone(
    source: Source,
    pair: Pair,
    module: LoraModule,
    difference: Difference,
    normalize: Normalize,
    rewriter: Rewriter,
    measured: dict[str, Measured],
) -> None:
    import torch

    import safelora_kernels as sk

    lora_B, lora_A = module.factors(source.read(module.lora_A.name), source.read(module.lora_B.name))
    parts = [difference.apply(part, None, normalize) for part in lora_B.split(MAX_RANK, dim=1)]
    projected, v_norm = torch.cat([part[0] for part in parts], dim=1), parts[0][1]
    cosine = float(sk.update_cosine(projected, lora_B, lora_A)) if v_norm else math.nan
    _record(source, pair, module, difference, (lora_B, lora_A, projected, v_norm, cosine), measured)
    rewriter.put(module, projected if v_norm else None)


def _measure_full(
    source: Source,
    pair: Pair,
    full: FullTensor,
    difference: Difference,
    normalize: Normalize,
    rewriter: Rewriter,
    measured: dict[str, Measured],
) -> None:
    import torch

    aligned = difference.aligned
    tuned = full.place(source.read(full.output.name))
    rows = torch.tensor(full.tokens)

    def columns(start: int, stop: int) -> torch.Tensor:
        return aligned.matrix()[:, rows[start:stop]] if full.tokens else aligned.columns(start, stop)

    out = torch.empty_like(tuned)
    result = project_delta(difference, tuned, columns, normalize, out)
    if result.v_norm and not math.isfinite(result.v_norm + result.norm + result.norm_after):
        _explain(source, [*_weights(pair, difference), (full.output, tuned)], full.name)
    if not math.isfinite(result.norm):
        _explain(source, [(full.output, tuned)], full.name)
    if result.v_norm:
        measured[full.name] = Measured(
            result.cosine, result.v_norm, result.norm_after / result.norm if result.norm else None, result.distance,
            not result.norm,
        )  # fmt: skip
    else:
        measured[full.name] = Measured(None, 0.0, None, 0.0, False)
    rewriter.put(full, out if result.v_norm else None)


def _record(
    source: Source,
    pair: Pair,
    module: LoraModule,
    difference: Difference,
    numbers: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float],
    measured: dict[str, Measured],
) -> None:
    lora_B, lora_A, _, v_norm, cosine = numbers
    if not (math.isfinite(v_norm) and v_norm and math.isfinite(cosine)):
        suspects = [(module.lora_B, lora_B), (module.lora_A, lora_A)]
        if module.swapped:
            suspects = [(module.lora_A, lora_B), (module.lora_B, lora_A)]
        _explain(source, [*(_weights(pair, difference) if v_norm else []), *suspects], module.name if v_norm else "")
    measured[module.name] = _numbers(*numbers)


def _weights(pair: Pair, difference: Difference) -> list[tuple[TensorInfo, torch.Tensor]]:
    return [(pair.aligned.info, difference.aligned.matrix()), (pair.base.info, difference.base.matrix())]


def _explain(source: Source, suspects: Sequence[tuple[TensorInfo, torch.Tensor]], module: str) -> None:
    """Raise SafeLoraError for the tensor behind a NaN or infinite result; with a name, also where there is none."""
    for info, tensor in suspects:
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise SafeLoraError(
                f"{source.file_of(info)}: tensor {info.name} holds {bad} NaN or infinite value(s). Nothing was written."
            )
    if module:
        raise SafeLoraError(f"module {module}: the projection overflows although all its inputs are finite.")


def _numbers(
    lora_B: torch.Tensor, lora_A: torch.Tensor, projected: torch.Tensor, v_norm: float, cosine: float
) -> Measured:
    import torch

    if not v_norm:
        return Measured(None, 0.0, None, 0.0, False)
    squares = torch.zeros(3, dtype=torch.float64, device=lora_B.device)
    rows = max(1, _NORM_ELEMENTS // lora_B.shape[1])
    for part, new in zip(lora_B.split(rows), projected.split(rows), strict=True):
        before, after = part.double(), new.double()
        squares += torch.stack([(matrix * matrix).sum() for matrix in (before, after, before - after)])
    norm, norm_after, distance = squares.sqrt().tolist()
    zero_update = False
    if cosine == 0:
        b, a = lora_B.double(), lora_A.double()
        zero_update = not float(((b.T @ b) * (a @ a.T)).sum())
    return Measured(cosine, v_norm, norm_after / norm if norm else None, distance, zero_update)
