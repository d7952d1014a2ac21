"""The subspaces of a model's modules, and the file that keeps them beside an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..adapter import natural_key
from ..errors import SafeLoraError

if TYPE_CHECKING:
    import torch

SUBSPACE_FILE = "salora_subspace.safetensors"
REPORT_FILE = "salora_report.json"
METADATA_KEY = "salora"
Mode = Literal["packed", "residual", "plain"]
_FORMAT = "salora-subspace/1"
# Attribute → suffix of the tensors in the file.
_PARTS = {
    "bases": "safety_basis",
    "input_bases": "input_basis",
    "task_bases": "task_basis",
    "initial_A": "initial_A",
    "initial_B": "initial_B",
}
_NOT_ORTHONORMAL = 1e-4


@dataclass(frozen=True)
class Subspaces:
    """Orthonormal bases per module, by the module's name in the plain model (``model.layers.0.self_attn.q_proj``).

    Attributes:
        bases: U, fp32, d_out × k: what the update's outputs must stay out of.
        input_bases: V, fp32, d_in × k: what the update's inputs must stay out of (OPLoRA's second side).
        task_bases: U_t, fp32, d_out × r_t: where the task-aware initialisation puts B₀.
        details: per module the numbers of its calibration: rank asked for and kept, captured energy, rows.
        skipped: adapted modules that have no subspace, and why.
        provenance: model, data, options and versions the subspaces were made from.
        mode, initial_A, initial_B: how an adapter was initialised with them: A₀ (r × d_in) and C·B₀ (d_out × r).
    """

    bases: dict[str, torch.Tensor]
    task_bases: dict[str, torch.Tensor] = field(default_factory=dict)
    input_bases: dict[str, torch.Tensor] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    mode: Mode | None = None
    initial_A: dict[str, torch.Tensor] = field(default_factory=dict)
    initial_B: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        for part in ("bases", "input_bases", "task_bases"):
            for name, basis in getattr(self, part).items():
                if not isinstance(basis, torch.Tensor) or basis.ndim != 2 or basis.dtype != torch.float32:
                    found = (
                        f"{basis.dtype}, shape {list(basis.shape)}"
                        if isinstance(basis, torch.Tensor)
                        else type(basis).__name__
                    )
                    raise SafeLoraError(
                        f"{part} of {name}: expected a float32 matrix d × k, got {found}. A basis in bf16 leaks 1e-2 "
                        "into the subspace; keep it in float32."
                    )

    @property
    def modules(self) -> list[str]:
        """The names of all modules with a basis that constrains them, in natural order."""
        return sorted({*self.bases, *self.input_bases}, key=natural_key)

    def check(self) -> None:
        """Raise SafeLoraError unless every basis is finite and orthonormal to 1e-4."""
        import torch

        for part in ("bases", "input_bases", "task_bases"):
            for name, basis in getattr(self, part).items():
                gram = basis.double().t() @ basis.double()
                error = (
                    float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
                    if len(gram)
                    else 0.0
                )
                if not error <= _NOT_ORTHONORMAL:
                    raise SafeLoraError(
                        f"{part} of {name} is not orthonormal: an element of UᵀU − I is {error:.1e}, expected at most "
                        f"{_NOT_ORTHONORMAL:.0e}. Calibrate again."
                    )

    def to(self, device: Any) -> Subspaces:
        """The same on another device."""
        moved = {part: {name: value.to(device) for name, value in getattr(self, part).items()} for part in _PARTS}
        return replace(self, **moved)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """A SHA-256 over all tensors and their names."""
        import hashlib

        from ..adapter import tensor_bytes

        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``salora_subspace.safetensors`` (into `path` where that is a directory); returns its place.

        The file appears whole or not at all; equal subspaces give equal bytes.
        """
        from safetensors.torch import save

        place = Path(path)
        if place.is_dir():
            place = place / SUBSPACE_FILE
        if place.suffix != ".safetensors":
            raise SafeLoraError(f"{place}: subspaces are kept in a .safetensors file or in a directory.")
        if not place.parent.is_dir():
            raise SafeLoraError(f"cannot write {place}: its directory does not exist.")
        content = {
            "format": _FORMAT,
            "mode": self.mode,
            "details": self.details,
            "skipped": self.skipped,
            "provenance": self.provenance,
        }
        # safetensors writes several entries of metadata in any order.
        data = save(self._tensors(), {METADATA_KEY: json.dumps(content, sort_keys=True)})
        partial = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            partial.write_bytes(data)
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)
        return place

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subspaces:
        """Read what :meth:`save` wrote, from the file or its directory.

        Raises SafeLoraError when it is missing, something else, or holds a basis that is not orthonormal.
        """
        from safetensors import SafetensorError, safe_open

        place = Path(path)
        if place.is_dir():
            place = place / SUBSPACE_FILE
        if not place.is_file():
            raise SafeLoraError(f"there are no subspaces at {place}; make them with safelora calibrate.")
        try:
            with safe_open(place, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise SafeLoraError(f"{place} is not a safetensors file: {error}.") from error
        try:
            content = json.loads(metadata[METADATA_KEY])
            if content["format"] != _FORMAT:
                raise KeyError(content["format"])
            parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
            attributes = {suffix: part for part, suffix in _PARTS.items()}
            for key, tensor in tensors.items():
                name, _, suffix = key.rpartition(".")
                parts[attributes[suffix]][name] = tensor
            fields: dict[str, Any] = {key: content[key] for key in ("mode", "details", "skipped", "provenance")}
            found = cls(**{**parts, **fields})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise SafeLoraError(
                f"{place} does not hold SaLoRA subspaces of the form {_FORMAT} ({error}); it was written by another "
                "program or another version."
            ) from error
        found.check()
        return found

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, on the CPU, by its name in the file."""
        return {
            f"{name}.{suffix}": value.detach().cpu().contiguous()
            for part, suffix in _PARTS.items()
            for name, value in getattr(self, part).items()
        }

    def table(self) -> Any:
        """A rich table with one row per module."""
        from rich.table import Table

        title = f"{len(self.modules)} modules with a subspace, {len(self.skipped)} without"
        table = Table(title=title, title_justify="left")
        table.add_column("module", overflow="fold")
        for heading in ("safety rank", "energy", "task rank", "energy", "rows"):
            table.add_column(heading, justify="right")
        for name in self.modules:
            numbers: Mapping[str, Any] = self.details.get(name, {})
            cells = [name]
            for kind in ("safety", "task"):
                rank, energy = numbers.get(f"{kind}_rank"), numbers.get(f"{kind}_energy")
                cells += ["–" if rank is None else str(rank), "–" if energy is None else f"{energy:.4f}"]
            table.add_row(*cells, str(numbers.get("safety_rows", "–")))
        for name, reason in self.skipped.items():
            table.add_row(name, "skipped:", reason)
        return table
