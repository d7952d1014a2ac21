"""Reading, changing and writing PEFT adapters, and running ``safelora project`` on them."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from safelora import SafeLoraReport


def save_adapter(model: Any, directory: Path) -> None:
    """Write the trained factors in bf16 as a plain PEFT adapter whose bytes depend on nothing but the factors."""
    from peft import get_peft_model_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in sorted(factors.items())}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    config["target_modules"] = sorted(config["target_modules"])
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


class LiveAdapter:
    """An adapter loaded on a bf16 model, whose lora_B can be swapped without loading the model again."""

    def __init__(self, base_model: Any, directory: Path) -> None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(base_model, directory, autocast_adapter_dtype=False)
        self.model = model.get_base_model().eval()
        # With a frozen head, torch multiplies the last token of every prompt by a copy of the head of its own: 2 GB.
        self.model.lm_head.requires_grad_(True)
        self._layers = {
            name: layer for name, layer in self.model.named_modules() if hasattr(layer, "lora_B") and len(layer.lora_B)
        }
        self.lora_B = {name: self._weight(name).detach().clone() for name in self._layers}

    def _weight(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self._layers[name].lora_B["default"].weight
        return weight

    @contextmanager
    def using(self, lora_B: Mapping[str, torch.Tensor]) -> Iterator[Any]:
        """The model with other lora_B (d_out, r) for the named modules; the loaded ones are back afterwards."""
        self._set(self.lora_B | dict(lora_B))
        try:
            yield self.model
        finally:
            self._set(self.lora_B)

    @torch.no_grad()
    def _set(self, lora_B: Mapping[str, torch.Tensor]) -> None:
        for name, value in lora_B.items():
            self._weight(name).copy_(value)

    def deleted(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Zeros for the named modules."""
        return {name: torch.zeros_like(self.lora_B[name]) for name in names}

    def scaled(self, factor: float) -> dict[str, torch.Tensor]:
        """Every lora_B times ``factor``."""
        return {name: value * factor for name, value in self.lora_B.items()}

    def random_names(self, count: int, seed: int) -> list[str]:
        """``count`` modules drawn without replacement; the same ones for the same seed."""
        return random.Random(seed).sample(sorted(self.lora_B), count)


@dataclass(frozen=True)
class ProjectCommand:
    """One call of ``safelora project``."""

    adapter: Path
    base: Path
    aligned: Path
    out: Path
    num_layers: int

    def words(self) -> list[str]:
        """The command line as a user would type it."""
        return [
            *("safelora", "project", str(self.adapter), "--base", str(self.base), "--aligned", str(self.aligned)),
            *("--out", str(self.out), "--num-layers", str(self.num_layers)),
        ]

    def run(self) -> SafeLoraReport:
        """Run it in a process of its own, after removing an earlier result.

        Raises subprocess.CalledProcessError if it fails; its own message is on the terminal by then.
        """
        shutil.rmtree(self.out, ignore_errors=True)
        subprocess.run([sys.executable, "-m", *self.words()], check=True)
        return SafeLoraReport.load(self.out)
