"""Setting an adapter's factors before training: task-aware, inside the complement, output equal to the base model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..adapter import LoraModule
from ..errors import SafeLoraError
from ..peft_model import (
    Gather,
    chosen_adapter,
    dequantised,
    inventory,
    is_transposed,
    live_weight,
    oriented,
    quantisation,
    unwrap,
    weight_of,
)
from .subspaces import Mode, Subspaces

if TYPE_CHECKING:
    import torch

MODES = ("packed", "residual", "plain")
_ATTACHED = "_salora_subspaces"
_POWER_ITERATIONS = 4
_OVERSAMPLE = 16


@dataclass(frozen=True)
class ConstrainedLayer:
    """One adapted module and its parameters; those of d_out × r and r × d_in in any sharding."""

    module: LoraModule
    layer: Any
    lora_A: Any
    lora_B: Any

    @property
    def name(self) -> str:
        return self.module.name


@dataclass(frozen=True)
class AdapterLayers:
    """The adapter of a live model: modules with a subspace, and what lies outside the guarantee."""

    model: Any
    adapter: str
    layers: list[ConstrainedLayer]
    outside: dict[str, str]


def initialize(
    peft_model: Any,
    subspaces: Subspaces,
    mode: Mode = "packed",
    *,
    adapter_name: str | None = None,
    seed: int = 0,
) -> Subspaces:
    """Initialise a fresh LoRA adapter as SaLoRA does, before the optimizer is made.

    With ``W ≈ Ū S̄ V̄ᵀ`` of the adapter's rank r (randomised SVD, seeded, oversampled), ``B₀ = U_t U_tᵀ Ū √S̄``,
    ``A₀ = √S̄ V̄ᵀ`` and ``C = I − U Uᵀ``:

    - "packed": the adapter becomes one of rank 2r, A = [A₀; A₀], B = [C B₀, −C B₀], alpha 2·alpha (√2·alpha with
      rsLoRA), whose last r columns a :class:`SubspaceConstraint` keeps as they are. Any base, quantised ones too; each
      checkpoint is a plain adapter of the original model.
    - "residual": A = A₀, B = C B₀, and W becomes ``W' = W − s·C B₀ A₀`` in place. Half the adapter's FLOP; needs a
      floating-point base, and what PEFT saves belongs to W' until :func:`export` has made it an adapter of W.
    - "plain": LoRA's own initialisation, B = 0; a B that is not zero is projected.

    The model's output does not change, for any alpha, rsLoRA included (up to rounding; in "residual" that of W'). With
    lora_dropout "packed" drops inputs of the frozen half too. The state of torch's random generators is left alone.

    Args:
        peft_model: a PeftModel with a LoRA adapter, not yet sharded.
        subspaces: from :func:`calibrate`; "packed" and "residual" need its task bases.
        adapter_name: the adapter; by default the active one.
        seed: of the randomised SVD.

    Returns:
        The subspaces with the initial factors. They are also attached to the model, where :class:`SubspaceConstraint`
        and :func:`export` find them.

    Raises:
        SafeLoraError: for a model, adapter or state that cannot be handled: an adapter that was trained or initialised
            already, DoRA and other updates that are not s·B·A, subspaces that do not fit, a quantised base with
            "residual". Nothing has been changed then.
    """
    if mode not in MODES:
        raise SafeLoraError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    found = adapter_layers(peft_model, subspaces, adapter_name)
    if attached(found.model, found.adapter) is not None:
        raise SafeLoraError(
            f"adapter {found.adapter!r} has been initialised already; make it anew with get_peft_model or add_adapter."
        )
    _check_whole(found)
    if mode == "plain":
        result = replace(subspaces, mode=mode, initial_A={}, initial_B={})
        _project_plain(found, subspaces)
    else:
        _check_fresh(found, subspaces, mode)
        factors = {layer.name: _task_aware(layer, found.adapter, subspaces, seed) for layer in found.layers}
        result = replace(
            subspaces,
            mode=mode,
            initial_A={name: pair[0] for name, pair in factors.items()},
            initial_B={name: pair[1] for name, pair in factors.items()},
        )
        if mode == "packed":
            _pack(found, result)
        else:
            _subtract(found, result)
            _fill(found, result)
    attach(found.model, found.adapter, result)
    return result


def subspaces_of(peft_model: Any, adapter_name: str | None = None) -> Subspaces:
    """The subspaces attached to an adapter by :func:`initialize`. Raises SafeLoraError where there are none."""
    _, model = unwrap(peft_model)
    name = chosen_adapter(model, adapter_name)
    found = attached(model, name)
    if found is None:
        raise SafeLoraError(f"adapter {name!r} has no subspaces: call safelora.salora.initialize, or give them.")
    return found


def restore(peft_model: Any, subspaces: Subspaces, *, adapter_name: str | None = None) -> None:
    """Give an adapter that was read from a checkpoint its subspaces back, so that training goes on or it is exported.

    Where it was initialised with "residual", the loaded model holds W, and becomes W' again. Raises SafeLoraError as
    :func:`initialize` does.
    """
    found = adapter_layers(peft_model, subspaces, adapter_name)
    if attached(found.model, found.adapter) is not None:
        raise SafeLoraError(f"adapter {found.adapter!r} has its subspaces already.")
    if subspaces.mode == "residual":
        _check_whole(found)
        _check_writable(found)
        _subtract(found, subspaces)
    attach(found.model, found.adapter, subspaces)


def pack_residual(model: Any, adapter: str) -> Subspaces:
    """Turn a trained "residual" adapter into the "packed" one of the same update, and W' into W again, in place.

    W is restored up to one rounding. Returns the subspaces, attached with mode "packed". Raises SafeLoraError for an
    adapter of another mode.
    """
    import torch

    subspaces = subspaces_of(model, adapter)
    if subspaces.mode != "residual":
        raise SafeLoraError(f"adapter {adapter!r} was initialised with mode {subspaces.mode!r}, not 'residual'.")
    found = adapter_layers(model, subspaces, adapter)
    _check_whole(found)
    factors = {}
    with torch.no_grad():
        for entry in found.layers:
            weight_of(entry.layer).copy_(subtracted(entry, adapter, subspaces, restore=True))
            a, b = (part[entry.name].to(entry.lora_A.device) for part in (subspaces.initial_A, subspaces.initial_B))
            factors[entry.name] = (torch.cat([entry.lora_A, a]), torch.cat([entry.lora_B, -b], dim=1))
        widen(found, factors)
    packed = replace(subspaces, mode="packed")
    attach(model, adapter, packed)
    return packed


def attached(model: Any, adapter: str) -> Subspaces | None:
    """What :func:`initialize` left at an adapter."""
    found: Subspaces | None = getattr(model, _ATTACHED, {}).get(adapter)
    return found


def attach(model: Any, adapter: str, subspaces: Subspaces) -> None:
    """Keep the subspaces at an adapter of the model."""
    setattr(model, _ATTACHED, {**getattr(model, _ATTACHED, {}), adapter: subspaces})


def adapter_layers(peft_model: Any, subspaces: Subspaces, adapter_name: str | None) -> AdapterLayers:
    """The adapter's modules, checked against the subspaces.

    Raises SafeLoraError when the adapter's update is not s·B·A, or a module has neither a subspace nor a reason why.
    """
    _, model = unwrap(peft_model)
    name = chosen_adapter(model, adapter_name)
    adapter, parameters, layers = inventory(model, name, allow_projected=True)
    constrained, outside, missing = [], {}, []
    for module in adapter.modules:
        layer = layers[module.lora_B.name]
        if hasattr(layer, "parameter_name"):
            outside[module.name] = "experts are parameters without a forward pass of their own"
            continue
        if module.name not in subspaces.bases and module.name not in subspaces.input_bases:
            if module.name in subspaces.skipped:
                outside[module.name] = subspaces.skipped[module.name]
            else:
                missing.append(module.name)
            continue
        for side, basis, size in (
            ("bases", subspaces.bases.get(module.name), module.d_out),
            ("input_bases", subspaces.input_bases.get(module.name), module.d_in),
        ):
            if basis is not None and basis.shape[0] != size:
                raise SafeLoraError(
                    f"{module.name}: its {side} have {basis.shape[0]} rows, but the adapter {size}. The subspaces "
                    "belong to another model."
                )
        if module.kind != "linear":
            raise SafeLoraError(f"{module.name} is adapted as {module.kind}; a subspace needs a plain matrix.")
        constrained.append(
            ConstrainedLayer(module, layer, parameters[module.lora_A.name], parameters[module.lora_B.name])
        )
    if missing:
        raise SafeLoraError(
            f"{len(missing)} adapted modules have no subspace ({missing[0]}). Calibrate with the adapter's own "
            "configuration, or adapt fewer modules."
        )
    if not constrained:
        raise SafeLoraError("no adapted module has a subspace: the adapter would train without any constraint.")
    for key in adapter.passed_through:
        outside[key.removeprefix("base_model.model.")] = "it is trained in full, not as B·A"
    return AdapterLayers(model, name, constrained, outside)


def outside_warning(outside: dict[str, str]) -> str:
    """What is said about trained parts that no subspace constrains."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(outside.items())[:3])
    more = f"; and {len(outside) - 3} more" if len(outside) > 3 else ""
    return f"{len(outside)} trained part(s) lie outside SaLoRA's guarantee ({reasons}{more})."


