"""The mark a projection leaves in the model card: a block in the front matter and a section in the text."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from .adapter import METADATA_KEY

_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SCALAR = re.compile(r"^([A-Za-z_]+):[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_TAG_LIST = re.compile(r"^tags:[ \t]*\n((?:[ \t]*- .*\n)*)", re.MULTILINE)


class Mention(NamedTuple):
    """What a model card says of a method: values for its front matter, heading and text of a section; and the model
    that it was applied to an adapter or a finetune (`relation`) of."""

    values: dict[str, Any]
    heading: str
    text: str
    model: str
    relation: str = "adapter"


def write_mention(path: Path, key: str, mention: Mention) -> None:
    """Add a mention to the model card at `path`, which is created when missing; the rest stays as it is.

    It is the block `key` in the front matter, a tag, and a section; also base_model and base_model_relation, where the
    card lacks them and the model is a repository (the hub refuses a path).
    """
    text = path.read_bytes().decode("utf-8", "surrogateescape").replace("\r\n", "\n") if path.exists() else ""
    own_block = re.compile(rf"^{key}:[ \t]*\n(?:[ \t]+.*\n)*", re.MULTILINE)
    found = _FRONT_MATTER.match(text)
    front, body = (own_block.sub("", found[1]), text[found.end() :]) if found else ("", text)
    block = f"{key}:\n" + "".join(f"  {name}: {json.dumps(value)}\n" for name, value in mention.values.items())
    front = _linked(_tagged(front), mention.model, mention.relation) + block
    body = body.rstrip("\n") + f"\n\n## {mention.heading}\n\n{mention.text}\n"
    path.write_bytes(f"---\n{front}---\n{body}".encode("utf-8", "surrogateescape"))


def front_matter(text: str) -> dict[str, str]:
    """The one-line entries of a model card's front matter, unquoted."""
    found = _FRONT_MATTER.match(text.replace("\r\n", "\n"))
    return {key: value.strip("\"'") for key, value in _SCALAR.findall(found[1])} if found else {}


def is_repository(name: str) -> bool:
    """Whether `name` has the form of a repository on the hub, and is not a directory here."""
    return bool(_REPOSITORY.fullmatch(name)) and not os.path.exists(name)


def _linked(front: str, model: str, relation: str) -> str:
    if re.search("^base_model:", front, re.MULTILINE) or not is_repository(model):
        return front
    front += f"base_model: {model}\n"
    has_relation = re.search("^base_model_relation:", front, re.MULTILINE)
    return front if has_relation else f"{front}base_model_relation: {relation}\n"


def _tagged(front: str) -> str:
    found = _TAG_LIST.search(front)
    if found is None:
        return front if re.search(r"^tags:", front, re.MULTILINE) else f"{front}tags:\n- {METADATA_KEY}\n"
    items = found[1]
    if re.search(rf"^[ \t]*- {METADATA_KEY}[ \t]*$", items, re.MULTILINE):
        return front
    indent = items[: items.index("-")] if items else ""
    return f"{front[: found.end()]}{indent}- {METADATA_KEY}\n{front[found.end() :]}"
