"""Spelling suggestions for error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return a sentence, with a leading space, suggesting the choice closest to ``word``; empty if none is close.

    Close means difflib's default, a similarity of at least 0.6.

    >>> did_you_mean("topkk", ["relu", "topk"])
    " Did you mean 'topk'?"
    >>> did_you_mean("gelu_new", ["topk"])
    ''
    """
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def require_choice(where: str, word: object, choices: Iterable[str], of: str = "") -> str:
    """Return ``word`` if it is one of the choices.

    Args:
        where: Argument or key that ``word`` was given for; the error message begins with it.
        of: Text after the list, such as `` for ioi``.

    Raises:
        ValueError: If it is not; the message lists the choices and suggests the nearest.
    """
    choices = list(choices)
    if word not in choices:
        raise ValueError(f"{where}: expected one of {', '.join(choices)}{of}, got {word!r}.{did_you_mean(str(word), choices)}")
    return str(word)
