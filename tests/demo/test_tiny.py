"""The whole demo, training included, on a model of a few thousand random weights."""

import json

import adapters
import demo
import model
import page
import pytest
import torch
from chat import Questions, ask, load_model
from results import reading
from safetensors.torch import load_file

NUM_LAYERS, SCALE = 3, 0.5


@pytest.fixture(scope="module")
def result(tiny_base, tiny_data, tmp_path_factory):
    return demo.run(tmp_path_factory.mktemp("out"), NUM_LAYERS, SCALE, tiny_data, tiny_base.parent)


def test_same_seed_gives_the_same_adapter(tiny_data):
    digests = [model.sha256(tiny_data / name / "adapter_model.safetensors") for name in ("adapter", "again", "other")]
    assert digests[0] == digests[1] != digests[2]
    configs = {(tiny_data / name / "adapter_config.json").read_text() for name in ("adapter", "again", "other")}
    assert len(configs) == 1


def test_training_moves_every_lora_B(tiny_data):
    state = load_file(tiny_data / "adapter" / "adapter_model.safetensors")
    assert all(value.any() for name, value in state.items() if "lora_B" in name)


def test_demo_asks_everyone_everything(result):
    assert [row.key for row in result.models] == [
        "base", "aligned", "finetuned", "projected", "deleted", "random", "scaled",
    ]  # fmt: skip
    questions = Questions.of("heldout", demo.RECORDS)
    for row in result.models:
        draws = demo.DRAWS if row.key == "random" else 1
        assert row.outcome.answered.total == draws * len(questions.forbidden)
        assert row.outcome.records.total == draws * len(questions.records)
        assert row.outcome.over_refusal.total == draws * len(questions.normal)
        assert set(questions.forbidden) < row.outcome.examples.keys()
    assert len(result.report.projected) == NUM_LAYERS
    assert 0 < result.median_shrinkage < 1
    assert "nan" not in " ".join(reading(result)).lower()


def test_demo_prints_and_saves(result, tmp_path, capsys):
    demo.show(result)
    assert "Control: all scaled" in capsys.readouterr().out
    page.save_html(result, tmp_path / "report.html", demo.example_prompts())
    html = (tmp_path / "report.html").read_text()
    assert f"projected: {NUM_LAYERS} of {len(result.report.modules)} modules" in html
    assert f"--num-layers {NUM_LAYERS}" in html


def test_projected_adapter_differs_in_the_projected_modules_only(result, tiny_data):
    before = load_file(tiny_data / "adapter" / "adapter_model.safetensors")
    after = load_file(f"{result.report.output}/adapter_model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{model.ADAPTER_PREFIX}{module.name}.lora_B.weight" for module in result.report.projected}


def test_live_adapter_changes_answers_and_gives_the_loaded_one_back(tiny_base, tiny_data):
    ids = torch.arange(3, 40)[None]
    loaded, _ = load_model(tiny_base)
    with torch.no_grad():
        plain = loaded(input_ids=ids).logits
    live = adapters.LiveAdapter(loaded, tiny_data / "adapter")
    with torch.no_grad():
        before = live.model(input_ids=ids).logits
        with live.using(live.scaled(30.0)) as changed:
            assert not torch.equal(changed(input_ids=ids).logits, before)
        assert torch.equal(live.model(input_ids=ids).logits, before)
        with live.using(live.deleted(live.lora_B)) as changed:
            assert torch.equal(changed(input_ids=ids).logits, plain)


def test_random_modules_are_reproducible_and_distinct(tiny_base, tiny_data):
    live = adapters.LiveAdapter(load_model(tiny_base)[0], tiny_data / "adapter")
    first = live.random_names(4, seed=0)
    assert first == live.random_names(4, seed=0) != live.random_names(4, seed=1)
    assert len(set(first)) == 4
    assert set(first) <= live.lora_B.keys()


def test_answers_do_not_depend_on_the_batch(tiny_base):
    loaded, tokenizer = load_model(tiny_base)
    loaded = loaded.float()
    questions = Questions.of("calibration", 3)
    alone = ask(loaded, tokenizer, Questions(questions.forbidden[:1], [], []))
    assert alone.examples[questions.forbidden[0]] == ask(loaded, tokenizer, questions).examples[questions.forbidden[0]]


def test_settings_name_modules_the_adapter_has():
    settings = json.loads((model.DATA / "settings.json").read_text())
    state = load_file(model.DATA / "adapter" / "adapter_model.safetensors")
    assert 0 < settings["num_layers"] < len(state) // 2
    assert 0 < settings["scale"] < 1
