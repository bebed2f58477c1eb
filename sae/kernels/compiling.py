"""numba's compiler, with what it compiles kept on disk where there is a place for it."""

from collections.abc import Callable
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with ``cache=True``, if that can be had."""

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            # Nowhere to write: a read-only installation and no home. Every process then compiles for itself.
            return numba.njit(**options)(function)

    return compile_
