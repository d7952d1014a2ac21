"""The public functions: arguments are checked first, then one operator call does the work.

Weights and factors may be float32, bfloat16, float16 or float64 in any mix and of any strides; products accumulate in
fp32 (fp64 where an operand is fp64), norms, Grams and cosines in fp64. Autocast changes nothing. Arguments are never
written to, except by :func:`project_out_layers_`. All tensors of a call live on one device.

Every function raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or option, and
RuntimeError where ``backend`` (or ``SAFELORA_BACKEND``) asks for an implementation that cannot run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .backends import launcher
from .types import LayerFactors, Normalize, Projection, Rule, SelectedProjection, Side
from .validation import (
    check_choice,
    check_float_dtype,
    check_matrix,
    check_num_layers,
    check_rank,
    check_same_length,
    check_scaling,
    check_sequence,
    check_shape,
    check_threshold,
    check_writable,
    refuse_grad,
)

_NORMALIZE = ("frobenius", "none")
_SIDES = ("left", "right")
_RULES = ("strict", "authors")


def project_lowrank(
    aligned: Tensor,
    base: Tensor,
    lora_B: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor | None] | None = None,
    *,
    normalize: Normalize = "frobenius",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Projection:
    """Safe LoRA's projection of one layer: ``B' = V (Vᵀ B) / ‖V‖_F`` with ``V = aligned − base``.

    The batch of one of :func:`project_layers`, which says the rest.
    """
    layer = LayerFactors(aligned, base, lora_B, lora_A)
    return project_layers([layer], normalize=normalize, out_dtype=out_dtype, backend=backend)[0]


def project_layers(
    layers: Sequence[LayerFactors],
    *,
    normalize: Normalize = "frobenius",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Projection]:
    """Safe LoRA's projection of many layers of any shapes, ranks and dtypes in one launch.

    For each layer, with ``V = aligned − base`` subtracted in fp32 and never stored::

        B' = V (Vᵀ B) / ‖V‖_F                       (normalize="none" leaves out the division)
        cosine = ⟨B' A, B A⟩_F / (‖B' A‖_F ‖B A‖_F)     by r×r Grams, from B' before it is rounded

    ``V Vᵀ / ‖V‖_F`` is the paper's fast form: it shrinks what it projects and is not idempotent.

    Args:
        layers: :class:`LayerFactors`, or tuples in that order: ``aligned`` and ``base`` (d_out, d_in), ``lora_B``
            (d_out, r), ``lora_A`` (r, d_in) or None. Lists of ``lora_B`` and ``lora_A`` are several adapters over one
            weight pair, whose reads are then shared.
        normalize: "frobenius" or "none".
        out_dtype: dtype of ``B'``; by default that of each ``lora_B``.
        backend: name of the backend to use; by default the best one for the device.

    Returns:
        One :class:`Projection` per layer. ``aligned == base`` gives ``v_norm`` 0, ``B'`` zero and cosine NaN: there is
        nothing to project on. A zero update, or one projected to zero, has cosine 0. NaN or Inf in a weight gives
        ``v_norm``, ``B'`` and cosine NaN; in a factor, cosine NaN.

    Raises:
        RuntimeError: also when a tensor requires grad in grad mode, since no gradient is defined.

    Source: Safe LoRA, arXiv 2405.16833, eq. for C = V Vᵀ / ‖V‖_F.
    """
    flat = _flatten("project_layers", layers, normalize, out_dtype)
    if not layers:
        return []
    run = launcher("project_layers", flat.tensors(), backend, out_dtype)
    projected, norms, cosines = run(*flat.lists(), normalize, out_dtype)
    cosine_of = [c if a.shape[0] else None for c, a in zip(cosines.unbind(), flat.lora_A, strict=True)]
    return [
        Projection(b, norm, cosine)
        for b, norm, cosine in zip(_nest(projected, layers), norms.unbind(), _nest(cosine_of, layers), strict=True)
    ]


def project_selected_layers(
    layers: Sequence[LayerFactors],
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
    rule: Rule = "strict",
    normalize: Normalize = "frobenius",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> SelectedProjection:
    """Safe LoRA in one call: projects the adapters that :func:`select_layers` chooses and keeps the others.

    The factors of :func:`project_layers` where ``select_layers(cosine)`` holds, and the given ones elsewhere: these are
    bit-identical unless ``out_dtype`` rounds them. All adapters of the call are compared with each other; nothing is
    copied to the host. An adapter without ``lora_A`` has cosine NaN and is never selected.

    Args:
        layers, normalize, out_dtype: as in :func:`project_layers`.
        threshold, num_layers, rule: as in :func:`select_layers`; ``num_layers`` counts adapters.
        backend: name of the backend to use; by default the best one for the device.

    Returns:
        A :class:`SelectedProjection`.

    Raises:
        RuntimeError: also when a tensor requires grad in grad mode, since no gradient is defined.

    Source: Safe LoRA, arXiv 2405.16833.
    """
    _check_selection(threshold, num_layers, rule)
    flat = _flatten("project_selected_layers", layers, normalize, out_dtype)
    if not layers:
        nothing = torch.zeros(0, dtype=torch.float64)
        return SelectedProjection([], nothing, nothing.clone(), nothing.bool())
    run = launcher("project_selected_layers", flat.tensors(), backend, out_dtype)
    final, norms, cosines, selected = run(*flat.lists(), threshold, num_layers, rule, normalize, out_dtype)
    return SelectedProjection(_nest(final, layers), norms, cosines, selected)


def _flatten(function: str, layers: Sequence[LayerFactors], normalize: str, out_dtype: torch.dtype | None) -> _Factors:
    """Checks the arguments that the projections share."""
    check_choice("normalize", normalize, _NORMALIZE)
    if out_dtype is not None:
        check_float_dtype("out_dtype", out_dtype)
    check_sequence("layers", layers)
    flat = _Factors()
    for index, layer in enumerate(layers):
        flat.add(f"layers[{index}]", LayerFactors(*layer))
    refuse_grad(function, flat.tensors())
    return flat


def _nest(values: Sequence[Any], layers: Sequence[LayerFactors]) -> list[Any]:
    """One value per adapter as one per layer: a list where the layer was given with lists."""
    left = iter(values)
    return [next(left) if isinstance(layer[2], Tensor) else [next(left) for _ in layer[2]] for layer in layers]


class _Factors:
    """The tensor lists of the projection operators; a missing lora_A is an empty (0, d_in) tensor."""

    def __init__(self) -> None:
        self.aligned: list[Tensor] = []
        self.base: list[Tensor] = []
        self.lora_B: list[Tensor] = []
        self.lora_A: list[Tensor] = []
        self.layer_of: list[int] = []

    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]:
        return self.aligned, self.base, self.lora_B, self.lora_A, self.layer_of

    def tensors(self) -> list[Tensor]:
        return [*self.aligned, *self.base, *self.lora_B, *self.lora_A]

    def add(self, name: str, layer: LayerFactors) -> None:
        aligned, base, lora_B, lora_A = layer
        check_matrix(f"{name}.aligned", aligned, self.aligned[0].device if self.aligned else None)
        check_matrix(f"{name}.base", base, aligned.device)
        d_out, d_in = aligned.shape
        check_shape(f"{name}.base", base, (d_out, d_in), "that of aligned")
        if isinstance(lora_B, Tensor):
            if not (lora_A is None or isinstance(lora_A, Tensor)):
                raise TypeError(f"{name}.lora_A must be a tensor or None beside a single lora_B")
            self._add_adapter(name, aligned, lora_B, lora_A)
        else:
            check_sequence(f"{name}.lora_B", lora_B)
            if lora_A is not None:
                check_sequence(f"{name}.lora_A", lora_A)
            adapters_A = [None] * len(lora_B) if lora_A is None else list(lora_A)
            check_same_length(lora_B=lora_B, lora_A=adapters_A)
            if not lora_B:
                raise ValueError(f"{name} has no adapter: leave the layer out, or give it a lora_B")
            for adapter, (b, a) in enumerate(zip(lora_B, adapters_A, strict=True)):
                self._add_adapter(f"{name} adapter {adapter}", aligned, b, a)
        self.aligned.append(aligned)
        self.base.append(base)

    def _add_adapter(self, name: str, aligned: Tensor, lora_B: Tensor, lora_A: Tensor | None) -> None:
        d_out, d_in = aligned.shape
        check_matrix(f"{name}.lora_B", lora_B, aligned.device)
        rank = lora_B.shape[1]
        check_shape(f"{name}.lora_B", lora_B, (d_out, rank), "d_out of aligned, rank")
        check_rank(f"{name}.lora_B", rank)
        if lora_A is not None:
            check_matrix(f"{name}.lora_A", lora_A, aligned.device)
            check_shape(f"{name}.lora_A", lora_A, (rank, d_in), "rank of lora_B, d_in of aligned")
        self.lora_B.append(lora_B)
        self.lora_A.append(aligned.new_empty((0, d_in)) if lora_A is None else lora_A)
        self.layer_of.append(len(self.aligned))


def update_cosine(
    lora_B_new: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor],
    *,
    backend: str | None = None,
) -> Tensor:
    """The cosine between two updates that share ``lora_A``: ``⟨B_new A, B A⟩_F / (‖B_new A‖_F ‖B A‖_F)``.

    With ``K = A Aᵀ`` it is ``⟨BᵀB_new, K⟩ / √(⟨BᵀB, K⟩ ⟨B_newᵀB_new, K⟩)``: only r×r matrices, in fp64. It does not
    depend on the scaling of the adapter.

    Args:
        lora_B_new, lora_B: (d_out, r), or lists of such.
        lora_A: (r, d_in), or a list of such.
        backend: name of the backend to use; by default the best one for the device.

    Returns:
        fp64: 0-dim for tensors, (n,) for lists of n. 0 where an update is zero, NaN where an input is not finite.

    Raises:
        RuntimeError: also when a tensor requires grad in grad mode, since no gradient is defined.

    Source: the selection score of Safe LoRA, arXiv 2405.16833.
    """
    single = isinstance(lora_B_new, Tensor)
    factors = {"lora_B_new": lora_B_new, "lora_B": lora_B, "lora_A": lora_A}
    lists: dict[str, Sequence[Tensor]] = {}
    for name, value in factors.items():
        lists[name] = [value] if single else value  # type: ignore[assignment, list-item]
        check_sequence(name, lists[name])
    check_same_length(**lists)
    device = None
    for i, (new, old, a) in enumerate(zip(*lists.values(), strict=True)):
        check_matrix("lora_B_new", new, device, i)
        device = new.device
        check_matrix("lora_B", old, device, i)
        check_matrix("lora_A", a, device, i)
        check_rank(f"lora_B[{i}]", old.shape[1])
        check_shape(f"lora_B_new[{i}]", new, tuple(old.shape), "that of lora_B")
        check_shape(f"lora_A[{i}]", a, (old.shape[1], a.shape[1]), "rank of lora_B, d_in")
    tensors = [tensor for values in lists.values() for tensor in values]
    refuse_grad("update_cosine", tensors)
    cosines: Tensor = launcher("update_cosine", tensors, backend)(*map(list, lists.values()))
    return cosines[0] if single else cosines


def select_layers(
    cosines: Tensor,
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
    rule: Rule = "strict",
    backend: str | None = None,
) -> Tensor:
    """The layers to project: those whose update the projection turns the most, i.e. whose cosine is smallest.

    ============  ===============================  ==============================================================
    rule          threshold=τ                      num_layers=K
    ============  ===============================  ==============================================================
    "strict"      cosine <= τ                      exactly the K smallest, ties to the lower index
    "authors"     round(cosine, 5) <= τ            round(cosine, 5) <= the K-th smallest of them: ties select more
    ============  ===============================  ==============================================================

    A NaN cosine is never selected. K = 0 selects nothing, K > n everything that is not NaN.

    Args:
        cosines: (n,), floating.
        threshold, num_layers: exactly one of the two.
        rule: "strict", or "authors" for the decisions of the published code.
        backend: name of the backend to use; by default the best one for the device.

    Returns:
        (n,) bool on the device of ``cosines``; nothing is copied to the host.

    Source: Safe LoRA, arXiv 2405.16833, and the authors' code for the rounding and the ties.
    """
    _check_selection(threshold, num_layers, rule)
    if not isinstance(cosines, Tensor):
        raise TypeError(f"cosines must be a torch.Tensor, got {type(cosines).__name__}: torch.stack() 0-dim results")
    check_float_dtype("cosines.dtype", cosines.dtype)
    if cosines.dim() != 1:
        raise ValueError(f"cosines must be 1-D, got shape {tuple(cosines.shape)}")
    selected: Tensor = launcher("select_layers", [cosines], backend)(cosines.detach(), threshold, num_layers, rule)
    return selected


def _check_selection(threshold: float | None, num_layers: int | None, rule: str) -> None:
    check_choice("rule", rule, _RULES)
    if (threshold is None) == (num_layers is None):
        found = "neither" if threshold is None else "both"
        raise ValueError(f"give exactly one of threshold and num_layers, got {found}")
    if threshold is not None:
        check_threshold(threshold)
    else:
        check_num_layers(num_layers)


def project_out(x: Tensor, basis: Tensor, *, side: Side = "left", backend: str | None = None) -> Tensor:
    """The part of ``x`` outside a subspace: ``X − U (Uᵀ X)``, or ``X − (X U) Uᵀ`` with ``side="right"``.

    The batch of one of :func:`project_out_layers`, which says the rest.
    """
    return project_out_layers([x], [basis], side=side, backend=backend)[0]


def project_out_layers(
    xs: Sequence[Tensor], bases: Sequence[Tensor], *, side: Side = "left", backend: str | None = None
) -> list[Tensor]:
    """The complement of a subspace, for many pairs of any shapes in one launch.

    ``Y = X − U (Uᵀ X)`` (left) or ``Y = X − (X U) Uᵀ`` (right). With orthonormal columns in U it is the orthogonal
    projection off their span; U is used as it is. The map is its own adjoint.

    Differentiable, any number of times, in ``xs`` and ``bases``: ``dX = dY − U (Uᵀ dY)`` and
    ``dU = −(dY (Uᵀ X)ᵀ + X (Uᵀ dY)ᵀ)`` on the left.

    Args:
        xs: (d, m) each on the left, (m, d) on the right.
        bases: (d, k) each; k = 0 is allowed and leaves x as it is. One basis may serve several xs.
        side: "left" or "right".
        backend: name of the backend to use; by default the best one for the device.

    Returns:
        New tensors with the shape and dtype of each x.

    Source: C = I − U Uᵀ of SaLoRA, arXiv 2501.01765.
    """
    _check_pairs(xs, bases, side)
    return autograd.project_out_layers(xs, bases, side, backend) if xs else []


def project_out_layers_(
    xs: Sequence[Tensor], bases: Sequence[Tensor], *, side: Side = "left", backend: str | None = None
) -> None:
    """:func:`project_out_layers` written into ``xs``, for weights and gradients between training steps.

    Raises:
        ValueError: also when an x is expanded, or overlaps another x or a basis in memory.
        RuntimeError: also when a tensor requires grad in grad mode, as no gradient passes through the write: call it
            under ``torch.no_grad()``.
    """
    _check_pairs(xs, bases, side)
    if not xs:
        return
    tensors = [*xs, *bases]
    refuse_grad("project_out_layers_", tensors)
    if type(xs[0]) in (Tensor, torch.nn.Parameter) and not xs[0].is_meta and not torch.compiler.is_compiling():
        check_writable(xs, bases)
    run = launcher("project_out_layers_", tensors, backend)
    run(list(xs), list(bases), side)


def _check_pairs(xs: Sequence[Tensor], bases: Sequence[Tensor], side: str) -> None:
    check_choice("side", side, _SIDES)
    check_sequence("xs", xs)
    check_sequence("bases", bases)
    check_same_length(xs=xs, bases=bases)
    axis = 0 if side == "left" else 1
    device = None
    for i, (x, basis) in enumerate(zip(xs, bases, strict=True)):
        check_matrix("xs", x, device, i)
        device = x.device
        check_matrix("bases", basis, device, i)
        if basis.shape[0] != x.shape[axis]:
            raise ValueError(
                f"bases[{i}] must have {x.shape[axis]} rows, one per {'row' if axis == 0 else 'column'} of xs[{i}] "
                f"{tuple(x.shape)} with side={side!r}, got shape {tuple(basis.shape)}"
            )


def gram_apply(x: Tensor, z: Tensor, weights: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The weighted Gram matrix of tall ``x`` applied to thin ``z``, without forming it: ``Xᵀ diag(w) X Z``.

    The batch of one of :func:`gram_apply_layers`, which says the rest.
    """
    return gram_apply_layers([x], [z], None if weights is None else [weights], backend=backend)[0]


