"""Run-time checks of every shape annotation during tests. Loaded by ``conftest.py`` before sparsary is imported."""

import ast
import dataclasses
import functools
from pathlib import Path

import jaxtyping
import pytest
from beartype import beartype
from jaxtyping import _import_hook, install_import_hook, jaxtyped

# Runs before sparsary is imported, because functions are wrapped when their module is loaded. The corpus is left out: it
# calls small functions millions of times and contains no tensors.
CHECKED = (
    "activations calibrate checkpoints initialize loop objective optim phases preflight recipe resolve_hooks run state".split()
)
# The kernels are left out too, because compilers need the unwrapped functions.
SAE = [path.stem for path in (Path(__file__).parents[1] / "sae").iterdir() if path.stem not in ("__init__", "kernels")]
SHAPED = {name for name in dir(jaxtyping) if isinstance(getattr(jaxtyping, name), type)}


def shaped(annotations):
    """Return True if an annotation says a shape."""
    nodes = (node for annotation in annotations if annotation is not None for node in ast.walk(annotation))
    return any(isinstance(node, ast.Name) and node.id in SHAPED for node in nodes)


# Calls of a function that are checked in each test. Later ones, in a loop of training steps, would find no more and take a
# quarter of the tests' time.
CHECKED_CALLS = 4
# The number of the current test.
TEST = 0


def checked_at_first(part):
    """Check the shapes of a function, or of a dataclass' fields, in its first calls of every test."""
    if isinstance(part, type):
        if dataclasses.is_dataclass(part) and "__init__" in vars(part):
            part.__init__ = checked_at_first(part.__init__)
        return part
    checked, test, left = jaxtyped(part, typechecker=beartype), 0, CHECKED_CALLS

    @functools.wraps(part)
    def call(*arguments, **options):
        nonlocal test, left
        if test != TEST:
            test, left = TEST, CHECKED_CALLS
        if left <= 0:
            return part(*arguments, **options)
        left -= 1
        return checked(*arguments, **options)

    return call


class ShapeChecks(_import_hook.JaxtypingTransformer):
    """Wraps what has shapes in its annotations, and no functions within functions: those would be wrapped at every call.

    Wrapping everything, as jaxtyping does, takes half of the tests' time; other types are pyright's.
    """

    def visit_FunctionDef(self, node):  # noqa: N802 - the visitor's name
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if shaped([node.returns, *(argument.annotation for argument in arguments)]):
            node.decorator_list.append(self.decorator(node))
        return node

    def visit_ClassDef(self, node):  # noqa: N802
        if node.decorator_list and shaped([field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]):
            node.decorator_list.insert(0, self.decorator(node))
        return self.generic_visit(node) or node

    def decorator(self, node):
        # The hook imports jaxtyping into every module that it loads.
        return ast.copy_location(ast.parse("jaxtyping._import_hook.checked_at_first", mode="eval").body, node)


_import_hook.checked_at_first = checked_at_first
_import_hook.JaxtypingTransformer = ShapeChecks
parts = [*(f"sae.{name}" for name in SAE), "transcoders", "eval", *(f"training.{name}" for name in CHECKED)]
checked = [f"sparsary.{part}" for part in parts]
# The name is part of the name of the bytecode's file.
install_import_hook(checked, "jaxtyping._import_hook.checked_at_first")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    global TEST
    TEST += 1
