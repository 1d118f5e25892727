"""The one exception that is meant for the user's eyes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeGuard


def printable(name: str) -> str:
    """A file's name as it may be shown: what could break a line or steer a terminal is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def is_text(value: object) -> TypeGuard[str]:
    """True for text that a file can hold: JSON may name halves of a sign, which UTF-8 has not."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()


class UserError(Exception):
    """A mistake the user can mend: the message says what was expected, what was found and what to do.

    Shells (command line, stage runner, notebooks) print the message alone; any other exception is a bug and keeps
    its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        # IPython asks an exception for this: a notebook cell then ends in the sentence, without a traceback.
        return [f"{type(self).__name__}: {self}"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` when a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
