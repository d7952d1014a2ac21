"""Prompts and answers from the files that safety and utility data sets come in, and the token batches made of them."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SafeLoraError

if TYPE_CHECKING:
    import torch

    Batch = dict[str, torch.Tensor]

IGNORED = -100
# Columns by which a row's parts are known, in order of precedence; names are compared without regard to case.
_CHATS = ("messages", "conversations", "conversation")
_PROMPTS = ("forbidden_prompt", "goal", "prompt", "instruction", "question", "test_case", "behavior", "turns")
_RESPONSES = ("response", "completion", "output", "answer", "generation")
_DIALOGUES, _SUMMARIES = ("dialogue", "dialog"), ("summary", "summary1")
_INFO = {
    "id": ("id", "question_id", "index", "fname"),
    "behavior_id": ("behaviorid", "behavior_id"),
    "category": ("semanticcategory", "category", "type"),
    "label": ("label",),
    "target": ("target",),
    "answer": ("answer",),
    "context": ("contextstring",),
    "is_safe": ("is_safe",),
}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "prompter": "user"}


@dataclass(frozen=True)
class Example:
    """One conversation: the turns up to the answer, and the answer where there is one.

    messages: turns of ``role`` ("system", "user", "assistant") and ``content``, the last one the user's.
    response: the assistant's answer to them, or None.
    info: what else a data set says about it, where it does: id, behavior_id, category, label, target, answer, context,
        is_safe. AdvBench's and JailbreakBench's ``target`` is what an attack wants to hear, and never the response.
    """

    messages: tuple[dict[str, str], ...]
    response: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The last turn of the user."""
        return self.messages[-1]["content"]


def load_examples(source: Any, *, limit: int | None = None, response: str | None = None) -> list[Example]:
    """Read prompts, with answers where there are any.

    Args:
        source: a path to .txt (a prompt a line), .csv or .tsv (with a header, or of one column without), .json or
            .jsonl; a `datasets.Dataset`; an iterable of dicts, strings, chats, (prompt, response) pairs or Examples.
            Rows may be ``messages`` (or ShareGPT's ``conversations``), Alpaca's or Dolly's triples, prompt and
            response or completion, or rows of AdvBench, HarmBench, JailbreakBench, StrongREJECT, HEx-PHI, XSTest,
            BeaverTails, MT-Bench, SAMSum and DialogSum.
        limit: how many to read at most, from the start.
        response: the answer to give to examples that have none.

    Raises:
        SafeLoraError: when nothing is there, or a row has no column that is known; the message names those it has.
    """
    if limit is not None and limit < 1:
        raise SafeLoraError(f"limit is {limit}, expected at least 1.")
    label, rows = _rows(source)
    examples = [_example(row, f"{label}, row {i}") for i, row in enumerate(islice(rows, limit), 1)]
    if not examples:
        raise SafeLoraError(f"{label} holds no example.")
    if response is not None:
        examples = [replace(e, response=response) if e.response is None else e for e in examples]
    return examples


