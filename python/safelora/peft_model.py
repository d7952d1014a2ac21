"""What a PeftModel in memory holds: the factors of one adapter, and the frozen weights that they adapt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import _MUTATING_INITS, PROJECTED, Adapter, LoraModule, Mark, _check_kind, _classify
from .checkpoint import Checkpoint, Header, TensorInfo
from .errors import SafeLoraError
from .stream import dtype_name
from .weights import WeightMatch

if TYPE_CHECKING:
    import torch

MEMORY = Path("<memory>")
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
# Variants whose update is s·B·A (of MonteCLoRA its mean; aLoRA's is switched on by tokens).
_VARIANTS = ("ALora", "Velora", "Monteclora", "MiCA")
# Relative error ‖W_quantised − W‖/‖W‖ of Gaussian weights: nf4 in blocks of 64; int8 by rows.
QUANTISATION_ERROR = {"Params4bit": 0.092, "Int8Params": 0.007}


class Gather:
    """Full tensors of sharded ones; the last is kept, since the experts of a stack follow one another."""

    def __init__(self) -> None:
        self._last: tuple[Any, torch.Tensor] | None = None

    def __call__(self, tensor: Any) -> torch.Tensor:
        if not hasattr(tensor, "device_mesh"):
            return tensor.detach()
        if self._last is None or self._last[0] is not tensor:
            self._last = (tensor, whole(tensor))
        return self._last[1]


def whole(tensor: Any) -> torch.Tensor:
    """The tensor without its graph; gathered, a collective call, where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "device_mesh") else tensor


@contextmanager
def flags_kept(model: Any) -> Iterator[None]:
    """Modules have their training mode and parameters their requires_grad again afterwards, also after an error."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)


def unwrap(model: Any) -> tuple[bool, Any]:
    """Whether the model is wrapped in DistributedDataParallel, and the PeftModel inside."""
    from peft import PeftModel
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    wrapped = False
    while not isinstance(model, PeftModel):
        if isinstance(model, DistributedDataParallel):
            wrapped, model = True, model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            raise SafeLoraError(
                f"expected a peft.PeftModel, got {type(model).__name__}. Pass what get_peft_model or "
                "PeftModel.from_pretrained returned; an adapter on disk is projected by project_adapter."
            )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise SafeLoraError(
            "the model is wrapped in FullyShardedDataParallel, whose flattened shards hide the factors. Use "
            "fully_shard (FSDP2), or save the adapter and use project_adapter."
        )
    return wrapped, model


def reshard(model: Any) -> None:
    """FSDP2 may leave gathered copies in place of its parameters; a change of those would be lost."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def chosen_adapter(model: Any, name: str | None) -> str:
    names = list(model.peft_config)
    if name is not None:
        if name not in names:
            raise SafeLoraError(f"the model has no adapter {name!r}; it has {', '.join(names)}.")
        return name
    active = list(model.active_adapters)
    if len(active) != 1:
        raise SafeLoraError(
            f"{len(active)} adapters are active ({', '.join(active)}); choose one by adapter_name. Each is projected "
            "alone."
        )
    return str(active[0])


