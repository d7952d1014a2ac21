"""The equations of the input filter: every solver against a dense fp64 solve, and what the formula promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelora import SafeLoraError
from safelora.filter.solve import Gram, Problem, Rows, choose, solve

SOLVERS = ("cholesky", "dual", "cg")


def tokens(count: int, d: int, decay: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Inputs whose spectrum falls like that of activations, with one very long token."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q
    scale = torch.arange(1, d + 1, dtype=torch.float64).pow(-decay)
    x = torch.randn(count, d, generator=draw, dtype=torch.float64) @ (basis * scale) @ basis.T
    x[0] *= 20
    return x


def made(
    d: int = 48, n_task: int = 90, n_safety: int = 60, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[Problem, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A problem on rows; K_t, K_s, lora_A in fp64, and F_t."""
    rows, moments = [], []
    for seed, count in enumerate((n_task, n_safety)):
        x = tokens(count, d, seed=seed).to(dtype)
        w = torch.rand(count, dtype=torch.float64) / count
        rows.append(Rows(x, w))
        moments.append(x.double().T @ (w[:, None] * x.double()))
    problem = Problem(*rows, **{"strength": 100.0, "ridge": 0.1, "jitter": 1e-4, "unseen": "keep", **options})
    eye = torch.eye(d, dtype=torch.float64)
    task = moments[0] + problem.ridge * moments[0].diagonal().mean() * eye
    safety = moments[1] + problem.jitter * moments[1].diagonal().mean() * eye
    return problem, task, safety, torch.randn(5, d, dtype=torch.float64), moments[0]


def error(found: torch.Tensor, truth: torch.Tensor, a: torch.Tensor) -> float:
    return float((found - truth).norm() / a.norm())


@pytest.mark.parametrize("unseen", ["keep", "drop"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("d", "n_task", "n_safety"), [(48, 90, 60), (200, 40, 30), (33, 1, 1), (5, 300, 200)])
def test_closed_form(d, n_task, n_safety, solver, unseen):
    problem, task, safety, a, raw = made(d, n_task, n_safety, unseen=unseen)
    truth = a @ (task if unseen == "keep" else raw) @ torch.linalg.inv(task + 100 * safety)
    solution = solve(problem, a, solver, tolerance=1e-8)
    assert error(solution.lora_A, truth, a) < 1e-6
    assert solution.residual < 1e-8 and solution.solver == solver
    assert (solution.iterations > 0) == (solver == "cg")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conjugate_gradients_keep_their_promise_on_half_precision_rows(dtype):
    problem, task, safety, a, _ = made(160, 400, 300, dtype)
    truth = a @ task @ torch.linalg.inv(task + 100 * safety)
    for tolerance in (1e-2, 1e-4, 1e-6):
        assert error(solve(problem, a, "cg", tolerance=tolerance).lora_A, truth, a) < 2 * tolerance
    # Direct solvers are exact whatever the rows are stored in.
    for solver in ("cholesky", "dual"):
        assert error(solve(problem, a, solver).lora_A, truth, a) < 1e-9


def test_conjugate_gradients_say_when_they_fail():
    problem, _, _, a, _ = made(160, 400, 300, ridge=1e-9, jitter=0.0)
    with pytest.raises(SafeLoraError, match="stopped after 2 iterations"):
        solve(problem, a, "cg", tolerance=1e-12, max_iterations=2)


def test_dependent_right_sides_do_no_harm():
    problem, task, safety, a, _ = made()
    a = torch.cat([a, a[:2], torch.zeros_like(a[:1])])
    truth = a @ task @ torch.linalg.inv(task + 100 * safety)
    assert error(solve(problem, a, "cg", tolerance=1e-8).lora_A, truth, a) < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_changes_without_strength_or_safety_inputs(solver):
    problem, _, _, a, _ = made(strength=0.0)
    assert torch.equal(solve(problem, a, solver).lora_A, a)
    problem, *_ = made()
    silent = Rows(problem.safety.x, torch.zeros_like(problem.safety.weights))
    assert torch.equal(solve(Problem(problem.task, silent, 100.0, 0.1, 1e-4, "keep"), a, solver).lora_A, a)


def test_inputs_are_damped_along_generalised_eigenvectors():
    problem, task, safety, a, _ = made()
    factor = torch.linalg.cholesky(task)
    half = torch.linalg.solve_triangular(factor, safety, upper=False)
    gammas, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.T, upper=False))
    v = torch.linalg.solve_triangular(factor.T, vectors, upper=True)  # K_s v = γ K_t v
    new = solve(problem, a, "cholesky").lora_A
    torch.testing.assert_close(new @ task @ v, a @ task @ v / (1 + 100 * gammas), rtol=1e-6, atol=1e-9)
    # An adapter that reads along such a vector alone is only scaled.
    row = v[:, 7:8].T
    torch.testing.assert_close(
        solve(problem, row, "cholesky").lora_A, row / (1 + 100 * gammas[7]), rtol=1e-6, atol=1e-9
    )


