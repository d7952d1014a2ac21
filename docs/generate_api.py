"""Writes docs/api.md from the docstrings of everything public. A test holds the page to them.

python docs/generate_api.py
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
MODULES = ("safelora_kernels", "safelora", "safelora.salora")
HEAD = """\
# API

Generated from the docstrings by `python docs/generate_api.py`; do not edit. `sk.reference` has the functions of
`safelora_kernels` without `backend`, in plain torch.
"""


def signature(name: str, value: Any) -> str:
    try:
        found = str(inspect.signature(value))
    except (TypeError, ValueError):
        return name
    found = found.replace("'", "").replace("typing.", "")
    return name + re.sub(r"ForwardRef\(([^()]*(?:\[[^()]*\])?)\)", r"\1", found)


def methods(value: type) -> list[tuple[str, Any]]:
    """Public methods and properties that the class itself defines, with a docstring."""
    own = []
    for name, member in vars(value).items():
        target = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not name.startswith("_") and inspect.getdoc(target) and (callable(target) or isinstance(target, property)):
            own.append((name, target))
    return own


def entry(name: str, value: Any) -> list[str]:
    if inspect.ismodule(value):
        return []
    is_class = isinstance(value, type)
    plain = is_class and (dataclasses.is_dataclass(value) or issubclass(value, BaseException))
    parts = [name if plain else signature(name, value), "", inspect.getdoc(value) or ""]
    for method, member in methods(value) if is_class else []:
        head = method if isinstance(member, property) else signature(method, member)
        doc = "\n".join(f"    {line}" for line in (inspect.getdoc(member) or "").splitlines())
        parts += ["", f"{name}.{head}", "", doc]
    text = "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()).strip()
    return [f"### `{name}`", "", "```text", text, "```", ""]


def page() -> str:
    lines = [HEAD]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += [f"## `{name}`", "", (inspect.getdoc(module) or "").split("\n\n")[0], ""]
        for public in sorted(module.__all__, key=str.lower):
            lines += entry(public, getattr(module, public))
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
