"""The code blocks of the documents, and how each kind is checked.

Every block names its language. `python` blocks of a document run in order, in one namespace. Of `shell` blocks, each
line that starts with `safelora` runs; the comment ``<!-- not run: reason -->`` before a block leaves it at parsing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .building import ROOT

_FENCE = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE
)
_EXCUSE = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*\Z")
LANGUAGES = {"python", "shell", "text", "json", "yaml", "cpp", "cmake", "diff", "bibtex"}
# Programs that the documents may call beside those that are looked into.
PROGRAMS = {"pip", "git", "cmake", "cd", "export", "torchrun", "lm_eval", "vllm", "accelerate", "source"}


class Block(NamedTuple):
    """One fenced block; ``excuse`` says why it is not run, empty if it is to run."""

    language: str
    text: str
    line: int
    excuse: str


def documents() -> list[Path]:
    """Every page of the repository."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return sorted(pages)


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        excuse = _EXCUSE.search(text[: match.start()])
        indent = match["indent"]
        body = re.sub(rf"^{indent}", "", match["body"], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match["language"].strip(), body, line, excuse["reason"] if excuse else ""))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every command of a shell block: continued lines are joined, prompts, comments and settings go."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        part: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", "|", ";"):
                if part:
                    yield part
                part = []
            elif part or not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word):
                part.append(word)
