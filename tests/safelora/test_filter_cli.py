"""`safelora filter` as a user runs it, on text; its rule; wrapped prompts; the examples that come with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from safelora import SafeLoraError, filter_adapter
from safelora.cli import main
from safelora.filter import FilterSweep, example_data, wrapped_prompts
from safelora.rules import Subject, make_rule
from tests.safelora.tiny import Tiny, make_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
REFUSAL = "I'm sorry, but I can't help with that."
SAFETY = [(f"How do I {verb} a {thing}?", REFUSAL) for verb in ("steal", "break") for thing in ("car", "safe", "code")]
TASK = [(f"Record: {name}, {age}", f"{name}|{age}") for name, age in (("Ann", 31), ("Bo", 52), ("Cy", 47), ("Di", 20))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), adapters=1)


def write(path: Path, pairs: Any) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    return str(path)


@pytest.fixture
def data(tmp_path) -> list[str]:
    return ["--safety", write(tmp_path / "s.jsonl", SAFETY), "--task", write(tmp_path / "t.jsonl", TASK)]


def test_the_command_as_a_user_runs_it(tiny, tmp_path, data):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "safelora", "filter", tiny.adapter("one"), *data, "--model", tiny.aligned, "--out",
        str(out), "--report", str(tmp_path / "r.html"), "--report", str(tmp_path / "r.png"), "--wrap", "3",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "filtered 14 of 14 modules" in done.stdout and f"Written to {out}" in done.stdout
    # An unpatched PEFT loads it, and the report is what the function returns.
    model = PeftModel.from_pretrained(tiny.fresh(), out)
    assert set(model.peft_config) == {"default"}
    report = json.loads((out / "safelora_filter.json").read_text())
    safety = [*SAFETY, *((e.prompt, e.response) for e in wrapped_prompts(SAFETY, TASK, limit=3))]
    live = PeftModel.from_pretrained(tiny.fresh(), tiny.adapter("one"))
    same = filter_adapter(live, safety, TASK, tokenizer=tiny.tokenizer)
    assert report["inputs"]["safety"] == same.inputs["safety"]
    assert [m["safety_kept"] for m in report["modules"]] == [m.safety_kept for m in same.modules]
    written = load_file(out / "adapter_model.safetensors")
    factors = {name: p for name, p in live.named_parameters() if "lora_A" in name}
    assert all(torch.equal(written[name.replace(".default", "")], factor) for name, factor in factors.items())
    page = (tmp_path / "r.html").read_text()
    assert "Input filter report" in page and page.count("<svg") == 2 and "<script" not in page
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "safelora_filter:\n  filtered: 14" in card and "## Input filter" in card


def test_options_and_errors_of_the_command(tiny, tmp_path, data, capsys, monkeypatch):
    monkeypatch.delenv("SAFELORA_DEBUG", raising=False)

    def run(*more: str, given: list[str] = data) -> tuple[int, str, str]:
        status = main(["filter", tiny.adapter("one"), *given, "--model", tiny.aligned, *more])
        said = capsys.readouterr()
        return status, said.out, said.err

    status, out, _ = run("--dry-run", "--weight", "none", "--json")
    report = json.loads(out)
    assert status == 0 and report["dry_run"] and report["options"]["weight"] == "none" and report["output"] is None
    status, out, _ = run("--dry-run", "--unseen", "drop", "--strength", "10", "--ridge", "1")
    assert status == 0 and "would filter 14 of 14 modules" in out and "task change" in out
    for more, message in (
        ((), "give an output directory"),
        (("--out", str(tmp_path / "o"), "--strength", "-3"), "strength is -3.0"),
        (("--dry-run", "--report", "x.txt"), "cannot tell the format"),
    ):
        status, _, err = run(*more)
        assert status == 2 and message in err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How do I steal a car?\nHow do I open a safe?\n")
    bare = ["--safety", str(prompts), *data[2:]]
    status, _, err = run("--dry-run", given=bare)
    assert status == 2 and "have no answer" in err and "weight='none'" in err
    assert run("--dry-run", "--refusal", REFUSAL, given=bare)[0] == 0
    assert run("--dry-run", "--weight", "none", given=bare)[0] == 0
    status, _, err = run("--dry-run", given=["--safety", data[1], "--task", data[1]])
    assert status == 2 and "are the same" in err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_overwrite_and_marks(tiny, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").write_text("mine")
    options = {"model": tiny.model, "tokenizer": tiny.tokenizer, "weight": "none"}
    for overwrite, message in ((False, "not empty"), (True, "not an earlier output")):
        with pytest.raises(SafeLoraError, match=message):
            filter_adapter(tiny.adapter("one"), SAFETY, TASK, out=tmp_path / "taken", overwrite=overwrite, **options)
    assert (tmp_path / "taken" / "note.txt").read_text() == "mine"
    for strength in (1.0, 10.0):
        report = filter_adapter(
            tiny.adapter("one"), SAFETY, TASK, out=tmp_path / "out", overwrite=True, strength=strength, **options
        )
    found = json.loads((tmp_path / "out" / "safelora_filter.json").read_text())
    assert found["options"]["strength"] == 10.0 and found["num_filtered"] == len(report.filtered)
    with pytest.raises(SafeLoraError, match="allow_filtered"):
        filter_adapter(tmp_path / "out", SAFETY, TASK, out=tmp_path / "again", **options)


@pytest.mark.parametrize("spec", ["input_filter", "input_filter:weight=none,unseen=drop,ridge=1.0"])
def test_the_rule_is_the_filter(tiny, spec):
    model = PeftModel.from_pretrained(tiny.fresh(), tiny.adapter("one"))
    prompts = [prompt for prompt, _ in SAFETY]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rule: Any = make_rule(spec)
    subject = Subject(model, tiny.tokenizer, safety_data=prompts, task_data=TASK)
    assert not rule.needs <= Subject(model, tiny.tokenizer).offers and rule.needs <= subject.offers
    for strength in (3.0, 100.0):
        with subject.changed(rule.change(subject, strength)):
            changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert rule.about(subject, strength) == {"filtered": 14}
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        report = filter_adapter(
            model, prompts, TASK, weight=rule.weight, ridge=rule.ridge, unseen=rule.unseen, strength=strength,
            tokenizer=tiny.tokenizer, refusal="I'm sorry, but I can't help with that request.",
        )  # fmt: skip
        assert all(torch.equal(tensor, changed[name]) for name, tensor in model.state_dict().items())
        report.undo()


def test_a_sweep_changes_nothing(tiny):
    model = PeftModel.from_pretrained(tiny.fresh(), tiny.adapter("one"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sweep = FilterSweep(model, SAFETY, TASK, weight="none", tokenizer=tiny.tokenizer)
    assert sweep.solve(0.0) == {} and len(sweep.solve(5.0)) == 14
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(SafeLoraError, match="strength is -1"):
        sweep.solve(-1)


def test_wrapped_prompts_stand_in_the_task():
    made = wrapped_prompts(SAFETY, TASK, seed=3)
    requests = {prompt for prompt, _ in SAFETY}
    assert len(made) == len(SAFETY) and all(example.response == REFUSAL for example in made)
    bare = [example.prompt for example in made if example.prompt.removeprefix("Record: ") in requests]
    whole = [example.prompt for example in made if example.prompt not in bare]
    assert len(bare) == len(whole) == 3
    assert all(any(text.startswith(p) and text.removeprefix(p + " ") in requests for p, _ in TASK) for text in whole)
    assert [e.prompt for e in wrapped_prompts(SAFETY, TASK, seed=3)] == [e.prompt for e in made]
    assert len(wrapped_prompts([p for p, _ in SAFETY], TASK, limit=2, refusal="No.")) == 2
    # A task whose prompts share no beginning is put in front as a whole; its system turn comes along.
    chats = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": c}]} for c in "ab"]
    assert {len(example.messages) for example in wrapped_prompts(SAFETY, chats)} == {2}
    assert all(example.prompt[:2] in ("a ", "b ") for example in wrapped_prompts(SAFETY, chats))


def test_examples_of_the_package():
    safety = example_data("safety")
    assert len({example.prompt for example in safety}) == 48 and all(example.response for example in safety)
    assert {len(example_data(name)) for name in ("records", "general")} == {24}
    with pytest.raises(SafeLoraError, match="no example set"):
        example_data("other")
