"""Mixture-of-experts weights that are one parameter for all experts, as PEFT's target_parameters adapt them.

PEFT wraps the module that holds the parameter, once per parameter, the first registered innermost, and its keys tell
neither the parameter nor which factor lies on the output side. Both follow from shapes, else from the model's
code and PEFT's version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

from .adapter import Adapter, LoraModule
from .checkpoint import Checkpoint
from .conversion import Recipe, Replay, replay
from .errors import SafeLoraError
from .fp8 import stored
from .naming import WEIGHTS, replicated, stored_names
from .weights import Stored, WeightMatch

Sources = Callable[[int], tuple[tuple[Stored, ...], Recipe | None]]
_WRAPPER = ".base_layer"
_READ_HIDDEN = frozenset({"gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "v1", "input_linear", "fc1", "wi"})
_WRITE_HIDDEN = frozenset({"down_proj", "w2", "output_linear", "fc2", "wo"})
# Their experts are stored (in, out) without the attribute by which PEFT knows that.
_UNFLAGGED = ("llama4",)


class Stack(NamedTuple):
    """A parameter of shape (experts, d1, d2) in one checkpoint.

    sources: what has to be read for one expert, and how it is made of that. `transposed`: d1 is the input; `flagged`:
    the model's code says so by its attribute `is_transposed`.
    """

    name: str
    how: str
    shape: tuple[int, int, int]
    sources: Sources
    transposed: bool
    flagged: bool

    @property
    def d_out(self) -> int:
        return self.shape[2] if self.transposed else self.shape[1]

    @property
    def d_in(self) -> int:
        return self.shape[1] if self.transposed else self.shape[2]

    def expert(self, index: int) -> WeightMatch:
        """The weight of one expert."""
        sources, convert = self.sources(index)
        return WeightMatch(sources, self.how, self.transposed, convert)


class StackedModule(NamedTuple):
    """A wrapped parameter: the module it belongs to, its name there, and its place in the checkpoints."""

    module: LoraModule
    owner: str
    parameter: str
    stacks: tuple[Stack | None, ...]


def stacked_modules(adapter: Adapter, checkpoints: list[Checkpoint | None]) -> dict[str, StackedModule]:
    """The modules of `adapter` that adapt a 3-D parameter, by the name in their keys.

    Raises SafeLoraError when it cannot be told which parameter is meant or which of its dimensions is the output.
    """
    targets = adapter.config.get("target_parameters")
    if not targets:
        return {}
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise SafeLoraError(f"{adapter.root}: target_parameters is {targets!r:.80}, expected a list of names.")
    owners: dict[str, list[LoraModule]] = {}
    for module in adapter.modules:
        if module.kind == "linear":
            owners.setdefault(_owner(module.name), []).append(module)
    found = {}
    for owner, modules in owners.items():
        modules.sort(key=lambda module: module.name.count(_WRAPPER), reverse=True)  # innermost first
        for module, parameter, stacks in _assign(adapter, owner, modules, targets, checkpoints):
            found[module.name] = StackedModule(module, owner, parameter, stacks)
    return found


def experts_of(adapter: Adapter, stacked: dict[str, StackedModule]) -> dict[str, list[LoraModule]]:
    """For every stacked module its experts as modules of their own, each with its part of the factors."""
    sides = {name: _output_factor(entry) for name, entry in stacked.items()}
    seen = Counter(side for side in sides.values() if side is not None)
    result = {}
    for name, entry in stacked.items():
        swapped = sides[name]
        if swapped is None:
            swapped = next(iter(seen)) if len(seen) == 1 else _swapped_by_version(adapter, entry)
        experts = _stack(entry).shape[0]
        stem = f"{entry.owner}.{{}}" if entry.parameter == "weight" else f"{entry.owner}.{{}}.{entry.parameter}"
        result[name] = [
            entry.module._replace(
                name=stem.format(index), kind="expert", expert=index, experts=experts, swapped=swapped
            )
            for index in range(experts)
        ]
    return result


def find_stack(checkpoint: Checkpoint, owner: str, parameter: str) -> Stack | None:
    """The 3-D parameter of that name; None where there is none. Raises SafeLoraError when its layout is unknown."""
    located = _locate(checkpoint, owner, parameter)
    if located is not None and len(located[2]) == 2 and parameter not in WEIGHTS:
        raise SafeLoraError(
            f"{checkpoint.source}: {located[0]} has shape {list(located[2])}: a parameter of two dimensions that is "
            "not called weight (the stacked experts of dbrx are one). Which of them is the output cannot be told."
        )
    if located is None or len(located[2]) != 3:
        return None
    name, how, shape, sources = located
    transposed = _is_transposed(checkpoint, owner, name, shape)
    flagged = transposed and not str(checkpoint.config.get("model_type")).startswith(_UNFLAGGED)
    return Stack(name, how, (shape[0], shape[1], shape[2]), sources, transposed, flagged)


def _locate(checkpoint: Checkpoint, owner: str, parameter: str) -> tuple[str, str, tuple[int, ...], Sources] | None:
    """Name, how it was found, shape and sources of a parameter of all experts; None where there is none."""
    hits, how = stored_names(checkpoint).find(owner, (parameter,))
    if len(hits) == 1:
        source = stored(checkpoint, checkpoint.tensors[hits[0]])
        return hits[0], how, source.info.shape, lambda index: ((source.slab(index),), None)
    made = replay(checkpoint)
    if made is None:
        return None
    hits, _ = made.names.find(owner, (parameter,))
    if len(hits) != 1:
        return None
    found = made.parameters[hits[0]]
    return found.name, "converted", found.shape, partial(made.sources, found)


def _is_matrix(checkpoint: Checkpoint, module: str) -> bool:
    hits, _ = stored_names(checkpoint).find(module)
    return len(hits) == 1 and len(checkpoint.tensors[hits[0]].shape) < 3


def _owner(name: str) -> str:
    while name.endswith(_WRAPPER):
        name = name.removesuffix(_WRAPPER)
    return name


def _assign(
    adapter: Adapter, owner: str, modules: list[LoraModule], targets: list[str], checkpoints: list[Checkpoint | None]
) -> list[tuple[LoraModule, str, tuple[Stack | None, ...]]]:
    """Which parameter of `owner` each of its wrappers adapts."""
    place = replicated(owner, adapter.config.get("layer_replication"))
    if len(modules) == 1 and any(_is_matrix(checkpoint, place) for checkpoint in checkpoints if checkpoint):
        return []
    stacks: dict[str, tuple[Stack | None, ...]] = {}
    for parameter in dict.fromkeys(target.rpartition(".")[2] for target in targets):
        meant = any(f".{owner}.{parameter}".endswith(f".{target}") for target in targets)
        if meant:
            entries = tuple(
                find_stack(checkpoint, place, parameter) if checkpoint is not None else None
                for checkpoint in checkpoints
            )
            if any(entries):
                stacks[parameter] = entries
    if not stacks:
        if len(modules) > 1:
            raise SafeLoraError(
                f"{adapter.weights}: {owner} is wrapped {len(modules)} times, but no 3-D parameter among "
                f"{', '.join(targets[:4])} is found there in the checkpoints. transformers 5 or later has to be "
                "installed where a checkpoint stores the experts one by one."
            )
        return []
    fitting = [
        chosen
        for chosen in permutations(stacks, len(modules))
        if all(_fits(module, stacks[name]) for module, name in zip(modules, chosen, strict=True))
    ]
    if not fitting:
        raise SafeLoraError(
            f"{adapter.weights}: the factors of {owner} fit none of its parameters {', '.join(stacks)}: "
            + "; ".join(f"lora_A {list(m.lora_A.shape)}, lora_B {list(m.lora_B.shape)}" for m in modules)
            + "; "
            + ", ".join(f"{name} {list(_first(entry).shape)}" for name, entry in stacks.items())
            + "."
        )
    if len(fitting) > 1:
        order = _registered(place, checkpoints)
        fitting = [chosen for chosen in fitting if order and [p for p in order if p in chosen] == list(chosen)]
    if len(fitting) != 1:
        raise SafeLoraError(
            f"{adapter.weights}: {owner} has several parameters of one shape ({', '.join(stacks)}), and which of them "
            "an adapter factor belongs to depends on the model's code. Install transformers 5 or later."
        )
    return [(module, name, stacks[name]) for module, name in zip(modules, fitting[0], strict=True)]


def _fits(module: LoraModule, entries: tuple[Stack | None, ...]) -> bool:
    sides = Counter((module.lora_A.shape[1], module.lora_B.shape[0]))
    return all(
        Counter(stack.shape[1:]) == sides and module.lora_A.shape[0] % stack.shape[0] == 0
        for stack in entries
        if stack is not None
    )


def _registered(owner: str, checkpoints: list[Checkpoint | None]) -> list[str]:
    for checkpoint in checkpoints:
        made = replay(checkpoint) if checkpoint is not None else None
        module = _live_module(made, owner) if made is not None else None
        if made is not None and module is not None:
            return made.order(module)
    return []


def _live_module(made: Replay, owner: str) -> str | None:
    """The name that a module of the adapter has in the live model of the checkpoint."""
    for parameter in ("gate_up_proj", "down_proj", "up_proj", "gate_proj", "w1", "w2", "weight"):
        hits, _ = made.names.find(owner, (parameter,))
        if len(hits) == 1:
            return hits[0].rpartition(".")[0]
    return None


def _is_transposed(checkpoint: Checkpoint, owner: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether (experts, d_in, d_out) is stored: by the hidden size, which the parameter reads or writes, else by the
    other parameter of the same experts, which shares the order, else by the model's own flag."""
    parameter = name.rpartition(".")[2]
    known = _by_hidden_size(checkpoint, owner, parameter, shape)
    if known is not None:
        return known
    for other in sorted(_READ_HIDDEN | _WRITE_HIDDEN):
        beside = (f"{owner.rpartition('.')[0]}.{other}", "weight") if parameter == "weight" else (owner, other)
        located = _locate(checkpoint, *beside)
        if located is not None and len(located[2]) == 3:
            known = _by_hidden_size(checkpoint, *beside, located[2])
            if known is not None:
                return known
    made = replay(checkpoint)
    module = _live_module(made, owner) if made is not None else None
    if made is not None and module is not None:
        flag = getattr(made.model.get_submodule(module), "is_transposed", None)
        if flag is not None and not str(checkpoint.config.get("model_type")).startswith(_UNFLAGGED):
            return bool(flag)
    raise SafeLoraError(
        f"{checkpoint.source}: which dimension of {name} (shape {list(shape)}) is the output cannot be told from its "
        "shape, and no installed transformers knows the model."
    )


