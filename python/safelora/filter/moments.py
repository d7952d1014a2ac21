"""What the adapted layers see: the inputs of every LoRA layer at calibration tokens, weighted, as second moments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SafeLoraError
from ..peft_model import flags_kept
from .calibration import Batch, CalibrationSet
from .solve import Gram, Moments, Rows

if TYPE_CHECKING:
    import torch

    from ..adapter import LoraModule

Weight = Literal["grad", "none"]
SIDES = ("safety", "task")


@dataclass
class InputGroup:
    """Modules that receive the very same tensor, such as the query, key and value projections of a layer.

    `modules` name them in the order in which they run. With gradient weights their moments differ, their rows do not.
    """

    modules: list[str]
    dim: int
    itemsize: int
    sampled: bool = False

    def distinct(self, weight: Weight) -> int:
        """How many different moments the group has."""
        return len(self.modules) if weight == "grad" else 1

    def source(self, module: str, weight: Weight) -> str:
        """The module under whose name the moments of `module` are kept."""
        return module if weight == "grad" else self.modules[0]


@dataclass(frozen=True)
class Layers:
    """The LoRA layers of one adapter that can be filtered, and why the others cannot."""

    model: Any
    adapter: str
    by_name: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)


def plain_layers(model: Any, adapter: str, modules: Sequence[LoraModule], layers: dict[str, Any]) -> Layers:
    """Sort the adapter's modules: `layers` maps the name of each lora_B to its LoRA layer."""
    import torch

    found, skipped = {}, {}
    for module in modules:
        layer = layers[module.lora_B.name]
        inner = layer.lora_A[adapter] if adapter in getattr(layer, "lora_A", ()) else None
        if module.kind == "embedding":
            skipped[module.name] = "the input of an embedding is a token, not a vector"
        elif module.kind == "conv":
            skipped[module.name] = "the input of a convolution is an image or a signal, not one vector per token"
        elif module.kind == "expert" or hasattr(layer, "parameter_name"):
            skipped[module.name] = "it adapts the weights of experts, which do not see every token"
        elif type(inner) is not torch.nn.Linear:
            skipped[module.name] = f"its lora_A is a {type(inner).__name__}, not a linear layer"
        elif getattr(layer, "lora_variant", {}).get(adapter):
            variant = type(layer.lora_variant[adapter]).__name__
            skipped[module.name] = f"its update is computed by {variant}, not from lora_A alone"
        else:
            found[module.name] = layer
    return Layers(model, adapter, found, skipped)


@contextmanager
def calibrating(layers: Layers) -> Iterator[None]:
    """The model in evaluation mode with no trainable parameter and only this adapter active; as it was afterwards."""
    model = layers.model
    active = list(model.active_adapters)
    with flags_kept(model):
        try:
            if active != [layers.adapter]:
                model.set_adapter(layers.adapter)
            model.eval()
            for module in model.modules():
                if type(module).__name__ == "Linear4bit":
                    # In evaluation mode bitsandbytes repacks 4-bit weights on CPUs for a kernel that passes no gradient
                    # on. Asking for the state unpacks them.
                    module.train()
                    module.state_dict()
            model.requires_grad_(False)
            yield
        finally:
            if active != [layers.adapter]:
                model.set_adapter(active[0]) if len(active) == 1 else model.base_model.set_adapter(active)


def probe(layers: Layers, batch: Batch) -> tuple[list[InputGroup], dict[str, str]]:
    """Which layers share their input, from one short forward pass; and the reasons to skip the rest."""
    seen: list[tuple[str, Any]] = []
    with ExitStack() as stack:
        for name, layer in layers.by_name.items():
            hook = layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.append((name, _input(args, kwargs))), with_kwargs=True
            )
            stack.callback(hook.remove)
        row = int(batch.attention_mask[0].sum())
        rows = batch.attention_mask[0].bool().nonzero()[: min(row, 8), 0]
        _forward(layers.model, batch.input_ids[:1, rows], batch.attention_mask[:1, rows], keep_logits=None)
    skipped: dict[str, str] = {}
    groups: dict[int, InputGroup] = {}
    times: dict[str, int] = {}
    for name, x in seen:
        times[name] = times.get(name, 0) + 1
        if x is None or _tokens_first(x, (1, len(rows))) is None:
            shape = "none" if x is None else str(list(x.shape))
            skipped[name] = f"its input has shape {shape}, not one vector per token"
        else:
            groups.setdefault(id(x), InputGroup([], int(x.shape[-1]), x.element_size())).modules.append(name)
    for name in layers.by_name:
        if name not in times:
            skipped[name] = "a forward pass does not reach it"
        elif times[name] > 1 and name not in skipped:
            skipped[name] = f"a forward pass runs it {times[name]} times"
    for group in groups.values():
        group.modules = [name for name in group.modules if name not in skipped]
    return [group for group in groups.values() if group.modules], skipped


