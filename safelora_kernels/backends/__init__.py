"""Which implementations exist on this machine, which one a call takes, and why not another.

Without a request the PyTorch dispatcher chooses by the device of the tensors: CUDA kernels, Triton's where those are
not loaded, native CPU kernels, else the reference. ``backend=`` on a call, or ``SAFELORA_BACKEND`` for the whole
process (read at import), asks for one by name; a request that cannot be met raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schemas import SCHEMAS
from . import cpu, cuda, reference, triton

OPS: dict[str, Callable[..., Any]] = {name: getattr(torch.ops.safelora, name).default for name in SCHEMAS}
FORCED: str | None = os.environ.get("SAFELORA_BACKEND") or None


class BackendStatus(NamedTuple):
    """Whether a backend can run here, and the reason: what it is, or what is missing and how to get it."""

    available: bool
    reason: str


class Explanation(NamedTuple):
    """The backend a call takes, and for every other one why it was not taken."""

    op: str
    backend: str | None
    reason: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend'} ({self.reason})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.rejected.items()])


def _always(op: str, tensors: Sequence[Tensor], out_dtype: torch.dtype | None) -> str:
    return ""


@dataclass(frozen=True)
class _Backend:
    """``status`` may ask for devices, so it is called when it matters and not at import."""

    status: Callable[[], tuple[bool, str]]
    device: Callable[[], str | None]
    launchers: Mapping[str, Callable[..., Any]]
    unsupported: Callable[[str, Sequence[Tensor], torch.dtype | None], str] = _always
    on_request: Callable[[], str] = str

    def refusal(self, op: str, tensors: Sequence[Tensor], out_dtype: torch.dtype | None, asked: bool) -> str:
        """Why this backend cannot take the call; empty if it can."""
        available, reason = self.status()
        if not available:
            return reason
        if op not in self.launchers:
            return f"it has no kernel for {op}"
        device = self.device()
        if device is not None:
            for tensor in tensors:
                if tensor.device.type != device:
                    return f"it runs on {device} tensors, found one on {tensor.device}"
        return self.unsupported(op, tensors, out_dtype) or ("" if asked else self.on_request())


def _on(device: str) -> Callable[[], str]:
    return lambda: device


def _by_dispatch(implemented: Iterable[str]) -> dict[str, Callable[..., Any]]:
    return {op: OPS[op] for op in implemented}


_CPU_OPS = cpu.implemented(SCHEMAS)
_CUDA_OPS = cuda.implemented(SCHEMAS)
triton.register()

# In the order of preference, which is the order in which the dispatcher looks.
_REGISTRY = {
    "cuda": _Backend(lambda: cuda.STATUS, _on("cuda"), _by_dispatch(_CUDA_OPS)),
    "triton": _Backend(triton.status, triton.device, triton.LAUNCHERS, triton.unsupported, triton.on_request),
    "cpu": _Backend(
        lambda: cpu.STATUS,
        _on("cpu"),
        _by_dispatch([*_CPU_OPS, *(reference.COMPOSED if _CPU_OPS else ())]),
    ),
    "reference": _Backend(lambda: (True, "plain torch, any device"), lambda: None, reference.LAUNCHERS),
}


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with whether it can run here and why."""
    return {name: BackendStatus(*backend.status()) for name, backend in _REGISTRY.items()}


def _requested(backend: str | None) -> tuple[str, str]:
    """The backend asked for and by what; an empty name leaves the choice to the dispatcher."""
    name = backend if backend is not None else FORCED
    if name is None:
        return "", ""
    origin = f"SAFELORA_BACKEND={FORCED}" if backend is None else f"backend={backend!r}"
    if name not in _REGISTRY:
        known = ", ".join(_REGISTRY)
        raise ValueError(f"{origin} names no backend: use one of {known}, or leave it out to choose by device")
    return name, origin


def launcher(
    op: str, tensors: Sequence[Tensor], backend: str | None, out_dtype: torch.dtype | None = None
) -> Callable[..., Any]:
    """The callable with the operator's schema that serves this call.

    Raises ValueError for an unknown backend, and RuntimeError where the one asked for cannot take the call.
    """
    name, origin = _requested(backend)
    if not name:
        return OPS[op]
    chosen = _REGISTRY[name]
    refusal = chosen.refusal(op, tensors, out_dtype, asked=True)
    if refusal:
        raise RuntimeError(
            f"{origin} cannot run {op}: {refusal}. Leave the backend out to fall back to one that can "
            "(sk.backends() lists them)"
        )
    return chosen.launchers[op]


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors_in(value))
    return found


# The one-layer functions are the batch of one.
_ALIASES = {
    "project_lowrank": "project_layers",
    "project_out": "project_out_layers",
    "gram_apply": "gram_apply_layers",
}


def explain(op_name: str, *args: Any, backend: str | None = None, **options: Any) -> Explanation:
    """Which backend a call takes, and why each other one is not taken.

    ``op_name`` is the name of a public function or operator; ``args`` and ``options`` are those of the call. Nothing
    runs. A request that cannot be met gives ``backend=None`` with the reason, where the call itself would raise
    RuntimeError. Raises ValueError for an unknown operator or backend name.
    """
    op = _ALIASES.get(op_name, op_name)
    if op not in SCHEMAS:
        known = ", ".join(sorted({*SCHEMAS, *_ALIASES}))
        raise ValueError(f"no operator is called {op_name!r}: use one of {known}")
    tensors = _tensors_in([*args, *options.values()])
    out_dtype = next((value for value in (*args, *options.values()) if isinstance(value, torch.dtype)), None)
    name, origin = _requested(backend)
    refusals = {key: entry.refusal(op, tensors, out_dtype, asked=key == name) for key, entry in _REGISTRY.items()}
    if name:
        rejected = {key: reason or f"{origin} asks for {name}" for key, reason in refusals.items() if key != name}
        if refusals[name]:
            return Explanation(op_name, None, f"{origin} cannot run: {refusals[name]}", rejected)
        return Explanation(op_name, name, f"asked for by {origin}", rejected)
    taken = next(key for key, reason in refusals.items() if not reason)
    rejected = {key: reason or f"{taken} comes first" for key, reason in refusals.items() if key != taken}
    return Explanation(op_name, taken, _REGISTRY[taken].status()[1], rejected)