def gram_apply_layers(
    xs: Sequence[Tensor],
    zs: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """``Xᵀ diag(w) X Z`` for many pairs of any shapes, ranks and dtypes in one launch.

    One pass over X in blocks of rows, ``Σ_b X_bᵀ (w_b ∘ (X_b Z))``: each X is read from memory once, and nothing of the
    size of X or of ``Xᵀ X`` is formed. 4·tokens·d·r FLOP. The map is linear in Z and its own adjoint; it is positive
    semidefinite where no weight is negative. The dual of :func:`project_layers`, with X for Vᵀ.

    Differentiable, any number of times, in every tensor, with G = ∂L/∂Y::

        dZ = Xᵀ diag(w) X G      dw = rowsum((X Z) ∘ (X G))      dX = w ∘ (X Z Gᵀ + X G Zᵀ)

    dZ takes the kernel again, dw and dX plain torch in blocks of rows.

    Args:
        xs: (tokens, d) each; tokens = 0 gives zeros.
        zs: (d, r) each.
        weights: (tokens,) each, or None for ones; None in place of the list for ones everywhere. Any sign.
        backend: name of the backend to use; by default the best one for the device.

    Returns:
        (d, r) each, in the precision of the sums: fp32, or fp64 where anything of the pair is fp64.

    Source: the operator of conjugate gradients and of subspace iteration on second moments of activations.
    """
    check_sequence("xs", xs)
    check_sequence("zs", zs)
    if weights is not None:
        check_sequence("weights", weights)
    found = [None] * len(xs) if weights is None else weights
    check_same_length(xs=xs, zs=zs, weights=found)
    device = None
    for i, (x, z, weight) in enumerate(zip(xs, zs, found, strict=True)):
        check_matrix("xs", x, device, i)
        device = x.device
        check_matrix("zs", z, device, i)
        check_shape(f"zs[{i}]", z, (x.shape[1], z.shape[1]), f"columns of xs[{i}], r")
        if z.shape[1] == 0:
            raise ValueError(f"zs[{i}] has no columns: leave the pair out, or give it at least one")
        if weight is not None:
            _check_weights(f"weights[{i}]", weight, x)
    return autograd.gram_apply_layers(xs, zs, found, backend) if xs else []


def gram(x: Tensor, weights: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """The weighted Gram matrix ``Xᵀ diag(w) X`` of tall ``x``, for moderate d: exactly symmetric, in fp32 or fp64.

    Blocks of rows are widened and multiplied by the BLAS of torch on any device, and only the half on and below the
    diagonal: this is its home ground, so no operator stands behind it, and the bits may follow the number of threads.
    Autocast changes nothing: a Gram matrix rounded to half precision is indefinite.
    Where d is large, :func:`gram_apply` needs no d×d matrix. Differentiable in x and weights, any number of times.

    Args:
        x: (tokens, d); tokens = 0 gives zeros.
        weights: (tokens,), any sign; None for ones.
        out_dtype: float32 or float64, by default the wider of float32 and the dtypes of the operands. Sums are taken in
            the wider of it and of these.

    Returns:
        (d, d).
    """
    check_matrix("x", x)
    if weights is not None:
        _check_weights("weights", weights, x)
    if out_dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"out_dtype must be float32 or float64, got {out_dtype}: a Gram matrix is not held in less")
    return autograd.gram(x, weights, out_dtype)


def _check_weights(name: str, weights: Tensor, x: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(weights).__name__}")
    check_float_dtype(f"{name}.dtype", weights.dtype)
    check_shape(name, weights, (x.shape[0],), f"one per row of x {tuple(x.shape)}")
    if weights.device != x.device:
        raise ValueError(f"{name} is on {weights.device}, x on {x.device}: move them to one device")


def salora_linear(
    x: Tensor,
    base_output: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    basis: Tensor,
    scaling: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear layer's output plus a LoRA update kept out of a subspace.

    ``y = base_output + s (x Aᵀ) (B − U (Uᵀ B))ᵀ``. The projection is applied to the weight, ``4 d_out r k`` FLOP per
    call, never to the activations. Differentiable in every tensor, with G = ∂L/∂y read once::

        dx = s (G B̃) A      dA = s (G B̃)ᵀ x      dB = s (I − U Uᵀ) Gᵀ (x Aᵀ)      dbase_output = G

    With ``create_graph=True`` the gradients are plain torch and differentiable in turn; not so under torch.compile.

    Args:
        x: (..., d_in).
        base_output: (..., d_out), the frozen layer's output for x.
        lora_A: (r, d_in).
        lora_B: (d_out, r).
        basis: U, (d_out, k); keep it fp32, a bf16 U leaks 1e-2 into the subspace. k = 0 is plain LoRA.
        scaling: s = alpha / r.
        backend: name of the backend to use; by default the best one for the device.

    Returns:
        (..., d_out) in the dtype of ``base_output``.

    Source: SaLoRA, arXiv 2501.01765.
    """
    for name, tensor in (("x", x), ("base_output", base_output)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() == 0:
            raise ValueError(f"{name} must have at least one dimension, got a scalar")
    check_scaling(scaling)
    rows, rows_out = x.reshape(-1, x.shape[-1]), base_output.reshape(-1, base_output.shape[-1])
    check_matrix("x", rows)
    for name, tensor in (("base_output", rows_out), ("lora_A", lora_A), ("lora_B", lora_B), ("basis", basis)):
        check_matrix(name, tensor, x.device)
    d_in, d_out, rank = x.shape[-1], base_output.shape[-1], lora_A.shape[0]
    if x.shape[:-1] != base_output.shape[:-1]:
        raise ValueError(
            f"x and base_output must agree in all but the last dimension, got {tuple(x.shape)} and "
            f"{tuple(base_output.shape)}"
        )
    check_rank("lora_A", rank)
    check_shape("lora_A", lora_A, (rank, d_in), "rank, d_in of x")
    check_shape("lora_B", lora_B, (d_out, rank), "d_out of base_output, rank of lora_A")
    check_shape("basis", basis, (d_out, basis.shape[1]), "d_out of base_output, k")
    y = autograd.salora_linear(rows, rows_out, lora_A, lora_B, basis, float(scaling), backend)
    return y.view(base_output.shape)