def batches(
    source: Any, tokenizer: Any, *, batch_size: int = 8, max_length: int = 1024, allow_prompts: bool = False
) -> Iterable[Batch]:
    """Token batches of examples, in their order.

    Args:
        source: whatever :func:`load_examples` reads. A DataLoader, or an iterable of batches (dicts with ``input_ids``
            of two dimensions), is returned as it is; rows with one-dimensional ``input_ids`` and ``labels`` are padded.
        tokenizer: a transformers tokenizer. Its chat template is applied once; without one, turns are joined by blank
            lines. May be None where `source` is tokenised.
        batch_size: examples a batch.
        max_length: tokens an example at most. A longer one first loses its prompt from the left (but for the first
            token), down to half of max_length, then its answer from the right; a warning says how many did.
        allow_prompts: accept examples without an answer; they end where the answer would begin.

    Returns:
        Dicts of int64 tensors of shape (batch, longest): ``input_ids`` (padded on the right), ``attention_mask`` and
        ``labels``, which are the input ids of the answer and of the token that ends it, and −100 elsewhere.

    Raises:
        SafeLoraError: as load_examples; for examples without an answer; for a chat template that refuses a
            conversation or changes its answer.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise SafeLoraError(f"{name} is {value}, expected at least 1.")
    from torch.utils.data import DataLoader

    if isinstance(source, DataLoader):
        return source
    if not isinstance(source, (str, os.PathLike, Mapping)) and isinstance(source, Iterable):
        rows: Iterator[Any] = iter(source)
        first: Any = next(rows, None)
        if isinstance(first, Mapping) and "input_ids" in first:
            if getattr(first["input_ids"], "ndim", 0) == 2:
                whole: Any = source if rows is not source else chain([first], rows)
                return whole
            return _collated(list(map(_tokenised, chain([first], rows))), tokenizer, batch_size, max_length)
        if rows is source:
            source = [] if first is None else chain([first], rows)
    examples = load_examples(source)
    unanswered = sum(example.response is None for example in examples)
    if unanswered and not allow_prompts:
        raise SafeLoraError(
            f"{unanswered} of {len(examples)} examples have no answer ({examples[0].prompt[:60]!r}…). Give rows a "
            "response (or completion, output, messages), or one to all: load_examples(…, response='I am sorry, …')."
        )
    if tokenizer is None:
        raise SafeLoraError("the examples are text: give the model's tokenizer.")
    return _collated([encode(example, tokenizer) for example in examples], tokenizer, batch_size, max_length)


def encode(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the conversation up to the answer, and of the answer with the token that ends it.

    The second list is empty where there is no answer. Both together are the tokens of the whole text wherever these
    split at the answer's start, as they do when a model generates; else the two parts are tokenised apart.
    """
    tokenizer = text_tokenizer(tokenizer)
    before, after = _render(example, tokenizer)
    special = not getattr(tokenizer, "chat_template", None)
    prompt = _tokenise(before, tokenizer, special)
    if after is None:
        return prompt, []
    whole = _tokenise(before + after, tokenizer, special)
    if special and whole[-1:] != [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None:
        whole.append(tokenizer.eos_token_id)
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return prompt, whole[len(prompt) :]
    answer = _tokenise(after, tokenizer, False)
    if special and tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    return prompt, answer


def shorten(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut to max_length tokens: the prompt from the left, but for its first token, down to half; then the answer."""
    room = max(max_length - len(answer), max_length // 2)
    if len(prompt) > room:
        prompt = prompt[: min(room, 1)] + prompt[len(prompt) - max(room - 1, 0) :]
    return prompt, answer[: max_length - len(prompt)]


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def padding_id(tokenizer: Any) -> int:
    """The id to pad with: never looked at, since the attention mask is 0 there."""
    found = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((int(value) for value in found if value is not None), 0)


def _render(example: Example, tokenizer: Any) -> tuple[str, str | None]:
    """The text up to the answer, and the answer with what ends it."""
    messages, response = list(example.messages), example.response
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in messages) + "\n\n", response

    def apply(turns: list[dict[str, str]], prompt: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise SafeLoraError(f"the chat template refuses a conversation of {roles}: {error}.") from error

    before = apply(messages, True)
    if response is None:
        return before, None
    whole = apply([*messages, {"role": "assistant", "content": response}], False)
    answer = whole[len(before) :] if whole.startswith(before) else whole
    kept = response if response in answer else response.strip()  # many templates trim what they are given
    at = answer.rfind(kept) if answer is whole else answer.find(kept)
    if at < 0:
        raise SafeLoraError(f"the chat template changes the answer {response[:60]!r}, so its tokens cannot be told.")
    lead, end = answer[:at], answer[at + len(kept) :].rstrip()
    if answer is whole:
        lead = ""
    elif lead.strip():  # an empty thought, for instance: given, not answered
        before, lead = before + lead, ""
    return before, lead + kept + (end if end.strip() else tokenizer.eos_token or "")


def _tokenise(text: str, tokenizer: Any, special: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special).input_ids)
    if special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        ids.pop()
    return ids


def _tokenised(row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    if "labels" not in row:
        raise SafeLoraError(f"the rows are tokenised but have no labels; they have {', '.join(row)}.")
    ids, labels = ([int(value) for value in row[name]] for name in ("input_ids", "labels"))
    if len(ids) != len(labels) or not ids:
        raise SafeLoraError(f"a row has {len(ids)} input_ids and {len(labels)} labels; expected as many, and some.")
    return ids, [], labels


def _collated(
    encoded: Sequence[tuple[list[int], ...]], tokenizer: Any, batch_size: int, max_length: int
) -> list[Batch]:
    rows, shortened = [], 0
    for prompt, answer, *labels in encoded:
        shortened += len(prompt) + len(answer) > max_length
        if labels:
            rows.append((prompt[:max_length], labels[0][:max_length]))
            continue
        prompt, answer = shorten(prompt, answer, max_length)
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    if shortened:
        warnings.warn(f"{shortened} of {len(rows)} examples were cut to {max_length} tokens.", stacklevel=3)
    pad = padding_id(text_tokenizer(tokenizer))
    return [_pad(rows[start : start + batch_size], pad) for start in range(0, len(rows), batch_size)]


def _pad(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    import torch

    longest = max(len(ids) for ids, _ in rows)
    fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    batch = {name: torch.full((len(rows), longest), value) for name, value in fill.items()}
    for i, (ids, labels) in enumerate(rows):
        for name, values in (("input_ids", ids), ("attention_mask", [1] * len(ids)), ("labels", labels)):
            batch[name][i, : len(ids)] = torch.tensor(values)
    return batch


def _rows(source: Any) -> tuple[str, Iterator[Any]]:
    """What to call the source in errors, and its rows."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise SafeLoraError(
                f"{path} is not a file. Give a .jsonl, .json, .csv, .tsv or .txt file, or a list of prompts; a data "
                "set of the Hugging Face hub as the object that datasets.load_dataset returns."
            )
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise SafeLoraError(f"cannot tell the format of {path}: end it in {', '.join(_READERS)}.")
        try:
            return str(path), reader(path)
        except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
            raise SafeLoraError(f"{path} cannot be read as {path.suffix}: {error}.") from error
    if isinstance(source, Mapping):
        raise SafeLoraError(f"expected rows, got a mapping of {', '.join(map(str, source))}: choose one of them.")
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a DataFrame, which iterates over column names
        source = source.to_dict("records")
    if not isinstance(source, Iterable):
        raise SafeLoraError(f"expected a path, a data set or a list of examples, got {type(source).__name__}.")
    return f"the {type(source).__name__}", iter(source)


def _read_text(path: Path) -> Iterator[Any]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return (line.strip() for line in lines if line.strip())


def _read_table(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",") if any(row)]
    if not rows:
        return iter(())
    known = {*_PROMPTS, *_DIALOGUES, *_CHATS}
    header = [name.strip() for name in rows[0]]
    if known & {name.lower() for name in header}:
        for i, row in enumerate(rows[1:], 2):
            if len(row) != len(header):
                raise SafeLoraError(f"{path}, record {i} has {len(row)} fields, the header {len(header)}.")
        return (dict(zip(header, row, strict=True)) for row in rows[1:])
    if all(len(row) == 1 for row in rows):
        return (row[0] for row in rows)
    widest = max(rows, key=len)
    raise SafeLoraError(
        f"{path} has {len(widest)} columns and no header that is known (its first row is {', '.join(rows[0])[:200]}). "
        f"Name the prompt's column one of {', '.join(_PROMPTS)}, and the answer's one of {', '.join(_RESPONSES)}."
    )


