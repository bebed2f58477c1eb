"""Griffe extension: examples in docstrings (``>>>``) become code blocks, which Markdown would take for quotations."""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Return a docstring with its doctests in fences, and with ``example::`` before a literal block as ``example:``."""
    lines, inside = [], False
    for line in text.split("\n"):
        if not inside and line.startswith(">>> "):
            lines += ["```pycon"] if not lines or not lines[-1] else ["", "```pycon"]
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return re.sub(r"::$", ":", "\n".join([*lines, "```"] if inside else lines), flags=re.MULTILINE)
