"""The equations of the input filter: A' = A K_t (K_t + λ K_s)⁻¹, solved three ways.

With raw second moments F_t and F_s (d_in × d_in), mean diagonals e_t and e_s, ridge μ and jitter j:

    K_t = F_t + μ e_t I      K_s = F_s + j e_s I      M = K_t + λ K_s
    unseen="keep":  A' = A K_t M⁻¹ = A − λ A K_s M⁻¹
    unseen="drop":  A' = A F_t M⁻¹ = A − A (λ K_s + μ e_t I) M⁻¹

They differ where neither set has inputs: "keep" leaves the adapter as it was there, "drop" takes its update away. Every
solver computes the right-hand form, from which λ = 0 or K_s = 0 give A bit by bit under "keep".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import SafeLoraError

if TYPE_CHECKING:
    import torch

Solver = Literal["cholesky", "dual", "cg"]
Unseen = Literal["keep", "drop"]


class Moments(Protocol):
    """A second moment F = Σ wᵢ xᵢ xᵢᵀ (d × d) in one of its forms."""

    @property
    def dim(self) -> int: ...

    def mean_diagonal(self) -> float: ...

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """F z for z d × k."""
        ...

    def dense(self, dtype: torch.dtype | None) -> torch.Tensor:
        """F itself, not to be written to; in the dtype that it is in where None is asked for."""
        ...


class Gram:
    """F as a matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    @property
    def dim(self) -> int:
        return int(self.matrix.shape[0])

    def mean_diagonal(self) -> float:
        return float(self.matrix.diagonal().double().mean())

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        return (self.matrix.to(z.dtype) if z.dtype.itemsize > self.matrix.element_size() else self.matrix) @ z

    def dense(self, dtype: torch.dtype | None) -> torch.Tensor:
        return self.matrix if dtype is None else self.matrix.to(dtype)


