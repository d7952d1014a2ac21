"""Calibration examples that come with the package, and forbidden requests wrapped in a task's own context."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SafeLoraError

if TYPE_CHECKING:
    from ..data import Example

EXAMPLE_SETS = ("safety", "records", "general")


def example_data(name: Literal["safety", "records", "general"]) -> list[Example]:
    """A small set of examples, written for this package, to start with or to see what is expected.

    safety: 48 requests of many kinds that a model should refuse, each with a refusal; they hold no instructions.
        Replace or extend them by the requests that your model must refuse, in the words of your users.
    records: 24 sentences to be written as records, a narrow task. general: 24 everyday questions with short answers,
        which may be added to a task's examples where the adapter should stay what it is in general conversation.

    Raises SafeLoraError for another name.
    """
    from ..data import load_examples

    if name not in EXAMPLE_SETS:
        raise SafeLoraError(f"there is no example set {name!r}; there are {', '.join(EXAMPLE_SETS)}.")
    return load_examples(Path(__file__).with_name("data") / f"{name}.jsonl")


def wrapped_prompts(
    safety_data: Any, task_data: Any, *, limit: int | None = None, refusal: str | None = None, seed: int = 0
) -> list[Example]:
    """Forbidden requests inside the task's own context, to be added to the safety examples.

    A filter tells safety inputs from task inputs by what is in them, and a request that follows a piece of the task
    looks like the task. Calibrating with such requests closes this hole in part. Each safety example is used at most
    once, in turn behind the words that all task prompts begin with (where they share any), and behind a whole task
    prompt.

    Args:
        safety_data, task_data: as for :func:`safelora.filter_adapter`, as text. System turns are those of the task.
        limit: how many to make at most; by default one for each safety example.
        refusal: the answer where a safety example has none.
        seed: of the choice of examples.

    Raises SafeLoraError for data that cannot be read.
    """
    from ..data import load_examples

    safety = load_examples(safety_data, response=refusal)
    task = load_examples(task_data)
    draw = random.Random(seed)
    chosen = draw.sample(safety, min(len(safety), limit or len(safety)))
    opening = _opening([example.prompt for example in task])
    wrap: list[Callable[[str, str], str]] = [lambda context, request: f"{context} {request}"]
    if opening:
        wrap.insert(0, lambda _, request: opening + request)
    made = []
    for index, example in enumerate(chosen):
        around = draw.choice(task)
        content = wrap[index % len(wrap)](around.prompt, example.prompt)
        last = {**around.messages[-1], "content": content}
        made.append(replace(example, messages=(*around.messages[:-1], last)))
    return made


def _opening(prompts: Sequence[str]) -> str:
    """The words that all prompts begin with, up to a space."""
    first, last = min(prompts), max(prompts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    common = first[:length]
    return common[: max(common.rfind(" "), common.rfind("\n")) + 1]
