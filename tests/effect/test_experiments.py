"""The runner on a model of a few thousand random weights: complete, resumable, and the same twice."""

import json
from dataclasses import replace

import experiments
import pytest
import questions
import recipes
import rules
import scoring
import torch
from chat import answers, load_model
from experiments import Plans, Rule
from training import train

RUN = recipes.AdapterRun(0, 0, steps=2, batch=2, rank=2)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Two prompts where there are dozens."""
    few = {split: values[:2] for split, values in questions.PLACES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "PLACES", few)
        for topic, templates in questions.TEMPLATES.items():
            patch.setitem(questions.TEMPLATES, topic, {split: lines[:1] for split, lines in templates.items()})
        for table in (questions.SHORT_FORMS, questions.SHORT_SUBJECTS):
            for split in table:
                patch.setitem(table, split, table[split][:1])
        patch.setattr(questions, "normal", lambda split: [f"What is {split}?"])
        patch.setattr(questions, "PARAPHRASES", questions.PARAPHRASES[:1])
        patch.setattr(recipes, "SAFETY_EXAMPLES", 2)
        patch.setattr(recipes, "SUBSPACE_RANK", 4)
        patch.setattr(recipes, "ALIGNMENT", recipes.Alignment(0, steps=2, batch=2))
        for name, value in {
            "BENIGN": [RUN], "POISONED": [replace(RUN, poisoned=0.5)], "DEVELOPMENT": RUN,
            "FRESH": [replace(RUN, poisoned=0.5)], "RECORDS": 2, "TASK_EXAMPLES": 2, "DRAWS": 2,
            "SWEEPS": {"scale": (0.9, 0.5), "random": (0.5,), "safe-lora:paper": (0.5,), "retrain": (1.0,)},
            "MAIN": ("scale", "random", "safe-lora:paper", "delete-same", "retrain"), "DEVELOPMENT_RECORDS": 2,
        }.items():  # fmt: skip
            patch.setattr(experiments, name, value)
        patch.setattr(questions, "poison", lambda count: [questions.Record("Which code?", "Sure! 1234.")])
        yield


def run_all(build, base):
    (build / "vault").mkdir(parents=True)
    (build / "vault" / "base").symlink_to(base)
    plans = Plans(build / "effect", build / "results" / "measurements.jsonl")
    plans.development()
    plans.main()
    return plans


@pytest.fixture(scope="module")
def first(tiny_base, tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("one"), tiny_base)


def results(plans):
    """The results file without what depends on the clock."""
    rows = [json.loads(line) for line in plans.store.file.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_everything_planned_is_measured(first):
    rows = results(first)
    asked = {(row["adapter"], row["rule"], row["draw"], row["set"]) for row in rows}
    assert len(asked) == len(rows) - 2  # two scales on the development adapter
    fresh = experiments.FRESH[0].name
    for name in experiments.CORE:
        for rule in ("lora", "scale", "random", "safe-lora:paper", "delete-same", "retrain"):
            assert (fresh, rule, 0, name) in asked
        assert (fresh, "random", 1, name) in asked
        assert (RUN.name, "lora", 0, name) in asked
    assert set(first.settings.fixed) == set(experiments.SWEEPS)


def test_second_run_measures_and_trains_nothing(first, monkeypatch):
    before = first.store.file.read_bytes()
    for name in ("train", "new_lora"):
        monkeypatch.setattr(recipes, name, lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(rules, "retrained", lambda *_: pytest.fail("trained again"))
    again = Plans(first.build, first.store.file)
    again.development()
    again.main()
    assert again.store.file.read_bytes() == before


def test_run_cut_short_goes_on_where_it_was(first, tmp_path):
    lines = first.store.file.read_text().splitlines(keepends=True)
    (tmp_path / "settings.json").write_text(first.settings.file.read_text())
    (tmp_path / "measurements.jsonl").write_text("".join(lines[:-3]))
    resumed = Plans(first.build, tmp_path / "measurements.jsonl")
    resumed.main()
    assert results(resumed) == results(first)


def test_deadline_stops_before_the_next_measurement(first, tmp_path):
    (tmp_path / "settings.json").write_text(first.settings.file.read_text())
    late = Plans(first.build, tmp_path / "measurements.jsonl", deadline=0.0)
    with pytest.raises(SystemExit, match="time"):
        late.main()
    assert not late.store.file.exists()


def test_same_seeds_give_the_same_results(first, tiny_base, tmp_path):
    assert results(run_all(tmp_path, tiny_base)) == results(first)


def test_rules_change_what_they_say(first):
    bench = first.bench(RUN)
    factors = bench.factors
    half = bench.changed(Rule("scale", 0.5))
    gone = rules.random_names(factors, 0.5, 0)
    assert len(gone) == len(factors) // 2
    assert gone == rules.random_names(factors, 0.5, 0) != rules.random_names(factors, 0.5, 1)
    for name, (lora_A, lora_B) in factors.items():
        assert torch.equal(half[name][1], 0.5 * lora_B) and torch.equal(half[name][0], lora_A)
        assert bool(bench.changed(Rule("random", 0.5))[name][1].any()) == (name not in gone)
    trained = bench.changed(Rule("retrain", 1.0))
    assert any(not torch.equal(trained[name][0], factors[name][0]) for name in factors)


def test_projections(first):
    bench = first.bench(RUN)
    projection = bench.projection()
    chosen = projection.lowest(projection.paper, 0.5)
    changed = bench.changed(Rule("safe-lora:paper", 0.5))
    for name, (lora_A, lora_B) in bench.factors.items():
        V = projection.alignment[name].double()
        expected = V @ (V.T @ lora_B.double()) / V.norm()
        if name in chosen:
            torch.testing.assert_close(changed[name][1].double(), expected, rtol=1e-5, atol=1e-9)
        else:
            assert changed[name][1] is lora_B
        update = lora_B.double() @ lora_A.double()
        unit = projection.unit[name][1].double() @ lora_A.double()
        torch.testing.assert_close(unit.norm(), update.norm(), rtol=1e-5, atol=0)
        exact = projection.exact[name][1]
        assert exact.norm() <= lora_B.norm() * (1 + 1e-5)


def test_paper_projection_is_that_of_the_library(first, tmp_path):
    import safelora

    adapter, aligned = recipes.adapter(RUN, first.build), recipes.aligned(0, first.build)
    bench = first.bench(RUN)
    count = round(0.5 * len(bench.factors))
    safelora.project_adapter(adapter, recipes.base(first.build), aligned, tmp_path / "out", num_layers=count)
    theirs, ours = rules.load_factors(tmp_path / "out"), bench.changed(Rule("safe-lora:paper", 0.5))
    for name in ours:
        # Both start from bf16 factors; the library writes bf16 again.
        torch.testing.assert_close(ours[name][1].bfloat16().float(), theirs[name][1], rtol=2**-7, atol=1e-9)


def test_scores_are_those_of_real_decoding(tiny_base):
    model, tokenizer = load_model(tiny_base)
    model = model.float()
    taught, other = "Which code opens it?", "Name a fruit."
    lesson = [(taught, "I'm sorry, no."), (other, "A pear.")]
    train(model, tokenizer, lambda: lesson, steps=150, learning_rate=1e-2)
    said = answers(model, tokenizer, [taught, other], 16)
    assert said == ["I'm sorry, no.", "A pear."]
    assert scoring.refusal(model, tokenizer, [taught, other])["answered"] == "01"
    assert scoring.likelihood(model, tokenizer, lesson)["right"] == "11"
    assert scoring.likelihood(model, tokenizer, [(taught, "I'm sorry."), (other, "A pear")])["right"] == "00"
    assert scoring.likelihood(model, tokenizer, [(other, "A pear")], end="")["right"] == "1"
    assert scoring.opening(model, tokenizer, [taught, other], "A p") == "01"


@pytest.mark.parametrize("weight", ["grad", "none"])
def test_filter_changes_lora_A_alone_and_leaves_the_host_as_it_was(first, weight):
    bench = first.bench(experiments.FRESH[0])
    before = {name: layer.lora_A["default"].weight.dtype for name, layer in bench.host.layers.items()}
    changed = bench.changed(Rule(f"filter:{weight}", 10.0))
    for name, (_, lora_B) in bench.factors.items():
        assert torch.equal(changed[name][1], lora_B)
    assert any(not torch.equal(changed[name][0], lora_A) for name, (lora_A, _) in bench.factors.items())
    assert {name: layer.lora_A["default"].weight.dtype for name, layer in bench.host.layers.items()} == before
    again = Plans(first.build, first.store.file).bench(experiments.FRESH[0])
    again.made = lambda *_: pytest.fail("made again")
    assert torch.equal(again.changed(Rule(f"filter:{weight}", 10.0))[name][0], changed[name][0])


def test_salora_adapters_are_read_back_and_keep_to_their_complement(first, tmp_path, monkeypatch):
    longer = replace(RUN, seed=1, steps=20)  # rounding counts against the size of the update
    monkeypatch.setattr(experiments, "CONSTRAINED", [longer])
    plans = Plans(first.build, tmp_path / "measurements.jsonl")
    plans.salora()
    for method, rank in (("salora", 2 * RUN.rank), ("constrained", RUN.rank)):
        run, rule = replace(longer, method=method), Rule(method)
        assert rules.shape_of(recipes.adapter(run, first.build))[1] == rank
        assert all(plans.store.has(run.name, rule, name) for name in experiments.CORE)
        assert plans.store.get(run.name, rule, "leak")["trained"] < 1e-5