def frozen_matrix(module: Any, name: str) -> torch.Tensor:
    """W as d_out × d_in in fp32 (fp64 where it is), dequantised; `module` is a plain layer."""
    import torch

    held = _Plain(module)
    weight = dequantised(module) if quantisation(held, name) else Gather()(weight_of(held))
    weight = weight.t() if type(module).__name__ == "Conv1D" else weight
    return weight if weight.dtype == torch.float64 else weight.float()


class _Plain:
    """A layer without an adapter, as `quantisation` and `weight_of` see one."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def get_base_layer(self) -> Any:
        return self._module


def leading_factors(
    weight: torch.Tensor, rank: int, seed: int, iterations: int = _POWER_ITERATIONS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ū, S̄ and V̄ of the rank-`rank` approximation of W, by subspace iteration in fp64 from a seeded random start.

    The same call gives the same bits on one machine; torch's own svd_lowrank draws from the global generator.
    """
    import torch

    q = min(rank + _OVERSAMPLE, *weight.shape)
    wide = weight.double()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(weight.shape[1], q, generator=generator, dtype=torch.float64).to(wide.device)
    left = torch.linalg.qr(wide @ start)[0]
    for _ in range(iterations):
        left = torch.linalg.qr(wide @ torch.linalg.qr(wide.t() @ left)[0])[0]
    inner, values, right = torch.linalg.svd(left.t() @ wide, full_matrices=False)
    return left @ inner[:, :rank], values[:rank], right[:rank].t()


