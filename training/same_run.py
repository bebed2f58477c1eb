"""Checks that the ranks of a run agree: on recipes, on code, and on a number of ranks that divides the work."""

from collections.abc import Sequence

import torch

from ..sae.ranks import Ranks
from .divided import divides_batch, require_divisible
from .processes import mesh, require_agreement
from .recipe import Recipe, dump_recipe
from .versions import git_commit, own_version


def require_same_run_on_all(ranks: Ranks, recipes: Sequence[Recipe]) -> None:
    """Raise ``ValueError`` on all ranks unless they run the same recipes and code, which their number can share."""
    if ranks.size == 1:
        return
    require_agreement(ranks, same_on_all(recipes))
    for recipe in recipes:
        require_divisible(recipe)
        parts = mesh(recipe.distributed.latents).batch.size * recipe.accumulate
        if not divides_batch(recipe.batch_tokens, parts // recipe.accumulate, recipe.accumulate):
            raise ValueError(
                f"batch_tokens: expected a multiple of {parts} ({parts // recipe.accumulate} parts of a batch x accumulate "
                f"{recipe.accumulate}), got "
                f"{recipe.batch_tokens}. Set batch_tokens to {-(-recipe.batch_tokens // parts) * parts}."
            )


def same_on_all(recipes: Sequence[Recipe]) -> dict[str, str]:
    """Return what must be the same on all ranks, by its name in messages."""
    code = f"sparsary {own_version()}, commit {git_commit()}, torch {torch.__version__}"
    return {"recipe": "\n".join(map(dump_recipe, recipes)), "code": code}
