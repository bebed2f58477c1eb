"""numba's compiler, with an on-disk cache where possible."""

from collections.abc import Callable
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return ``numba.njit`` with ``cache=True`` if the cache can be written."""

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            # Nowhere to write: a read-only installation and no home directory. Every process then compiles for itself.
            return numba.njit(**options)(function)

    return compile_
