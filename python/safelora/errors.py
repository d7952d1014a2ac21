"""The one exception type for input that cannot be projected."""

from __future__ import annotations


class SafeLoraError(ValueError):
    """An input, option or output location that cannot be used; the message says what, why and what to do."""
