"""Fused linear modules taken apart by rows: q, k and v, or gate and up, each with its own V, cosine and decision.

As one module, V Vᵀ mixes their outputs, and they are projected together or not at all. Split, the result is that of an
adapter on separate modules which share lora_A.
"""

from __future__ import annotations

from typing import Any

from .adapter import LoraModule
from .checkpoint import Checkpoint
from .errors import SafeLoraError
from .mapping import PlannedModule
from .weights import Stored, WeightMatch

_QKV = ("qkv_proj", "W_pack")
_GATE_UP = ("gate_up_proj",)
_BY_HEAD = ("query_key_value", "c_attn", "Wqkv", "qkv")


def split_fused(plan: list[PlannedModule], model: Checkpoint) -> list[PlannedModule]:
    """The plan with every fused linear module replaced by its parts, `name`.q, .k, .v or .gate, .up.

    Raises SafeLoraError where there is no such module, or where the rows of the parts are not contiguous (GPT-NeoX and
    others interleave them by head), unknown, or stored in another form.
    """
    result, found = [], False
    for planned in plan:
        parts = _parts(planned, model)
        found |= len(parts) > 1
        result += parts
    if not found:
        raise SafeLoraError(
            f"there is nothing to split: no module of the adapter is called {', '.join((*_QKV, *_GATE_UP))}."
        )
    return result


def _parts(planned: PlannedModule, model: Checkpoint) -> list[PlannedModule]:
    module = planned.module
    if not isinstance(module, LoraModule) or module.kind != "linear" or planned.base is None or planned.aligned is None:
        return [planned]
    leaf = module.name.rpartition(".")[2]
    if leaf in _BY_HEAD:
        raise SafeLoraError(
            f"{module.name} cannot be split by rows: models that call it {leaf} interleave query, key and value by "
            "head, or store them in columns. Leave it whole."
        )
    if leaf in _QKV:
        sizes = dict(zip("qkv", _qkv_rows(model.config, module), strict=True))
    elif leaf in _GATE_UP and module.d_out % 2 == 0:
        sizes = dict.fromkeys(("gate", "up"), module.d_out // 2)
    else:
        return [planned]
    parts, start = [], 0
    for name, size in sizes.items():
        rows = (start, start + size)
        part = module._replace(name=f"{module.name}.{name}", kind="part", rows=rows)
        matches = [_rows_of(match, rows) for match in (planned.base, planned.aligned)]
        parts.append(PlannedModule(part, matches[0], matches[1]))
        start += size
    return parts


def _qkv_rows(config: dict[str, Any], module: LoraModule) -> tuple[int, int, int]:
    text = config.get("text_config")
    settings = {**config, **(text if isinstance(text, dict) else {})}
    heads = settings.get("num_attention_heads")
    if isinstance(heads, int) and heads > 0:
        groups = settings.get("num_key_value_heads") or heads
        size = settings.get("head_dim") or settings.get("hidden_size", 0) // heads
        rows = (heads * size, groups * size, groups * size)
        if sum(rows) == module.d_out:
            return rows
    raise SafeLoraError(
        f"{module.name} has {module.d_out} rows, which the heads in the model's config.json do not divide into query, "
        "key and value. Leave it whole."
    )


def _rows_of(match: WeightMatch, rows: tuple[int, int]) -> WeightMatch:
    """Rows [start, stop) of a weight: a contiguous part of what is stored."""
    if not match.dense or match.transposed:
        raise SafeLoraError(f"{match.info.name} cannot be split by rows: it is converted, quantised or transposed.")
    info = match.info
    size = info.nbytes // info.shape[0]
    begin, end = (info.begin + row * size for row in rows)
    part = info._replace(shape=(rows[1] - rows[0], *info.shape[1:]), begin=begin, end=end)
    return WeightMatch((Stored(part),), match.how, False)