def inventory(
    model: Any, name: str, allow_projected: bool, mark: Mark = PROJECTED
) -> tuple[Adapter, dict[str, Any], dict[str, Any]]:
    """The adapter as it would be read from disk, its parameters by key, and the layer that each belongs to."""
    import peft
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    label = Path(f"<adapter {name!r} in memory>")
    settings = {**model.peft_config[name].to_dict(), "peft_version": peft.__version__}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    _check_kind(config, label)
    for other, its in model.peft_config.items():
        init = getattr(its, "init_lora_weights", None)
        if getattr(its, "kasa_config", None) or (isinstance(init, str) and init.lower().startswith(_MUTATING_INITS)):
            raise SafeLoraError(
                f"adapter {other!r} was initialised with {init!r}, which changed the model's weights: they are no "
                "longer those of the aligned model. Use project_adapter on what was saved, or load it without that one."
            )
    marked = hasattr(model.peft_config[name], mark.attribute)
    if marked and not allow_projected:
        raise mark.refusal(f"adapter {name!r} has been {mark.done} already", "undo the first")
    parameters: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    for path, layer in model.base_model.model.named_modules():
        stem = "base_model.model." + _WRAPPERS.sub("", path)
        if isinstance(layer, LoraLayer):
            found = _parameters_of(layer, name, stem)
            if found:
                _check_layer(layer, name, stem)
            parameters.update(found)
            layers.update(dict.fromkeys(found, layer))
            if config.get("bias") == "lora_only" and getattr(layer.get_base_layer(), "bias", None) is not None:
                parameters[f"{stem}.base_layer.bias"] = layer.get_base_layer().bias
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            for key, parameter in layer.named_parameters():
                parts = key.split(".")
                if name in parts:
                    parts.remove(name)
                    parameters[f"{stem}.{'.'.join(parts)}"] = parameter
    if config.get("bias") == "all":
        for key, parameter in model.base_model.model.named_parameters():
            if key.endswith("bias") and "lora_" not in key:
                parameters[f"base_model.model.{_WRAPPERS.sub('', key)}"] = parameter
    tensors = {key: _info(key, parameter) for key, parameter in parameters.items()}
    modules, passed_through, warnings = _classify(tensors, config, label)
    keys = [info.name for module in modules for info in (module.lora_A, module.lora_B)]
    _check_factors({key: parameters[key] for key in keys})
    if marked:
        warnings.append(f"The adapter had been {mark.done} before; its update is shrunk a second time.")
    header = Header(label, 0, 0, "", {}, tensors)
    adapter = Adapter(str(label), label, label, config, modules, passed_through, warnings, header, None)
    return adapter, {key: parameters[key] for key in keys}, layers


def _parameters_of(layer: Any, adapter: str, stem: str) -> dict[str, Any]:
    """The parameters of one adapter in one layer, by the keys under which PEFT saves them."""
    import torch

    found = {}
    for part in layer.adapter_layer_names:
        container = getattr(layer, part, None)
        if container is None or adapter not in container:
            continue
        value = container[adapter]
        if isinstance(value, torch.Tensor):
            found[f"{stem}.{part}"] = value
        elif isinstance(value, torch.nn.Module):
            found.update({f"{stem}.{part}.{key}": parameter for key, parameter in value.named_parameters()})
    return found


def _check_layer(layer: Any, adapter: str, stem: str) -> None:
    if layer.merged_adapters:
        raise SafeLoraError(
            f"{stem}: adapter {layer.merged_adapters[0]!r} is merged into the weights, which are no longer the aligned "
            "model's. Call unmerge_adapter() first (it leaves the rounding of the merge), or load the model again."
        )
    variant = type(layer.lora_variant.get(adapter)).__name__ if layer.lora_variant.get(adapter) else None
    if variant is not None and not variant.startswith(_VARIANTS):
        raise SafeLoraError(f"{stem} cannot be projected: it is a {variant}, whose update is not known to be s·B·A.")


def _check_factors(parameters: dict[str, Any]) -> None:
    seen: dict[int, str] = {}
    for key, parameter in parameters.items():
        if parameter.device.type == "meta":
            raise SafeLoraError(
                f"{key} is offloaded. Load the model without offloading the adapter, or use project_adapter on disk."
            )
        if hasattr(parameter, "ds_id"):
            raise SafeLoraError(f"{key} is partitioned by DeepSpeed ZeRO-3. Save the adapter and use project_adapter.")
        local = parameter.to_local() if hasattr(parameter, "device_mesh") else parameter
        other = seen.setdefault(local.data_ptr(), key) if local.numel() else key
        if other != key:
            raise SafeLoraError(
                f"{other} and {key} share their memory (tied adapters): projecting one would change the other."
            )


def quantisation(layer: Any, name: str = "") -> str | None:
    """The class of a quantised weight that can be read through PEFT, None for a plain one. Raises for others."""
    base = layer.get_base_layer()
    if hasattr(base, "W_q"):
        return "HQQ"
    weight = weight_of(layer)
    kind = type(weight).__name__
    if type(weight).__module__.startswith("torchao.") or kind in QUANTISATION_ERROR:
        return kind
    if weight is None or not weight.dtype.is_floating_point or weight.element_size() < 2:
        held = type(base).__name__ if weight is None else f"{type(base).__name__}, {weight.dtype}"
        raise SafeLoraError(
            f"module {name}: its weight is quantised in a form that cannot be read ({held}). Give `aligned`, the "
            "unquantised checkpoint."
        )
    return None


