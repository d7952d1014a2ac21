from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.safelora.zoo import llama_tensors, shifted, write_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of a base and an aligned model, also written to tmp_path/base and tmp_path/aligned."""
    base = llama_tensors()
    aligned = shifted(base)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "aligned", aligned)
    return base, aligned