def project(matrix: torch.Tensor, basis: torch.Tensor | None, side: str = "left") -> torch.Tensor:
    """``M − U(UᵀM)``, or ``M − (MV)Vᵀ`` with side="right", in fp64; M where there is no basis."""
    if basis is None:
        return matrix
    if basis.shape[0] == basis.shape[1]:
        return matrix.new_zeros(matrix.shape)  # nothing is left; rounding would not say so
    wide, basis = matrix.double(), basis.to(matrix.device).double()
    for _ in range(2):  # UᵀU of an fp32 basis is off by 1e-7, and a matrix may lie in its span all but wholly
        wide = wide - (basis @ (basis.t() @ wide) if side == "left" else (wide @ basis) @ basis.t())
    return wide


def rescaled(config: Any, exempt: dict[str, tuple[int, float]], factor: float) -> dict[str, Any]:
    """The fields of a LoRA configuration with `factor` times the rank at the same scaling (factor 2 or 1/2).

    `exempt` modules keep their rank and alpha.
    """
    get: Callable[[str], Any] = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    alpha_factor = math.sqrt(factor) if get("use_rslora") else factor
    ranks, alphas = get("rank_pattern") or {}, get("alpha_pattern") or {}
    return {
        "r": int(factor * get("r")),
        "lora_alpha": alpha_factor * get("lora_alpha"),
        "rank_pattern": {
            **{name: rank for name, (rank, _) in exempt.items()},
            **{key: int(factor * value) for key, value in ranks.items() if key not in exempt},
        },
        "alpha_pattern": {
            **{name: alpha for name, (_, alpha) in exempt.items()},
            **{key: alpha_factor * value for key, value in alphas.items() if key not in exempt},
        },
    }


def exempt_modules(found: AdapterLayers) -> dict[str, tuple[int, float]]:
    """Rank and alpha of the adapter's LoRA modules that no subspace constrains."""
    inside = {id(layer.layer) for layer in found.layers}
    exempt = {}
    for path, layer in found.model.base_model.model.named_modules():
        ranks = getattr(layer, "r", None)
        if isinstance(ranks, dict) and found.adapter in ranks and id(layer) not in inside:
            exempt[path] = (ranks[found.adapter], layer.lora_alpha[found.adapter])
    return exempt


