"""The records that go into and come out of the projection functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

Normalize: TypeAlias = Literal["frobenius", "none"]
Side: TypeAlias = Literal["left", "right"]
Rule: TypeAlias = Literal["strict", "authors"]


class LayerFactors(NamedTuple):
    """One weight pair with the LoRA factors trained on it.

    ``aligned`` and ``base`` are ``(d_out, d_in)``, ``lora_B`` is ``(d_out, r)`` and ``lora_A`` is ``(r, d_in)``. Lists
    of ``lora_B`` and ``lora_A`` stand for several adapters over the same pair, which share the reads of the weights.
    """

    aligned: Tensor
    base: Tensor
    lora_B: Tensor | Sequence[Tensor]
    lora_A: Tensor | Sequence[Tensor | None] | None = None


class Projection(NamedTuple):
    """The result for one :class:`LayerFactors`.

    ``lora_B`` is the projected factor, ``v_norm`` is ``‖aligned − base‖_F`` as a 0-dim fp64 tensor and ``cosine`` is
    the cosine between the updates before and after as a 0-dim fp64 tensor, or None where no ``lora_A`` was given.
    ``lora_B`` and ``cosine`` are lists where the layer was given with lists.
    """

    lora_B: Tensor | list[Tensor]
    v_norm: Tensor
    cosine: Tensor | list[Tensor | None] | None


class SelectedProjection(NamedTuple):
    """The result of a projection of the selected layers alone.

    ``lora_B`` holds the final factors, one per layer or a list where the layer was given with lists: projected where
    selected, the given one elsewhere. ``v_norm`` is ``(layers,)`` fp64. ``cosine``, fp64, and ``selected``, bool, have
    one entry per adapter, layer by layer; the cosine is NaN where no ``lora_A`` was given.
    """

    lora_B: list[Tensor | list[Tensor]]
    v_norm: Tensor
    cosine: Tensor
    selected: Tensor
