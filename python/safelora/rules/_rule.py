"""What a rule is given, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..adapter import LoraModule
from ..errors import SafeLoraError

if TYPE_CHECKING:
    import torch


class Change(NamedTuple):
    """New factors of one module: lora_B (d_out × r), lora_A (r × d_in), None where it stays."""

    module: LoraModule
    lora_B: torch.Tensor | None = None
    lora_A: torch.Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """A way of changing an adapter. Sub-classes are frozen dataclasses, whose fields are options of the rule.

    name, title: for the command line, and for tables and pictures.
    parameter: what is swept; "modules" is a number of modules, and shared by all rules that sweep it.
    values: the values to sweep by default; not used for "modules".
    control: a crude way of weakening the adapter, with which the others are compared.
    draws: how many times to repeat each value with another draw.
    needs: what it cannot do without: "base", the model before alignment; "calibration", data for safety and task.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    parameter: ClassVar[str]
    values: ClassVar[tuple[float, ...]] = ()
    control: ClassVar[bool] = False
    draws: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(item.name for item in dataclasses.fields(cls))

    @property
    def label(self) -> str:
        """The title with the options that are not the default."""
        changed = self._changed()
        return f"{self.title} ({', '.join(changed)})" if changed else self.title

    @property
    def spec(self) -> str:
        """The name with the options that are not the default, as :func:`safelora.rules.make_rule` reads it."""
        return ":".join(filter(None, (self.name, ",".join(self._changed()))))

    def _changed(self) -> list[str]:
        return [
            f"{item.name}={getattr(self, item.name)}"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != item.default
        ]

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        """The modules that this value changes; the model holds its original factors meanwhile."""
        raise NotImplementedError

    def about(self, subject: Subject, value: float) -> dict[str, Any]:
        """What else is to be noted of the point, in plain JSON types."""
        return {}


@dataclass
class Subject:
    """An adapter on a live model, as rules see it.

    model, tokenizer: the PeftModel with the adapter active, as it was loaded.
    base: the model before alignment (directory, repository id or model in memory), or None.
    safety_data, task_data: calibration examples, or None: never those of the evaluation.
    seed: of whatever a rule draws. cache: for what a rule computes once for all its values.
    """

    model: Any
    tokenizer: Any = None
    base: Any = None
    safety_data: Any = None
    task_data: Any = None
    seed: int = 0
    cache: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from ..peft_model import chosen_adapter, inventory, unwrap

        _, peft_model = unwrap(self.model)
        self.adapter_name = chosen_adapter(peft_model, None)
        adapter, self.parameters, _ = inventory(peft_model, self.adapter_name, allow_projected=True)
        self.modules: list[LoraModule] = adapter.modules
        self._originals = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}

    @property
    def offers(self) -> frozenset[str]:
        """What rules may need and this subject has."""
        data = self.safety_data is not None and self.task_data is not None
        return frozenset(name for name, there in (("base", self.base is not None), ("calibration", data)) if there)

    def factors(self, module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
        """The original lora_B (d_out × r) and lora_A (r × d_in): views, not to be written to."""
        return module.factors(self._originals[module.lora_A.name], self._originals[module.lora_B.name])

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, computed on the first call with this key."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    @contextmanager
    def changed(self, changes: Iterable[Change]) -> Iterator[None]:
        """The model has these factors inside the context, and its former bits afterwards.

        Raises SafeLoraError for factors of another shape, or that are not finite in the adapter's dtype.
        """
        import torch

        new: dict[str, torch.Tensor] = {}
        for module, lora_B, lora_A in changes:
            for given, index, what in ((lora_B, 0, "lora_B"), (lora_A, 1, "lora_A")):
                if given is None:
                    continue
                pair = [module.lora_A.name, module.lora_B.name]
                for key in pair:
                    new.setdefault(key, self._originals[key].clone())
                place = module.factors(*(new[key] for key in pair))[index]
                if given.shape != place.shape:
                    raise SafeLoraError(
                        f"{module.name}: the rule gave {what} of shape {tuple(given.shape)}, expected "
                        f"{tuple(place.shape)}."
                    )
                place.copy_(given)
                if not bool(place.isfinite().all()):
                    raise SafeLoraError(f"{module.name}: the rule's {what} is not finite in {place.dtype}.")
        with torch.no_grad():
            for key, tensor in new.items():
                self.parameters[key].copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for key in new:
                    self.parameters[key].copy_(self._originals[key])


def lowest(ranking: Sequence[tuple[LoraModule, float]], count: float) -> list[LoraModule]:
    """The modules of the lowest cosines, as many as asked for, as `safelora project --num-layers` selects them."""
    import torch

    import safelora_kernels as sk

    cosines = torch.tensor([cosine for _, cosine in ranking], dtype=torch.float64)
    chosen = sk.select_layers(cosines, num_layers=min(round(count), len(ranking)), rule="strict")
    return [module for (module, _), take in zip(ranking, chosen.tolist(), strict=True) if take]