def widen(found: AdapterLayers, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Make the adapter one of twice the rank, with the given lora_A and lora_B."""
    import torch

    config = found.model.peft_config[found.adapter]
    for key, value in rescaled(config, exempt_modules(found), 2).items():
        setattr(config, key, value)
    factor = math.sqrt(2) if config.use_rslora else 2
    for entry in found.layers:
        layer, name = entry.layer, found.adapter
        for part, old, new in zip(
            (layer.lora_A[name], layer.lora_B[name]), (entry.lora_A, entry.lora_B), factors[entry.name], strict=True
        ):
            value = new.to(device=old.device, dtype=old.dtype).contiguous()
            part.weight = torch.nn.Parameter(value, requires_grad=old.requires_grad)
        layer.lora_A[name].out_features = layer.lora_B[name].in_features = 2 * layer.r[name]
        layer.r[name] *= 2
        layer.lora_alpha[name] *= factor


def subtracted(entry: ConstrainedLayer, adapter: str, subspaces: Subspaces, *, restore: bool = False) -> torch.Tensor:
    """``W − s·C B₀ A₀`` as the model holds W: in its shape, formed in fp32 (fp64 where W is), not rounded.

    With `restore` the sum instead, which gives W from W'.
    """
    import torch

    weight = live_weight(entry.layer, entry.module, Gather())
    wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
    a, b = (
        part[entry.name].to(device=weight.device, dtype=wide) for part in (subspaces.initial_A, subspaces.initial_B)
    )
    update = entry.layer.scaling[adapter] * (b @ a)
    update = update.t() if is_transposed(entry.layer, entry.module) else update
    return weight.to(wide) + update if restore else weight.to(wide) - update


def _task_aware(
    entry: ConstrainedLayer, adapter: str, subspaces: Subspaces, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A₀ and C·B₀ in the adapter's dtype."""
    from .calibration import _seed

    module = entry.module
    weight = oriented(live_weight(entry.layer, module, Gather()), is_transposed(entry.layer, module))
    rank = entry.layer.r[adapter]
    if rank > min(weight.shape):
        raise SafeLoraError(f"{entry.name} is {weight.shape[0]} × {weight.shape[1]}, smaller than the rank {rank}.")
    left, values, right = leading_factors(weight, rank, _seed(seed, "init", entry.name))
    root = values.sqrt()
    task = subspaces.task_bases[entry.name].to(left)
    b = task @ (task.t() @ (left * root))
    b = project(b, subspaces.bases.get(entry.name))
    a = project((right * root).t(), subspaces.input_bases.get(entry.name), "right")
    return a.to(entry.lora_A), b.to(entry.lora_B)


def _pack(found: AdapterLayers, subspaces: Subspaces) -> None:
    import torch

    factors = {}
    for entry in found.layers:
        a, b = subspaces.initial_A[entry.name], subspaces.initial_B[entry.name]
        factors[entry.name] = (torch.cat([a, a]), torch.cat([b, -b], dim=1))
    widen(found, factors)


def _subtract(found: AdapterLayers, subspaces: Subspaces) -> None:
    import torch

    with torch.no_grad():
        for entry in found.layers:
            weight = weight_of(entry.layer)
            weight.copy_(subtracted(entry, found.adapter, subspaces))


def _fill(found: AdapterLayers, subspaces: Subspaces) -> None:
    import torch

    with torch.no_grad():
        for entry in found.layers:
            entry.lora_A.copy_(subspaces.initial_A[entry.name])
            entry.lora_B.copy_(subspaces.initial_B[entry.name])


def _project_plain(found: AdapterLayers, subspaces: Subspaces) -> None:
    import torch

    with torch.no_grad():
        for entry in found.layers:
            entry.lora_B.copy_(project(entry.lora_B, subspaces.bases.get(entry.name)))
            entry.lora_A.copy_(project(entry.lora_A, subspaces.input_bases.get(entry.name), "right"))


def _check_whole(found: AdapterLayers) -> None:
    sharded = next((entry for entry in found.layers if hasattr(entry.lora_B, "device_mesh")), None)
    if sharded is not None:
        raise SafeLoraError(f"{sharded.name} is sharded already; initialise the adapter before fully_shard.")


def _check_fresh(found: AdapterLayers, subspaces: Subspaces, mode: str) -> None:
    import torch

    missing = [entry.name for entry in found.layers if entry.name not in subspaces.task_bases]
    if missing:
        raise SafeLoraError(
            f"mode {mode!r} needs a task subspace for {missing[0]}: calibrate with task_data, or use mode='plain'."
        )
    trained = next((entry.name for entry in found.layers if torch.count_nonzero(entry.lora_B)), None)
    if trained is not None:
        raise SafeLoraError(
            f"lora_B of {trained} is not zero: the adapter was trained, or initialised otherwise. Mode {mode!r} would "
            "overwrite it; start from a new adapter, or use mode='plain', which keeps it and projects it."
        )
    if mode == "residual":
        _check_writable(found)


def _check_writable(found: AdapterLayers) -> None:
    """Refuse to write W' where W is shared or quantised."""
    if len(found.model.peft_config) > 1:
        raise SafeLoraError("mode 'residual' changes W under all adapters of the model; with several use 'packed'.")
    seen: dict[int, str] = {}
    for entry in found.layers:
        kind = quantisation(entry.layer, entry.name)
        if kind:
            raise SafeLoraError(f"{entry.name} is quantised ({kind}): W' cannot be written. Use mode='packed'.")
        other = seen.setdefault(id(weight_of(entry.layer)), entry.name)
        if other != entry.name:
            raise SafeLoraError(f"{other} and {entry.name} share their weight; mode 'residual' would change it twice.")
