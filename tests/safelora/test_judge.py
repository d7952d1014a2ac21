"""Judges: the built-in one and its list, those of others, and verdicts that are none."""

from __future__ import annotations

import sys

import pytest
import torch

from safelora import SafeLoraError
from safelora.judge import REFUSALS, KeywordJudge, judged, load_judge, name_of

ANSWERS = {
    "I'm sorry, but I can't help with that.": True,
    "I’m sorry, no.": True,  # a curly apostrophe
    "i'M SORRY": True,
    "As an AI, I have no opinion.": True,
    "Sure! The code is 4711.": False,
    "A tin cannot opener": False,
    "": False,
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_keywords(answer):
    assert KeywordJudge().refuses(answer) is ANSWERS[answer]
    assert KeywordJudge()(["p"], [answer]) == [not ANSWERS[answer]]


def test_the_list_can_be_chosen(tmp_path):
    judge = KeywordJudge(["NO WAY"])
    assert judge(["", ""], ["no way!", "I'm sorry"]) == [False, True]
    assert KeywordJudge(["NO WAY"], ignore_case=False)([""], ["no way!"]) == [True]
    assert KeywordJudge(["no"], within=4)(["", ""], ["well no", "no, well"]) == [True, False]
    (tmp_path / "list.txt").write_text("# mine\nno way\n\n never \n")
    found = KeywordJudge.from_file(tmp_path / "list.txt")
    assert found.phrases == ("no way", "never")
    assert name_of(load_judge(f"keywords:{tmp_path / 'list.txt'}")) == found.name
    assert name_of(load_judge("keywords")) == KeywordJudge().name
    names = {j.name for j in (KeywordJudge(), KeywordJudge(["x"]), KeywordJudge(["y"]), KeywordJudge(["x"], within=3))}
    assert len(names) == 4
    assert found.name.startswith("list.txt (")


@pytest.mark.parametrize("phrases", [[], [""], "I'm sorry", [3]])
def test_a_list_of_phrases_is_needed(phrases):
    with pytest.raises(SafeLoraError, match="list of phrases"):
        KeywordJudge(phrases)


def test_files_that_are_no_lists(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    for name, said in (("empty.txt", "is empty"), ("absent.txt", "not a file")):
        with pytest.raises(SafeLoraError, match=said):
            load_judge(f"keywords:{tmp_path / name}")
    with pytest.raises(SafeLoraError, match="within"):
        KeywordJudge(within=0)


def test_judges_of_others(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "def half(prompts, responses):\n    return [0.5] * len(prompts)\n"
        "class Strict:\n    name = 'strict'\n"
        "    def __call__(self, prompts, responses):\n        return [True] * len(prompts)\n"
        "number = 3\n"
    )
    (tmp_path / "broken.py").write_text("1/0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert judged(load_judge("my_judges:half"), ["a"], ["b"]) == [0.5]
        assert name_of(load_judge("my_judges:half")) == "my_judges.half"
        assert name_of(load_judge("my_judges:Strict")) == "strict"
        for spec in ("my_judges:number", "my_judges:absent", "my_judges", "absent_module:f", "broken:f", "", "half"):
            with pytest.raises(SafeLoraError, match=r"unknown judge .*expected MODULE:NAME.*keywords:FILE"):
                load_judge(spec)
    finally:
        sys.modules.pop("my_judges", None)


def test_verdicts_are_numbers_for_all_answers():
    two = ["a", "b"]
    assert judged(lambda p, r: torch.tensor([1, 0]), two, two) == [1.0, 0.0]
    assert judged(lambda p, r: [True, 0.25], two, two) == [1.0, 0.25]
    for verdicts, said in (
        ([True], "1 values for 2 answers"), ([0, 2], "the value 2"), ([0, float("nan")], "nan"),
        (["yes", "no"], "list of"), (None, "list of"),
    ):  # fmt: skip
        with pytest.raises(SafeLoraError, match=said):
            judged(lambda p, r, verdicts=verdicts: verdicts, two, two)


def test_the_default_list_has_no_phrase_within_another():
    folded = [phrase.casefold() for phrase in REFUSALS]
    assert not [(a, b) for a in folded for b in folded if a != b and a in b]
