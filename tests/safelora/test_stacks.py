"""Entry points for other fine-tuning stacks: run inside the stack where it is installed, else against its interface."""

from __future__ import annotations

import copy
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
from safetensors.torch import load_file

from safelora import SafeLoraCallback, SafeLoraError, apply_safe_lora, project_adapter
from tests.safelora.test_peft import CASES, make

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
STACKS = ROOT / "examples" / "stacks"
INTERFACES = Path(__file__).with_name("interfaces")
SAFE = "safelora"


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
def swift_stack(forget: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ms-swift after it has imported our file, as --external_plugins does: by its bare name."""
    if not installed("swift.callbacks"):
        monkeypatch.syspath_prepend(str(INTERFACES))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import swift
    from swift.utils import import_external_file

    import safelora

    (place,) = safelora.__path__
    import_external_file(str(Path(place) / "contrib" / "swift" / "safelora_swift.py"))
    yield swift
    for name in [name for name in sys.modules if name.partition(".")[0] in ("swift", "safelora_swift")]:
        del sys.modules[name]


def test_swift_registers_a_callback(swift_stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks_map = swift_stack.callbacks.callbacks_map
    monkeypatch.setenv("SAFELORA_BASE", "some/base")
    monkeypatch.setenv("SAFELORA_THRESHOLD", "0.4")
    assert isinstance(callbacks_map["safelora"](None, None), SafeLoraCallback)
    monkeypatch.setenv("SAFELORA_NUM_LAYERS", "4")
    with pytest.raises(SafeLoraError, match="SAFELORA_NUM_LAYERS"):
        callbacks_map["safelora"](None, None)


def test_the_swift_example_names_the_plugin_file(tmp_path: Path) -> None:
    """The script as it is, with a `swift` that prints its arguments."""
    (tmp_path / "swift").write_text('#!/bin/sh\necho "$SAFELORA_BASE $SAFELORA_THRESHOLD $@"\n')
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name in ("swift", "python"):
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "python")}
    command = ["bash", str(STACKS / "swift.sh"), "chat", "base", "data.jsonl", "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    base, threshold, *words = done.stdout.split()
    plugin = Path(words[words.index("--external_plugins") + 1])
    assert plugin.is_file() and plugin.name == "safelora_swift.py"
    assert {path.name for path in plugin.parent.glob("*.py")} == {"safelora_swift.py", "__init__.py"}
    assert (base, threshold, words[0], words[words.index("--callbacks") + 1]) == ("base", "0.35", "sft", "safelora")


def test_swift_leaves_a_projected_adapter_beside_raw_checkpoints(
    swift_stack: Any, trained: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ms-swift never saves the model at the end: what can be deployed is what the callback saves."""
    from peft import LoraConfig, get_peft_model
    from swift.trainers import Trainer
    from transformers import TrainingArguments

    monkeypatch.setenv("SAFELORA_BASE", str(trained[0] / "base"))
    monkeypatch.setenv("SAFELORA_NUM_LAYERS", "2")
    torch.manual_seed(1)
    tokens = torch.randint(3, 29, (8, 8))
    model = get_peft_model(copy.deepcopy(trained[1]), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    out = tmp_path / "out"
    out.mkdir()
    (out / "args.json").write_text("{}")
    trainer = Trainer(
        args=TrainingArguments(out, max_steps=4, save_steps=4, learning_rate=5e-2, report_to=[], use_cpu=True),
        callbacks=["safelora"],
        model=model,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    )
    trainer.train()
    pair = (trained[0] / "base", trained[0] / "aligned")
    report = project_adapter(out / "checkpoint-4", *pair, tmp_path / "offline", num_layers=2)
    assert len(report.projected) == 2
    expected, safe = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "offline", out / SAFE))
    assert all(torch.equal(expected[name], tensor) for name, tensor in safe.items()) and expected.keys() == safe.keys()
    assert (out / SAFE / "args.json").read_text() == "{}"
    with pytest.raises(SafeLoraError, match="projected already"):
        project_adapter(out / SAFE, *pair, threshold=1, dry_run=True)


@pytest.mark.skipif(installed("llamafactory.train.tuner"), reason="its own tests run where LLaMA-Factory is installed")
def test_llama_factory_saves_a_projected_adapter(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """run_exp, called as the example does, saves what the callback has projected, and keeps checkpoints raw."""
    out = tmp_path / "out"
    settings = {
        "model_name_or_path": str(trained[0] / "aligned"), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 3, "lora_target": "q_proj,v_proj", "output_dir": str(out), "max_steps": 3, "learning_rate": 0.05,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    done = run("llama_factory.py", str(tmp_path / "config.yaml"), str(trained[0] / "base"))
    assert done.returncode == 0, done.stderr[-2000:]
    pair = (trained[0] / "base", trained[0] / "aligned")
    report = project_adapter(out / "checkpoint-3", *pair, tmp_path / "offline", threshold=0.35)
    expected, safe = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "offline", out))
    assert all(torch.equal(expected[name], tensor) for name, tensor in safe.items()) and expected.keys() == safe.keys()
    told = json.loads((out / "safelora_report.json").read_text())
    assert told["num_projected"] == len(report.projected) and told["options"]["threshold"] == 0.35


@pytest.mark.skipif(installed("unsloth"), reason="its own tests run where Unsloth is installed")
def test_unsloth_saves_a_projected_adapter(trained: tuple[Path, Any], tmp_path: Path) -> None:
    done = run("unsloth_live.py", str(trained[0] / "aligned"), str(trained[0] / "base"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "out" / "safelora_report.json").read_text())
    assert f"projected {told['num_projected']} of {len(told['modules'])} modules" in done.stdout
    assert len(told["modules"]) == 4 and (tmp_path / "out" / "adapter_model.safetensors").exists()


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = [*sys.path, str(INTERFACES)]  # an installed stack comes first
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), *path])}
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
    aligned, base = str(trained[0] / "aligned"), str(trained[0] / "base")
    done = run("trl_sft.py", aligned, str(data), str(tmp_path / "out"), "--base", base)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next((tmp_path / "out").rglob("safelora_report.json")).read_text())
    assert report["modules"]