def weight_of(layer: Any) -> Any:
    """The frozen parameter that the layer adapts, as the model holds it; None where it has none of that name."""
    return getattr(layer.get_base_layer(), _weight_name(layer), None)


def _weight_name(layer: Any) -> str:
    if hasattr(layer, "parameter_name"):
        return str(layer.parameter_name)
    return "in_proj_weight" if hasattr(layer.get_base_layer(), "in_proj_weight") else "weight"


def _offloaded(layer: Any, module: str) -> torch.Tensor:
    """A weight that accelerate keeps in host memory or on disk while it is not in use."""
    hook = getattr(layer.get_base_layer(), "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "weights_map", None) is not None:
            return part.weights_map[_weight_name(layer)]
    raise SafeLoraError(f"module {module}: its weight is on the meta device, and accelerate does not hold it either.")


def is_transposed(layer: Any, module: LoraModule) -> bool:
    """Whether the model holds d_in × d_out."""
    if module.kind == "expert":
        # PEFT's lora_B belongs to the first matrix dimension where it has swapped the two, else to the second.
        return bool(getattr(layer, "_did_swap_in_out_features", False)) == module.swapped
    return module.kind == "embedding" or bool(getattr(layer, "fan_in_fan_out", False))


def live_weight(layer: Any, module: LoraModule, gather: Gather) -> torch.Tensor:
    """The weight as it is shaped in the model, dequantised and gathered."""
    if quantisation(layer, module.name):
        return dequantised(layer.get_base_layer())
    weight = weight_of(layer)
    if weight.device.type == "meta":
        weight = _offloaded(layer, module.name)
    whole = gather(weight)
    return whole[module.expert] if module.kind == "expert" else whole


def dequantised(module: Any) -> torch.Tensor:
    """The weight of a layer that :func:`quantisation` knows, in floating point."""
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight

    if type(getattr(module, "weight", None)).__name__ == "Int8Params":  # HQQ has no weight
        # dequantize_module_weight makes a new parameter on CPUs, without the scales that a forward pass has moved away.
        return dequantize_bnb_weight(module.weight, state=module.state).detach()
    return dequantize_module_weight(module).detach()


def oriented(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    weight = weight.flatten(1)
    return weight.t() if transposed else weight


def checkpoint_in_memory(base: Any, model: Any) -> tuple[Checkpoint, dict[str, Any]]:
    """A model in memory as a checkpoint: the same names, and the tensors by name."""
    if base is model or any(module is model.base_model for module in base.modules()) or hasattr(base, "peft_config"):
        raise SafeLoraError("base is a model with adapters; give the plain model before alignment.")
    table = {_WRAPPERS.sub("", key): parameter for key, parameter in base.named_parameters(remove_duplicate=False)}
    for key, parameter in table.items():
        if hasattr(parameter, "device_mesh") or parameter.device.type == "meta":
            raise SafeLoraError(f"base: {key} is sharded or offloaded; give the directory of the model instead.")
    config = base.config.to_dict() if hasattr(base, "config") and hasattr(base.config, "to_dict") else {}
    infos = {key: _info(key, parameter) for key, parameter in table.items()}
    return Checkpoint(f"a {type(base).__name__} in memory", MEMORY, infos, config, []), table


def tensor_in_memory(table: dict[str, Any], match: WeightMatch) -> torch.Tensor:
    info = match.info
    tensor = whole(table[info.name])
    return tensor if tensor.ndim == len(info.shape) else tensor[info.begin // info.nbytes]


def _info(key: str, parameter: Any) -> TensorInfo:
    size = parameter.numel() * parameter.element_size()
    return TensorInfo(key, dtype_name(parameter.dtype), tuple(parameter.shape), MEMORY, 0, size)