def _by_hidden_size(checkpoint: Checkpoint, owner: str, parameter: str, shape: tuple[int, ...]) -> bool | None:
    role = owner.rpartition(".")[2] if parameter == "weight" else parameter
    hidden = _hidden_size(checkpoint.config)
    if hidden is None or (shape[1] == hidden) == (shape[2] == hidden):
        return None
    if role in _READ_HIDDEN:
        return shape[1] == hidden
    if role in _WRITE_HIDDEN:
        return shape[2] == hidden
    return None


def _hidden_size(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    for settings in (text if isinstance(text, dict) else {}, config):
        for key in ("hidden_size", "d_model", "n_embd", "dim"):
            if isinstance(settings.get(key), int):
                return settings[key]
    return None


def _first(entries: tuple[Stack | None, ...]) -> Stack:
    return next(stack for stack in entries if stack is not None)


def _stack(entry: StackedModule) -> Stack:
    return _first(entry.stacks)


def _output_factor(entry: StackedModule) -> bool | None:
    """Whether lora_A lies on the output side; None when the shapes allow both."""
    stack = _stack(entry)
    if stack.d_in == stack.d_out:
        return None
    return entry.module.lora_A.shape[1] == stack.d_out


def _swapped_by_version(adapter: Adapter, entry: StackedModule) -> bool:
    """PEFT up to 0.18 put lora_A on dimension 1; 0.19.0 on dimension 2 of models that flag themselves as stored
    (in, out), and on 1 of others; since 0.19.1 it is the reverse. The version is recorded since 0.18."""
    stack = _stack(entry)
    text = str(adapter.config.get("peft_version") or "0.17")
    version = tuple(int(part) for part in text.split("@")[0].split(".")[:3] if part.isdecimal())
    on_first = stack.flagged if version >= (0, 19, 1) else not stack.flagged if version >= (0, 19) else True
    return on_first != stack.transposed
