"""What rules make of V = W_aligned − W_base: the published projection, its cosines, and an orthogonal projector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..adapter import LoraModule
from ._rule import Subject

if TYPE_CHECKING:
    import torch

_DIRECT = 1024  # the smaller side up to which the Gram matrix's own eigenvectors are cheaper than drawing
_OVERSAMPLING = 16
_ITERATIONS = 3


class Projected(NamedTuple):
    """One module's projected lora_B, the cosine between its update and the projected one, and ‖C·B·A‖/‖B·A‖."""

    module: LoraModule
    lora_B: torch.Tensor
    cosine: float
    shrinkage: float


def published(subject: Subject) -> list[Projected]:
    """C·B of every module with C = V Vᵀ/‖V‖_F, in the bits that `safelora project` writes, and the cosines."""
    return subject.once("safe_lora", lambda: _published(subject))


def selects(subject: Subject, threshold: float) -> int:
    """How many modules `safelora project --threshold` projects."""
    import torch

    import safelora_kernels as sk

    cosines = torch.tensor([one.cosine for one in published(subject)], dtype=torch.float64)
    return int(sk.select_layers(cosines, threshold=threshold, rule="strict").sum())


def _published(subject: Subject) -> list[Projected]:
    from ..live import apply_safe_lora

    report = apply_safe_lora(subject.model, subject.base, threshold=1.0, allow_projected=True)
    try:
        cosines = {m.name: m.cosine for m in report.projected if m.cosine is not None}
        held = {key: parameter.detach().clone() for key, parameter in subject.parameters.items()}
    finally:
        report.undo(force=True)
    found = []
    for module in subject.modules:
        if module.name in cosines:
            new, _ = module.factors(held[module.lora_A.name], held[module.lora_B.name])
            found.append(
                Projected(module, new.clone(), float(cosines[module.name] or 0), _shrinkage(subject, module, new))
            )
    return found


def onto_basis(subject: Subject, energy: float, rank: int | None) -> list[Projected]:
    """U_k U_kᵀ·B of every module, U_k the leading left singular vectors of V."""
    return subject.once(("basis", energy, rank), lambda: _onto_basis(subject, energy, rank))


def _onto_basis(subject: Subject, energy: float, rank: int | None) -> list[Projected]:
    import torch

    import safelora_kernels as sk

    found = []
    for modules, V in differences(subject):
        U = leading_basis(V, energy=energy, rank=rank, seed=subject.seed)
        for module in modules:
            lora_B, lora_A = subject.factors(module)
            new = (U @ (U.T @ lora_B.to(U.dtype))).to(torch.float32)
            cosine = float(sk.update_cosine(new, lora_B.float(), lora_A.float()))
            found.append(Projected(module, new, cosine, _shrinkage(subject, module, new)))
    order = {module.name: i for i, module in enumerate(subject.modules)}
    return sorted(found, key=lambda one: order[one.module.name])


def differences(subject: Subject) -> Iterator[tuple[list[LoraModule], torch.Tensor]]:
    """V (d_out × d_in, fp32) of every pair of weights that differ, with the modules that adapt it."""
    import torch

    from ..live import LiveJob
    from ..stream import map_range

    with torch.no_grad(), LiveJob(subject.model, False) as job:
        job.prepare(subject.base, threshold=1.0, allow_projected=True)
        for pair in job.pairs:
            difference = pair.open([map_range(info) for info in pair.tensors])
            V = difference.aligned.matrix().float() - difference.base.matrix().float()
            if pair.modules and bool(V.any()):
                yield pair.modules, V


def leading_basis(V: torch.Tensor, *, energy: float = 1.0, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    """The leading left singular vectors of V (d_out × k, orthonormal, fp32 or fp64).

    k is `rank`, or the least number that holds `energy` of ‖V‖_F². Up to a smaller side of 1024 they are eigenvectors
    of the smaller Gram matrix in fp64; beyond, a seeded randomised subspace iteration (Halko, Martinsson and Tropp,
    arXiv 0909.4061), whose subspace grows until it holds the energy.
    """
    import torch

    least = min(V.shape)
    if least <= _DIRECT:
        wide = V.double()
        squares, vectors = torch.linalg.eigh(wide @ wide.T if V.shape[0] <= V.shape[1] else wide.T @ wide)
        squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
        k = _kept(squares, float(squares.sum()), energy, rank)
        if V.shape[0] <= V.shape[1]:
            return vectors[:, :k]
        return torch.linalg.qr(wide @ vectors[:, :k])[0]
    total = float(V.double().square().sum())
    size = min(least, (rank or 64) + _OVERSAMPLING)
    generator = torch.Generator(V.device).manual_seed(seed)
    while True:
        Q = torch.linalg.qr(V @ torch.randn(V.shape[1], size, generator=generator, device=V.device, dtype=V.dtype))[0]
        for _ in range(_ITERATIONS):
            Q = torch.linalg.qr(V @ torch.linalg.qr(V.T @ Q)[0])[0]
        U, singular, _ = torch.linalg.svd(Q.T @ V, full_matrices=False)
        squares = singular.double().square()
        if rank is not None or size == least or float(squares[: size - _OVERSAMPLING].sum()) >= energy * total:
            return Q @ U[:, : _kept(squares, total, energy, rank)]
        size = min(least, 2 * size)


def _kept(squares: Any, total: float, energy: float, rank: int | None) -> int:
    """How many leading values of a falling sequence are kept: `rank`, or until `energy` of `total` is reached."""
    import torch

    above = int((squares > squares[0] * 1e-12).sum())
    if rank is not None:
        return min(rank, above)
    reached = torch.cumsum(squares, 0) >= energy * total * (1 - 1e-9)
    return min(int(reached.int().argmax()) + 1 if bool(reached.any()) else len(squares), above)


def _shrinkage(subject: Subject, module: LoraModule, new: torch.Tensor) -> float:
    lora_B, lora_A = (factor.double() for factor in subject.factors(module))
    gram = lora_A @ lora_A.T

    def square(B: torch.Tensor) -> float:
        return max(float(((B.T @ B) * gram).sum()), 0.0)

    before = square(lora_B)
    return (square(new.double()) / before) ** 0.5 if before else 0.0