@settings(max_examples=25, deadline=None)
@given(
    strength=st.floats(1e-3, 1e4), ridge=st.floats(1e-3, 10.0), seed=st.integers(0, 10**6),
    d=st.integers(2, 24), n_task=st.integers(1, 40), n_safety=st.integers(1, 40),
)  # fmt: skip
def test_bounds_on_both_sides(strength, ridge, seed, d, n_task, n_safety):
    torch.manual_seed(seed)
    problem, task, safety, a, _ = made(d, n_task, n_safety, strength=strength, ridge=ridge)
    new = solve(problem, a, "cholesky").lora_A

    def size(z: torch.Tensor, moment: torch.Tensor) -> float:
        return math.sqrt(max(float(((z @ moment) * z).sum()), 0.0))

    slack = 1 + 1e-6
    # What the task loses is bounded by what the adapter does on safety inputs, and the other way round.
    assert size(new - a, task) <= slack * math.sqrt(strength) / 2 * size(a, safety)
    assert size(new, safety) <= slack * size(a, task) / (2 * math.sqrt(strength))
    assert size(new, task) <= slack * size(a, task) and size(new, safety) <= slack * size(a, safety)
    # It is the best trade of the two: no other A' has a lower sum.
    cost = size(new - a, task) ** 2 + strength * size(new, safety) ** 2
    for other in (a, torch.zeros_like(a), new + 1e-2 * torch.randn_like(a), new * 1.01):
        assert cost <= slack * (size(other - a, task) ** 2 + strength * size(other, safety) ** 2)


def test_task_inputs_orthogonal_to_safety_inputs_are_untouched():
    d = 40
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    x = torch.randn(50, d // 2, dtype=torch.float64)
    task, safety = x @ basis[: d // 2], torch.randn(50, d // 2, dtype=torch.float64) @ basis[d // 2 :]
    ones = torch.full((50,), 1 / 50, dtype=torch.float64)
    a = torch.randn(4, d, dtype=torch.float64)
    new = solve(Problem(Rows(task, ones), Rows(safety, ones), 100.0, 0.1, 0.0, "keep"), a, "cholesky").lora_A
    torch.testing.assert_close(task @ new.T, task @ a.T, rtol=1e-10, atol=1e-10)
    assert float((safety @ new.T).norm() / (safety @ a.T).norm()) < 0.01


def test_jitter_is_raised_where_a_factorisation_needs_it():
    # Rounded in fp32, the moments are indefinite by more than this ridge and jitter make up for.
    moment = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    problem = Problem(Gram(torch.eye(3, dtype=torch.float64) * 1e-9), Gram(moment), 1e4, 1e-9, 1e-9, "keep")
    solution = solve(problem, torch.randn(2, 3, dtype=torch.float64), "cholesky")
    assert solution.jitter > 1e-9 and bool(solution.lora_A.isfinite().all())
    hopeless = Problem(
        Gram(torch.eye(3, dtype=torch.float64)), Gram(-torch.eye(3, dtype=torch.float64)), 1e4, 0.1, 1e-4, "keep"
    )
    with pytest.raises(SafeLoraError, match="not positive definite"):
        solve(hopeless, torch.randn(2, 3, dtype=torch.float64), "cholesky")


def test_not_finite():
    problem, *_ = made()
    broken = Rows(problem.safety.x * torch.inf, problem.safety.weights)
    with pytest.raises(SafeLoraError, match="not finite"):
        solve(Problem(problem.task, broken, 100.0, 0.1, 1e-4, "keep"), torch.randn(2, 48), "cholesky")


def test_the_choice_of_solver():
    gib = 2**30
    assert choose(576, 4000, 1, [8], 2, 2 * gib) == "cholesky"
    assert choose(11008, 8192, 1, [16], 2, 4 * gib) == "cg"  # large d, many tokens
    assert choose(11008, 300, 1, [16], 2, 4 * gib) in ("dual", "cg")  # fewer tokens than dimensions
    assert choose(4096, 100_000, 1, [16], 2, 1) == "cg"  # nothing else fits
