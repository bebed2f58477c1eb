"""Optional packages, and the extras of ``pyproject.toml`` that install them."""

from collections.abc import Iterator
from contextlib import contextmanager

# Module -> (package name, extra).
OPTIONAL = {
    "accelerate": ("accelerate", "train"),
    "datasets": ("datasets", "train"),
    "filelock": ("filelock", "train"),
    "fsspec": ("fsspec", "train"),
    "numba": ("numba", "train"),
    "psutil": ("psutil", "train"),
    "pyarrow": ("pyarrow", "train"),
    "pydantic": ("pydantic", "train"),
    "rich": ("rich", "train"),
    "ruamel": ("ruamel.yaml", "train"),
    "tokenizers": ("tokenizers", "train"),
    "transformers": ("transformers", "train"),
    "typer": ("typer", "train"),
    "httpx": ("httpx", "eval"),
    "jinja2": ("jinja2", "eval"),
    "matplotlib": ("matplotlib", "eval"),
    "pandas": ("pandas", "eval"),
    "yaml": ("pyyaml", "eval"),
    "scipy": ("scipy", "eval"),
    "sklearn": ("scikit-learn", "eval"),
    "peft": ("peft", "peft"),
    "wandb": ("wandb", "wandb"),
}


class MissingPackageError(ImportError, ValueError):
    """Error for a missing optional package, naming the extra that installs it. A ``ValueError``, as users can fix it."""


@contextmanager
def needs(what: str, extra: str | None = None) -> Iterator[None]:
    """Turn a failed import of an optional package into one line: what needs it, and how to install it.

    >>> with needs("sparsary.evaluate"):
    ...     raise ModuleNotFoundError(name="sklearn.linear_model")
    Traceback (most recent call last):
    sparsary.sae.extras.MissingPackageError: sparsary.evaluate: needs scikit-learn: pip install 'sparsary[eval]'

    Args:
        what: Name that begins the message.
        extra: Extra to suggest, if more than the package's own is needed.

    Raises:
        MissingPackageError: If the missing module belongs to an extra. Other errors pass through.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in OPTIONAL:
            raise
        package, own = OPTIONAL[module]
        # An extra includes those below it: eval includes train. wandb and peft are in neither.
        wanted = own if extra is None or own in ("wandb", "peft") else extra
        raise MissingPackageError(f"{what}: needs {package}: pip install 'sparsary[{wanted}]'", name=error.name) from None
