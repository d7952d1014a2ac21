"""Rules: ways of changing the factors of a trained adapter, each with one parameter that `safelora frontier` sweeps.

Every module of this package whose name has no leading underscore is a rule and names its class ``RULE``; adding a file
adds a rule. A rule of another package is named MODULE:CLASS.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..errors import SafeLoraError
from ._alignment import selects
from ._rule import Change, Rule, Subject

__all__ = ["Change", "Rule", "Subject", "make_rule", "rule_names", "selects"]


def rule_names() -> list[str]:
    """The names of the rules of this package."""
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def make_rule(spec: str) -> Rule:
    """The rule that a name stands for: ``unit``, ``safe_lora_exact:energy=0.5`` or ``package.module:Class``, where
    options may follow a further colon.

    Raises SafeLoraError for an unknown name or option.
    """
    name, _, rest = spec.partition(":")
    if name in rule_names():
        found: Any = importlib.import_module(f".{name}", __name__).RULE
    else:
        from ..judge import import_named

        attribute, _, rest = rest.partition(":")
        found = import_named(f"{name}:{attribute}")
        if not (isinstance(found, type) and issubclass(found, Rule)):
            reason = f" ({type(found).__name__}: {found})" if isinstance(found, Exception) else ""
            raise SafeLoraError(
                f"unknown rule {spec!r}{reason}: expected one of {', '.join(rule_names())}, or MODULE:CLASS of a "
                "safelora.rules.Rule."
            )
    options = {}
    for word in filter(None, rest.split(",")):
        key, equals, value = word.partition("=")
        if not equals or key not in found.options():
            known = ", ".join(found.options()) or "none"
            raise SafeLoraError(f"rule {spec!r}: unknown option {key!r}; it has {known}.")
        options[key] = _number(value)
    rule: Rule = found(**options)
    return rule


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
