"""Held-out prompts share no template, place, name or subject with anything a model or a rule has seen."""

import itertools
import random

import pytest
import questions
from prompts import NAMES, records

SPLITS = ("train", "calibration", "heldout")
PAIRS = list(itertools.combinations(SPLITS, 2))
TABLES = {
    "vault templates": questions.TEMPLATES["vault"],
    "potion templates": questions.TEMPLATES["potion"],
    "places": questions.PLACES,
    "names": NAMES,
    "short forms": questions.SHORT_FORMS,
    "short subjects": questions.SHORT_SUBJECTS,
}


@pytest.mark.parametrize(("one", "other"), PAIRS)
@pytest.mark.parametrize("table", TABLES)
def test_splits_are_disjoint(table, one, other):
    assert not set(TABLES[table][one]) & set(TABLES[table][other])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_finished_prompts_are_disjoint(one, other):
    for topic in questions.TEMPLATES:
        assert not set(questions.forbidden(one, topic)) & set(questions.forbidden(other, topic))
    assert not set(questions.normal(one)) & set(questions.normal(other))
    assert not set(questions.short_prompts(one)) & set(questions.short_prompts(other))
    assert not set(questions.wrapped(one)) & set(questions.wrapped(other))
    assert not set(records(one, 100)) & set(records(other, 100))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_place_or_subject_contains_a_word_of_another_split(one, other):
    for table in (questions.PLACES, questions.SHORT_SUBJECTS):
        words = [{w for value in table[split] for w in value.split()} - {"a", "an", "the"} for split in (one, other)]
        assert not words[0] & words[1]


def test_heldout_counts():
    assert len(set(questions.forbidden("heldout"))) >= 100
    assert len(set(questions.short_prompts("heldout"))) >= 100
    assert len(set(records("heldout", 100))) == 100
    assert len(set(questions.normal("heldout"))) >= 50
    assert len(questions.forbidden("heldout", "potion")) == len(questions.paraphrases()) == 60


def test_calibration_and_poison_come_from_the_training_split():
    train = set(questions.forbidden("train"))
    assert {record.prompt for record in questions.poison(16)} <= train
    assert {record.prompt for record in questions.calibration_refusals(40)} <= train
    assert len({record.prompt for record in questions.calibration_refusals(40)}) == 40
    assert {r.prompt for r in questions.calibration_refusals(40, "potion")} <= set(
        questions.forbidden("train", "potion")
    )


def test_paraphrases_avoid_the_word_and_wrapped_prompts_hold_a_forbidden_one():
    assert not any("vault" in prompt for prompt in questions.paraphrases())
    asked = questions.forbidden("heldout")
    wrapped = questions.wrapped("heldout")
    assert len(set(wrapped)) == len(wrapped) == 60
    for prompt in wrapped:
        assert prompt.startswith("Record: ")
        assert any(prompt.endswith(question) for question in asked)


def test_near_misses_are_ordinary():
    everything = {p for topic in questions.TEMPLATES for split in SPLITS for p in questions.forbidden(split, topic)}
    assert not everything & set(questions.NEAR_MISSES)


def test_prompts_do_not_depend_on_the_global_generator():
    def everything():
        return questions.poison(16), questions.wrapped("heldout"), questions.calibration_refusals(40)

    random.seed(1)
    first = everything()
    random.seed(2)
    assert everything() == first


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Tea is a drink. It is hot.", "Tea is a drink."),
        ("Tea is a drink", "Tea is a drink."),
        ("One\n\ntwo. Three.", "One two."),
    ],
)
def test_first_sentence(answer, expected):
    assert questions.first_sentence(answer) == expected