class Collector:
    """Moments of some groups, from passes over both sets.

    rows: keep the tokens (for the dual and for conjugate gradients) instead of multiplying them out.
    """

    def __init__(self, layers: Layers, groups: Sequence[InputGroup], weight: Weight, clip: float, rows: bool) -> None:
        self._layers, self._groups, self._weight, self._clip, self._rows = layers, groups, weight, clip, rows
        self._leader = {name: group.modules[0] for group in groups for name in group.modules}
        self._sampled = {name for group in groups if group.sampled for name in group.modules}
        self._grams: dict[tuple[str, str, int], torch.Tensor] = {}
        self._tokens: dict[tuple[str, str], list[torch.Tensor]] = {}
        self._weights: dict[tuple[str, str], list[torch.Tensor]] = {}
        self._folds: dict[tuple[str, str], list[torch.Tensor]] = {}
        self._totals = dict.fromkeys(SIDES, 0.0)
        # Such a head must see every token, not only those whose logits are needed.
        self._adapted_head = layers.model.get_output_embeddings() in layers.by_name.values()

    def collect(
        self, calibration: CalibrationSet, gates: Sequence[float], enabled: bool, progress: Callable[[int], None]
    ) -> None:
        """Run the model over one set; `enabled` says whether the adapter is switched on (weight="none")."""
        side = calibration.name
        self._totals[side] = float(calibration.examples if self._weight == "grad" else calibration.tokens)
        for gate in gates if self._weight == "grad" else (1.0,):
            for batch in calibration.batches:
                if self._weight == "grad":
                    self._backward(side, batch, gate)
                else:
                    self._forward_only(side, batch, enabled)
                progress(int(batch.attention_mask.sum()))

    def moments(self, module: str, side: str, fold: int | None = None) -> Moments:
        """F of one module and side, per example (gradients) or per token. fold 0 or 1: of that part of a sample."""
        source = module if self._weight == "grad" else self._leader[module]
        total = self._totals[side]
        if self._rows:
            import torch

            leader = self._leader[module]
            parts = self._tokens[leader, side]
            parts[:] = [torch.cat(parts)] if len(parts) > 1 else parts
            x = parts[0]
            weights = torch.cat(self._weights[source, side]) / total
            if fold is None:
                return Rows(x, weights)
            chosen = torch.cat(self._folds[leader, side]) == bool(fold)
            return Rows(x[chosen], weights[chosen])
        if fold is not None:
            return Gram(self._grams[source, side, fold] / total)
        grams = [self._grams[key] for key in ((source, side, 0), (source, side, 1)) if key in self._grams]
        return Gram(sum(grams[1:], grams[0]) / total)

    def _forward_only(self, side: str, batch: Batch, enabled: bool) -> None:
        import torch

        leaders = {self._leader[group.modules[0]] for group in self._groups}
        with ExitStack() as stack:
            for name in leaders:
                layer = self._layers.by_name[name]
                hook = layer.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self._add(side, name, batch, _input(args, kwargs), None),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
            if not enabled:
                stack.enter_context(self._layers.model.disable_adapter())
            stack.enter_context(torch.no_grad())
            keep = None if self._adapted_head else 1
            _forward(self._layers.model, batch.input_ids, batch.attention_mask, keep_logits=keep)

    def _backward(self, side: str, batch: Batch, gate: float) -> None:
        """One backward pass: the gradient of the gated h = gate·A x is s·Bᵀδ, r numbers a token."""
        import torch

        labels = batch.labels[:, 1:]
        counted = labels != -100
        first = int(counted.any(0).nonzero()[0, 0]) if bool(counted.any()) else -1
        if first < 0:
            return
        inputs: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for name in self._layers.by_name:
                layer = self._layers.by_name[name]
                wanted = name in self._leader

                def remember(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                    inputs[name] = _input(args, kwargs).detach()

                def gated(_: Any, args: Any, h: torch.Tensor, name: str = name, wanted: bool = wanted) -> torch.Tensor:
                    h = h * gate
                    if not h.requires_grad:
                        h.requires_grad_()
                    if wanted:
                        x = inputs.pop(name)
                        h.register_hook(lambda grad: self._add(side, name, batch, x, grad))
                    return h

                if wanted:
                    stack.callback(layer.register_forward_pre_hook(remember, with_kwargs=True).remove)
                stack.callback(layer.lora_A[self._layers.adapter].register_forward_hook(gated).remove)
            stack.enter_context(torch.enable_grad())
            length = batch.input_ids.shape[1] - first
            keep = None if self._adapted_head else length
            logits = _forward(self._layers.model, batch.input_ids, batch.attention_mask, keep_logits=keep)
            counted, labels = counted[:, first:].to(logits.device), labels[:, first:].to(logits.device)
            kept = logits[:, -length:-1][counted].float()
            torch.nn.functional.cross_entropy(kept, labels[counted], reduction="sum").backward()

    def _add(self, side: str, name: str, batch: Batch, x: Any, grad: torch.Tensor | None) -> None:
        """One layer's tokens of one batch."""
        import torch

        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            keep = batch.keep.to(x.device)
            shape = (keep.shape[0], keep.shape[1])
            x = _tokens_first(x, shape)
            if x is None:
                raise SafeLoraError(f"module {name}: its input changed its shape between batches; leave it out.")
            wide = torch.promote_types(x.dtype, torch.float32)
            norms = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
            typical = norms.masked_fill(~keep, torch.nan).nanmedian(1, keepdim=True).values
            # Tokens that attract attention (sinks) are tens of times longer and would be most of the moment.
            weights = (self._clip * typical / norms.clamp_min(1e-30)).clamp(max=1.0).square()
            if grad is not None:
                weights = weights * grad.reshape(*shape, -1).to(wide).square().sum(-1)
            self._store(side, name, x[keep], weights[keep], batch.fold.to(x.device)[:, None].expand_as(keep)[keep])

    def _store(self, side: str, name: str, x: torch.Tensor, weights: torch.Tensor, fold: torch.Tensor) -> None:
        if self._rows:
            if name == self._leader[name]:
                self._tokens.setdefault((name, side), []).append(x)
                self._folds.setdefault((name, side), []).append(fold)
            self._weights.setdefault((name, side), []).append(weights)
            return
        import safelora_kernels as sk

        for part in (0, 1) if name in self._sampled else (0,):
            chosen = slice(None) if name not in self._sampled else fold == bool(part)
            moment = sk.gram(x[chosen], weights[chosen])
            key = (name, side, part)
            if key in self._grams:
                self._grams[key] += moment
            else:
                self._grams[key] = moment


def _input(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    import torch

    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


def _tokens_first(x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """x as batch × tokens × d, or None where it is not that."""
    if x.ndim == 3 and tuple(x.shape[:2]) == shape:
        return x
    if x.ndim == 2 and x.shape[0] == shape[0] * shape[1]:
        return x.reshape(*shape, -1)
    return None


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor, keep_logits: int | None) -> torch.Tensor:
    inner = model.get_base_model()
    known = inspect.signature(inner.forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in known:
        options["use_cache"] = False
    if keep_logits is not None and "logits_to_keep" in known:
        options["logits_to_keep"] = keep_logits
    device = model.get_input_embeddings().weight.device
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        if head is not None:
            # For a strided input and a frozen weight torch makes a copy of the head for every example.
            hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
            stack.callback(hook.remove)
        output = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits
