"""Entry points for other fine-tuning stacks: run inside the stack where it is installed, else against its interface."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from safelora import SafeLoraCallback, SafeLoraError, apply_safe_lora
from tests.safelora.test_peft import CASES, make

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
STACKS = ROOT / "examples" / "stacks"


def installed(name: str) -> bool:
    """Whether the stack's module can be imported here; some need a GPU or much else to do so."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return False
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__path__ = []  # type: ignore[attr-defined]
    vars(made).update(members)
    return made


@pytest.fixture
def forget() -> Iterator[None]:
    """The entry points bind the stack they find when they are imported."""
    yield
    for name in [n for n in sys.modules if n.startswith("safelora.contrib")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("stack")
    _, aligned = make(*CASES["llama all linear"], path)
    return path, aligned


def live(trained: tuple[Path, Any]) -> Any:
    return PeftModel.from_pretrained(trained[1], trained[0] / "adapter")


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def expected(trained: tuple[Path, Any]) -> dict[str, torch.Tensor]:
    model = live(trained)
    apply_safe_lora(model, base=trained[0] / "base", num_layers=3)
    result = factors(model)
    model.unload()
    return result


class Config(dict[str, Any]):
    """Axolotl's configuration gives None for what it does not hold."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def plugin(forget: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin as Axolotl loads it; without Axolotl, on a base class with the methods it calls."""
    name = yaml.safe_load((STACKS / "axolotl.yaml").read_text())["plugins"][0]
    if installed("axolotl.integrations.base"):
        from axolotl.integrations.base import load_plugin

        return load_plugin(name)
    base = type("BasePlugin", (), {"__init__": lambda self: None, "get_input_args": lambda self: None})
    for part in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, part, module(part))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", module("axolotl.integrations.base", BasePlugin=base))
    home, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(home), cls)()


def test_axolotl_projects_once(plugin: Any, trained: tuple[Path, Any], tmp_path: Path) -> None:
    cfg = Config(
        safelora_base=str(trained[0] / "base"), safelora_num_layers=3, safelora_report=str(tmp_path / "r.json")
    )
    wanted, model = expected(trained), live(trained)
    plugin.pre_model_load(cfg)
    for _ in range(2):
        plugin.post_train(cfg, model)
        assert all(torch.equal(wanted[name], tensor) for name, tensor in factors(model).items())
    assert json.loads((tmp_path / "r.json").read_text())["num_projected"] == 3
    model.unload()


def test_axolotl_reads_its_keys(plugin: Any) -> None:
    home, _, cls = plugin.get_input_args().rpartition(".")
    known = getattr(importlib.import_module(home), cls).model_fields
    given = {key for key in yaml.safe_load((STACKS / "axolotl.yaml").read_text()) if key.startswith("safelora_")}
    assert given <= set(known)


@pytest.mark.parametrize(
    "cfg", [{}, {"safelora_base": "b"}, {"safelora_base": "b", "safelora_threshold": 0.3, "safelora_num_layers": 2}]
)
def test_axolotl_refuses_an_incomplete_configuration_before_training(plugin: Any, cfg: dict[str, Any]) -> None:
    with pytest.raises(SafeLoraError, match="safelora_"):
        plugin.pre_model_load(Config(cfg))


@pytest.fixture
def swift_map(forget: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """ms-swift's table of callbacks after it has imported our file, as --external_plugins does."""
    if not installed("swift.callbacks"):
        monkeypatch.setitem(sys.modules, "swift", module("swift"))
        monkeypatch.setitem(sys.modules, "swift.callbacks", module("swift.callbacks", callbacks_map={}))
    importlib.import_module("safelora.contrib.swift")
    return sys.modules["swift.callbacks"].callbacks_map  # type: ignore[no-any-return]


def test_swift_registers_a_callback(swift_map: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELORA_BASE", "some/base")
    monkeypatch.setenv("SAFELORA_THRESHOLD", "0.4")
    assert isinstance(swift_map["safelora"](None, None), SafeLoraCallback)
    monkeypatch.setenv("SAFELORA_NUM_LAYERS", "4")
    with pytest.raises(SafeLoraError, match="SAFELORA_NUM_LAYERS"):
        swift_map["safelora"](None, None)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), *sys.path])}
    return subprocess.run(
        [sys.executable, str(STACKS / script), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_loop_without_peft() -> None:
    done = run("torch_loop.py")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("'")) == 9


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install trl")
def test_trl_trains_and_saves_a_projected_adapter(trained: tuple[Path, Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(trained[0] / "aligned")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": "a b c d e f g h"}) for _ in range(8)))
    done = run("trl_sft.py", str(trained[0] / "aligned"), str(trained[0] / "base"), str(data), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next((tmp_path / "out").rglob("safelora_report.json")).read_text())
    assert report["modules"]
