"""Adapters of MLX and torchtune as PEFT adapter directories."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import COMPANIONS, CONFIG_FILE, MLX_FILE, WEIGHTS_FILE, load_pickle, natural_key
from .checkpoint import read_header, read_json
from .errors import SafeLoraError
from .output import StagedDirectory

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_TORCHTUNE_FILES = ("adapter_model.pt", "adapter_*.pt")
_TORCHTUNE = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_TORCHTUNE_MODELS = ("llama", "mistral")


def convert_adapter(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
) -> str:
    """Write an adapter that MLX-LM or torchtune saved as a PEFT adapter directory, with the same update.

    MLX keeps A and B transposed (`lora_a` d_in × r, `lora_b` r × d_out) and a `scale` s, so that lora_alpha = s·r.
    torchtune names modules otherwise and orders the rows of q_proj and k_proj by interleaved rotary pairs, where
    transformers has halves.

    Args:
        source: the directory, with `adapters.safetensors` (MLX) or `adapter_*.pt` (torchtune).
        out: directory to create.
        model: the model it was trained on, recorded as base_model_name_or_path. For torchtune a local directory, whose
            config.json tells the heads.

    Returns:
        The format that was found: "mlx" or "torchtune".

    Raises:
        SafeLoraError: for anything else than a plain LoRA adapter in one of the two formats, or where `out` is taken.
    """
    root, target = Path(source).expanduser(), Path(out).expanduser()
    if not root.is_dir():
        raise SafeLoraError(f"{root} is not a directory.")
    if target.exists() and (not target.is_dir() or os.listdir(target)):
        raise SafeLoraError(f"the output {target} exists and is not an empty directory.")
    config, _ = read_json(root / CONFIG_FILE, "the adapter configuration")
    if (root / MLX_FILE).exists():
        kind, (tensors, settings) = "mlx", _from_mlx(root, config)
    else:
        file = next((path for pattern in _TORCHTUNE_FILES for path in sorted(root.glob(pattern))), None)
        if file is None:
            raise SafeLoraError(
                f"{root} has neither {MLX_FILE} (MLX) nor adapter_*.pt (torchtune). A PEFT adapter needs no conversion."
            )
        kind, (tensors, settings) = "torchtune", _from_torchtune(file, config, model)
    if model is not None:
        settings["base_model_name_or_path"] = os.fspath(model)
    _write(root, target, tensors, settings)
    return kind


def _from_mlx(root: Path, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from .stream import map_range, to_tensor

    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise SafeLoraError(f"{root}: fine_tune_type is {kind!r}; only plain LoRA (update s·B·A) can be converted.")
    parameters = config.get("lora_parameters")
    header = read_header(root / MLX_FILE)
    tensors = {}
    ranks = set()
    for name, info in header.tensors.items():
        module, _, factor = name.rpartition(".")
        if factor not in ("lora_a", "lora_b"):
            raise SafeLoraError(f"{header.path}: tensor {name} is no factor of a plain LoRA adapter.")
        tensor = to_tensor(map_range(info), info)
        if tensor.ndim != 2 or ".switch_mlp." in f".{module}.":
            raise SafeLoraError(
                f"{header.path}: {name} has shape {list(info.shape)}: adapters of MLX's stacked experts are not "
                "converted. Train the attention layers alone, or use PEFT for the experts."
            )
        tensors[_peft_key(module, factor)] = tensor.t().contiguous()
        ranks.add(info.shape[1] if factor == "lora_a" else info.shape[0])
    if len(ranks) != 1:
        raise SafeLoraError(f"{header.path}: the factors have ranks {sorted(ranks)}, expected one.")
    rank = ranks.pop()
    if not isinstance(parameters, dict) or not isinstance(parameters.get("scale"), (int, float)):
        raise SafeLoraError(f"{root / CONFIG_FILE}: lora_parameters has no scale, which is part of the update.")
    scale = float(parameters["scale"])
    if isinstance(parameters.get("alpha"), (int, float)):  # earlier releases divided by the rank, as PEFT does
        scale *= parameters["alpha"] / rank
    return tensors, {"r": rank, "lora_alpha": scale * rank, "base_model_name_or_path": config.get("model")}


def _from_torchtune(
    file: Path, config: dict[str, Any], model: str | os.PathLike[str] | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise SafeLoraError(f"{file.parent / CONFIG_FILE} does not give r and lora_alpha.")
    if model is None:
        raise SafeLoraError("torchtune orders the rows of q_proj and k_proj by heads: give the model (--model DIR).")
    settings, _ = read_json(Path(model).expanduser() / "config.json", "the model configuration")
    if settings.get("model_type") not in _TORCHTUNE_MODELS:
        raise SafeLoraError(
            f"{model} is a {settings.get('model_type')} model; only the row order of {' and '.join(_TORCHTUNE_MODELS)} "
            "is known. Use the PEFT adapter that torchtune writes beside its own."
        )
    heads = int(settings["num_attention_heads"])
    counts = {"q_proj": heads, "k_proj": int(settings.get("num_key_value_heads") or heads)}
    tensors = {}
    for name, tensor in load_pickle(file).items():
        found = re.fullmatch(r"(?:layers\.(\d+)\.)?([\w.]+)\.(lora_a|lora_b|magnitude)(?:\.weight)?", name)
        if found is None or found[3] == "magnitude":
            raise SafeLoraError(
                f"{file}: tensor {name} is no factor of a plain LoRA adapter (DoRA cannot be converted)."
            )
        place = _TORCHTUNE.get(found[2]) if found[1] else {"output": "lm_head"}.get(found[2])
        if place is None:
            raise SafeLoraError(f"{file}: module {found[2]} of tensor {name} is not known.")
        leaf = place.rpartition(".")[2]
        if found[3] == "lora_b" and leaf in counts:
            if tensor.shape[0] % (2 * counts[leaf]):
                raise SafeLoraError(
                    f"{file}: {name} has {tensor.shape[0]} rows, which {counts[leaf]} heads do not divide."
                )
            tensor = tensor.reshape(counts[leaf], -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        module = f"model.layers.{found[1]}.{place}" if found[1] else place
        tensors[_peft_key(module, found[3])] = tensor.contiguous()
    return tensors, {"r": rank, "lora_alpha": alpha, "base_model_name_or_path": config.get("base_model_name_or_path")}


def _peft_key(module: str, factor: str) -> str:
    letter = factor[-1].upper()
    if module.endswith(("embed_tokens", "wte")):
        return f"{_PREFIX}{module}.lora_embedding_{letter}"
    return f"{_PREFIX}{module}.lora_{letter}.weight"


def _write(root: Path, target: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    modules = {re.split(r"\.lora_", name)[0].removeprefix(_PREFIX) for name in tensors}
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": False, "target_modules": sorted(modules, key=natural_key), **settings,
    }  # fmt: skip
    with StagedDirectory(target.resolve()) as staged, staged.writing():
        staged.copy_companions(root, COMPANIONS)
        save_file(tensors, staged.path / WEIGHTS_FILE, {"format": "pt"})
        (staged.path / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        staged.publish()