class Rows:
    """F by its tokens: x (N × d) and their weights (N), never multiplied out unless asked."""

    def __init__(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        self.x, self.weights = x, weights
        self._mean: float | None = None

    @property
    def dim(self) -> int:
        return int(self.x.shape[1])

    def mean_diagonal(self) -> float:
        if self._mean is None:
            squares = (block.double().square().sum(1) for block in self.x.split(1024))
            parts = zip(squares, self.weights.split(1024), strict=True)
            self._mean = sum(float(square @ weight.double()) for square, weight in parts) / self.dim
        return self._mean

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        import safelora_kernels as sk

        return sk.gram_apply(self.x, z, self.weights.to(z.dtype))

    def dense(self, dtype: torch.dtype | None) -> torch.Tensor:
        import safelora_kernels as sk

        return sk.gram(self.x, self.weights, out_dtype=dtype)

    def scaled(self, dtype: torch.dtype) -> torch.Tensor:
        """diag(√w) x, so that F is its Gram matrix."""
        return self.x.to(dtype) * self.weights.to(dtype).sqrt()[:, None]


@dataclass(frozen=True)
class Problem:
    """One filter: the moments and how they are combined."""

    task: Moments
    safety: Moments
    strength: float
    ridge: float
    jitter: float
    unseen: Unseen

    @property
    def shift(self) -> tuple[float, float]:
        """(μ e_t, j e_s): what is added to the diagonals of F_t and F_s."""
        return self.ridge * self.task.mean_diagonal(), self.jitter * self.safety.mean_diagonal()


@dataclass(frozen=True)
class Solution:
    """A' (r × d) in fp64, how it was found, and ‖R − M Z‖_F/‖R‖_F of the linear system behind it.

    iterations is 0 for direct solvers; jitter is the one used, which is more than asked for where a factorisation
    needed it.
    """

    lora_A: torch.Tensor
    solver: Solver
    residual: float
    iterations: int
    jitter: float


def solve(
    problem: Problem, lora_A: torch.Tensor, solver: Solver, *, tolerance: float = 1e-4, max_iterations: int = 500
) -> Solution:
    """A' for lora_A (r × d; several adapters stacked are as many rows).

    `tolerance` and `max_iterations` are for solver "cg", which needs the moments as rows, as "dual" does. It stops when
    the estimated error of A' is at most `tolerance`·‖A‖_F: ‖P⁻¹(R − M Z)‖_F, with the fp64 residual and the
    preconditioner P in place of M.

    Raises SafeLoraError where the moments are not finite, where a factorisation fails at every jitter, or where the
    iteration does not reach `tolerance`.
    """
    import torch

    a = lora_A.detach().to(problem.task.apply(lora_A.new_zeros(problem.task.dim, 1)).device, torch.float64)
    mean_t, mean_s = problem.task.mean_diagonal(), problem.safety.mean_diagonal()
    if not math.isfinite(mean_t) or not math.isfinite(mean_s):
        raise SafeLoraError("its calibration inputs or gradients are not finite; load the model in bf16 or fp32")
    if (problem.strength == 0 and problem.unseen == "keep") or mean_s == 0 or mean_t == 0:
        return Solution(a, solver, 0.0, 0, problem.jitter)
    run = {"cholesky": _cholesky, "dual": _dual, "cg": _cg}[solver]
    return run(problem, a, tolerance, max_iterations)


def _right_side(problem: Problem, a: torch.Tensor, shift: tuple[float, float]) -> torch.Tensor:
    """R = (λ K_s [+ μ e_t I]) Aᵀ, d × r."""
    z = a.t().contiguous()
    right = problem.strength * (problem.safety.apply(z) + shift[1] * z)
    return right + shift[0] * z if problem.unseen == "drop" else right


def _cholesky(problem: Problem, a: torch.Tensor, tolerance: float, max_iterations: int) -> Solution:
    import torch

    matrix = problem.task.dense(torch.float64)
    if isinstance(problem.task, Gram) and matrix is problem.task.matrix:
        matrix = matrix.clone()
    matrix.add_(problem.safety.dense(None), alpha=problem.strength)
    mean_s = problem.safety.mean_diagonal()
    jitter, added = problem.jitter, 0.0
    for _ in range(4):
        shift = (problem.shift[0], jitter * mean_s)
        rho = shift[0] + problem.strength * shift[1]
        matrix.diagonal().add_(rho - added)
        added = rho
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            right = _right_side(problem, a, shift)
            z = torch.cholesky_solve(right, factor)
            residual = float((right - matrix @ z).norm() / right.norm())
            return Solution(a - z.t(), "cholesky", residual, 0, jitter)
        jitter = max(10 * jitter, 1e-6)
    raise SafeLoraError(f"its moments are not positive definite, even with jitter {jitter / 10:g}; raise the ridge")


def _stacked(problem: Problem) -> torch.Tensor:
    """Y with YᵀY = F_t + λ F_s; the task's rows first."""
    import torch

    if not isinstance(problem.task, Rows) or not isinstance(problem.safety, Rows):
        raise TypeError("the dual needs the moments as rows")
    safety = problem.safety.scaled(torch.float64) * math.sqrt(problem.strength)
    return torch.cat([problem.task.scaled(torch.float64), safety])


def _dual(problem: Problem, a: torch.Tensor, tolerance: float, max_iterations: int) -> Solution:
    """N × N in place of d × d: M⁻¹ = (I − Yᵀ(YYᵀ + ρI)⁻¹Y)/ρ, and M⁻¹Yᵀ = Yᵀ(YYᵀ + ρI)⁻¹ (push-through)."""
    import torch

    shift = problem.shift
    rho = shift[0] + problem.strength * shift[1]
    if rho <= 0:
        raise SafeLoraError("the dual needs ridge or jitter above 0; use the cholesky solver")
    y = _stacked(problem)
    factor, failed = torch.linalg.cholesky_ex((y @ y.t()).diagonal_scatter((y * y).sum(1) + rho))
    if int(failed):
        raise SafeLoraError("its moments are not positive definite; raise the ridge")
    tokens = problem.task.weights.numel()  # type: ignore[attr-defined]
    outer = problem.strength * shift[1] + (shift[0] if problem.unseen == "drop" else 0.0)
    z = a.t().contiguous()
    projected = y @ z
    # λF_sAᵀ lies in the span of Y and goes through push-through, which cancels nothing; the shift does not.
    safety = projected.clone()
    safety[:tokens] = 0
    solved = torch.cholesky_solve(torch.cat([safety, projected], 1), factor)
    rank = a.shape[0]
    answer = y.t() @ solved[:, :rank] + outer / rho * (z - y.t() @ solved[:, rank:])
    right = _right_side(problem, a, shift)
    image = rho * answer + y.t() @ (y @ answer)
    return Solution(a - answer.t(), "dual", float((right - image).norm() / right.norm()), 0, problem.jitter)


def _cg(problem: Problem, a: torch.Tensor, tolerance: float, max_iterations: int) -> Solution:
    """Block conjugate gradients on the rows alone, preconditioned, and refined with residuals in fp64."""
    import torch

    if not isinstance(problem.task, Rows) or not isinstance(problem.safety, Rows):
        raise TypeError("conjugate gradients need the moments as rows")
    task, safety, strength, shift = problem.task, problem.safety, problem.strength, problem.shift
    rho = shift[0] + strength * shift[1]

    def image(z: torch.Tensor) -> torch.Tensor:
        return rho * z + task.apply(z) + strength * safety.apply(z)

    precise = task.x.dtype == torch.float64
    work = torch.float64 if precise else torch.float32
    precondition = _nystrom(lambda z: image(z) - rho * z, rho, task.dim, a.shape[0], work, a.device)
    right = _right_side(problem, a, shift)
    z, residual = torch.zeros_like(right), right
    allowed = tolerance * float(a.norm())
    done, error = 0, math.inf
    while done < max_iterations:
        found, count = _block_cg(
            image, precondition, residual.to(work), 1e-9 if precise else 1e-3, allowed / 2, max_iterations - done
        )
        z = z + found.double()
        done += count
        residual = right - image(z)
        before, error = error, float(precondition(residual.to(work)).norm())
        if error <= allowed:
            return Solution(a - z.t(), "cg", float(residual.norm() / right.norm()), done, problem.jitter)
        if not error < before / 2:
            break
    raise SafeLoraError(
        f"conjugate gradients stopped after {done} iterations at an error of about {error / float(a.norm()):.1e}·‖A‖ "
        f"(asked for: {tolerance:g}). Raise the ridge or max_iterations, or choose solver='cholesky'"
    )


def _block_cg(
    image: Callable[[torch.Tensor], torch.Tensor],
    precondition: Callable[[torch.Tensor], torch.Tensor],
    residual: torch.Tensor,
    reduction: float,
    allowed: float,
    max_iterations: int,
) -> tuple[torch.Tensor, int]:
    """An approximation of M⁻¹R for all columns of R at once (O'Leary 1980), and the iterations made.

    Directions are orthonormalised, so that columns which converge early, or depend on each other, do no harm.
    """
    import torch

    z = torch.zeros_like(residual)
    step = precondition(residual)
    allowed = max(allowed, reduction * float(step.norm()))
    done = 0
    while done < max_iterations:
        done += 1
        direction = torch.linalg.qr(step).Q
        moved = image(direction)
        curvature = direction.t().double() @ moved.double()
        curvature = (curvature + curvature.t()) / 2
        size = torch.linalg.solve(curvature, direction.t().double() @ residual.double()).to(z.dtype)
        z = z + direction @ size
        residual = residual - moved @ size
        fresh = precondition(residual)
        if float(fresh.norm()) <= allowed:
            break
        turn = torch.linalg.solve(curvature, moved.t().double() @ fresh.double()).to(z.dtype)
        step = fresh - direction @ turn
    return z, done


def _nystrom(
    moment: Callable[[torch.Tensor], torch.Tensor],
    rho: float,
    dim: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """R ↦ P⁻¹R, where P is a randomised Nyström approximation of moment + ρI (Frangella, Tropp, Udell 2023).

    The sketch is drawn from a fixed seed, so the result depends on the moments alone.
    """
    import torch

    size = min(dim, max(128, 4 * rank))
    draw = torch.randn(dim, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    omega = torch.linalg.qr(draw).Q.to(device=device, dtype=dtype)
    sketch = torch.cat([moment(part.contiguous()) for part in omega.split(32, 1)], 1).double()
    wide = omega.double()
    nudge = float(sketch.norm()) * 10 * torch.finfo(dtype).eps
    sketch = sketch + nudge * wide
    core = wide.t() @ sketch
    factor = torch.linalg.cholesky((core + core.t()) / 2)
    left = torch.linalg.solve_triangular(factor, sketch.t(), upper=False).t()
    basis, singular, _ = torch.linalg.svd(left, full_matrices=False)
    values = (singular.square() - nudge).clamp_min(0)
    last = float(values[-1]) + rho
    basis, gain = basis.to(dtype), (1 / (values + rho) - 1 / last).to(dtype)[:, None]
    return lambda r: r / last + basis @ (gain * (basis.t() @ r))


def choose(d: int, tokens: int, distinct: int, ranks: Sequence[int], itemsize: int, budget: int) -> Solver:
    """The cheapest solver for a group of modules with one input of d entries that fits in `budget` bytes.

    Costs in fused multiply-adds: N d²/2 for each distinct moment, d³/3 for its factor; N² d/2 + N³/3 for the dual;
    2 N d (r·iterations + 128) for conjugate gradients with their sketch. On CPUs all three run at much the same rate
    (docs/filter.md).
    """
    n, rank = float(tokens), sum(ranks) / distinct
    cost: dict[Solver, float] = {
        "cholesky": distinct * (n * d * d / 2 + d**3 / 3),
        "dual": distinct * (n * n * d / 2 + n**3 / 3),
        "cg": distinct * 2 * n * d * (rank * _ITERATIONS + 128),
    }
    rows = n * d * itemsize
    size: dict[Solver, float] = {
        "cholesky": 8.0 * d * d * distinct + 24.0 * d * d,
        "dual": rows + 16 * n * n + 8 * n * d,
        "cg": 0,
    }
    return min((name for name in cost if size[name] <= budget), key=lambda name: cost[name])


_ITERATIONS = 60