def _read_json(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):  # else lines of JSON under the wrong name
                raise
        else:
            if not isinstance(content, list):
                found = f"an object of {', '.join(content)}" if isinstance(content, dict) else type(content).__name__
                raise SafeLoraError(f"{path} holds {found[:200]}; expected a list of examples.")
            return iter(content)
    return iter([json.loads(line) for line in text.splitlines() if line.strip()])


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _read_json, ".json": _read_json, ".csv": _read_table, ".tsv": _read_table, ".txt": _read_text,
}  # fmt: skip


def _example(row: Any, where: str) -> Example:
    if isinstance(row, Example):
        return row
    if isinstance(row, str):
        return Example((_user(row, where),))
    if isinstance(row, Mapping):
        return _from_columns(row, where)
    if isinstance(row, Sequence) and row and all(isinstance(turn, Mapping) for turn in row):
        return _chat(row, where)
    if (
        isinstance(row, Sequence)
        and len(row) == 2
        and isinstance(row[0], str)
        and isinstance(row[1], (str, type(None)))
    ):
        return Example((_user(row[0], where),), row[1])
    raise SafeLoraError(
        f"{where} is {str(row)[:80]!r}; expected a dict, a string, a chat or a (prompt, response) pair."
    )


def _from_columns(row: Mapping[str, Any], where: str) -> Example:
    columns = {str(name).lower(): value for name, value in row.items() if value is not None and not _is_nan(value)}

    def first(names: Sequence[str]) -> Any:
        return next((columns[name] for name in names if name in columns), None)

    info = {key: value for key, names in _INFO.items() if (value := first(names)) not in (None, "")}
    if "goal" in columns and "behavior" in columns:  # JailbreakBench: the behaviour's name
        info.setdefault("behavior_id", columns["behavior"])
    chat = first(_CHATS)
    if chat is not None:
        return replace(_chat(chat, where), info=info)
    prompt, answer = first(_PROMPTS), first(_RESPONSES)
    if prompt is None and (dialogue := first(_DIALOGUES)) is not None:
        prompt, answer = f"Summarize this dialogue.\n\n{_text(dialogue, where)}", first(_SUMMARIES)
    if prompt is None:
        raise SafeLoraError(
            f"{where} has no prompt that is known: its columns are {', '.join(map(str, row))}. Expected one of "
            f"{', '.join((*_CHATS, *_PROMPTS, *_DIALOGUES))}."
        )
    if isinstance(answer, Sequence) and not isinstance(answer, str):  # TRL's conversational completion
        answer = answer[-1].get("content") if answer and isinstance(answer[-1], Mapping) else answer
    if answer is not None:
        answer = str(answer) if isinstance(answer, (int, float)) else _text(answer, where)
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt:
        if isinstance(prompt[0], Mapping):
            return replace(_chat([*prompt, *([] if answer is None else [_assistant(answer)])], where), info=info)
        prompt = prompt[0]  # MT-Bench: the first of its turns
    prompt = _text(prompt, where)
    if "instruction" in columns and (extra := first(("input", "context"))):
        prompt = f"{prompt}\n\n{_text(extra, where)}"
    if "context" in info:
        prompt = f"{info['context']}\n\n---\n\n{prompt}"
    return Example((_user(prompt, where),), answer, info)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _chat(turns: Any, where: str) -> Example:
    messages = []
    for turn in turns if isinstance(turns, Sequence) and not isinstance(turns, str) else ():
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        content = turn.get("content", turn.get("value")) if role is not None else None
        if content is None or role is None:
            raise SafeLoraError(f"{where}: expected turns of role and content, found {str(turn)[:80]!r}.")
        messages.append({"role": _ROLES.get(str(role), str(role)), "content": _text(content, where)})
    response = None
    if messages and messages[-1]["role"] == "assistant":
        response = messages.pop()["content"]
    if not messages or messages[-1]["role"] != "user":
        roles = ", ".join(message["role"] for message in messages) or "nothing"
        raise SafeLoraError(f"{where}: a conversation of {roles} has no turn of a user that could be answered.")
    return Example(tuple(messages), response)


def _user(content: str, where: str) -> dict[str, str]:
    if not content.strip():
        raise SafeLoraError(f"{where} has an empty prompt.")
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _text(value: Any, where: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):  # content in parts, as multimodal chats have it
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if parts and all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    if not isinstance(value, str):
        raise SafeLoraError(f"{where}: expected text, found {type(value).__name__} {str(value)[:60]!r}.")
    return value
