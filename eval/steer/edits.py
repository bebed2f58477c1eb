"""Edits of a model's activations at one hook, each with a strength, and the model run under them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...training.activations.insertions import Insertion, Intervention
from ...training.activations.splice import generate, model_spliced
from ..probing.subject import ProbeTarget


@dataclass(frozen=True, eq=False)
class Edit:
    """Change at the hook, on every token but the first: latents raised, latents set to zero, a vector added, or a prefix.

    ``amounts`` of latents and ``vector`` are those of strength 1; other strengths multiply both. Latents are raised by their
    amounts or, with ``floor``, to them where they are less active. Others are set to zero at any strength but 0. The
    dictionary's error is kept.
    """

    name: str
    latents: tuple[int, ...] = ()
    amounts: tuple[float, ...] = ()
    zeroed: tuple[int, ...] = ()
    vector: Float[Tensor, " d"] | None = None
    prefix: tuple[int, ...] = ()
    floor: bool = False

    def direction(self, subject: ProbeTarget) -> Float[Tensor, " d"]:
        """Return what strength 1 adds to the activation, without the latents set to zero."""
        if self.vector is not None:
            return self.vector
        dictionary = subject.dictionary
        rows = dictionary.atoms[list(self.latents)] * torch.tensor(self.amounts, device=dictionary.device)[:, None]
        return (rows.sum(0) * dictionary.out_scale).detach().float()


NO_EDIT = Edit("none")


# The first token of a context is left alone: BOS, or one that models attend to for want of it.
FIRST = 1


@dataclass(frozen=True)
class SteeredModel:
    """A model under edits: its logits, and its continuations of prompts."""

    subject: ProbeTarget
    seed: int = 0

    @torch.no_grad()
    def logits(
        self, token_ids: Int[Tensor, "contexts positions"], edit: Edit, strength: float
    ) -> Float[Tensor, "contexts positions vocabulary"]:
        """Return the logits at the positions of ``token_ids``; those of a prefix are left out."""
        ids = self._prefixed(token_ids, edit)
        insertions, edits = self._splice(edit, strength)
        with (
            self._added(edit, strength),
            model_spliced(self.subject.model, insertions, add_error=True, kept=self._kept(ids, insertions), edits=edits),
        ):
            return self.subject.model.logits(ids)[:, len(edit.prefix) :].float()

    def continuations(
        self, prompts: Int[Tensor, "prompts positions"], new: int, edit: Edit, strength: float
    ) -> Int[Tensor, "prompts new"]:
        """Return ``new`` tokens sampled behind each prompt at temperature 1."""
        ids = self._prefixed(prompts, edit)
        insertions, edits = self._splice(edit, strength)
        with self._added(edit, strength):
            found = generate(
                self.subject.model,
                ids,
                new,
                temperature=1.0,
                seed=self.seed,
                insertions=insertions,
                edits=edits,
                add_error=True,
                kept=self._kept(ids, insertions),
            )
        return found[:, ids.shape[1] :].cpu()

    def _prefixed(self, token_ids: Tensor, edit: Edit) -> Tensor:
        ids = token_ids.to(self.subject.model.device)
        if not edit.prefix:
            return ids
        prefix = torch.tensor(edit.prefix, device=ids.device).expand(len(ids), -1)
        return torch.cat([ids[:, :FIRST], prefix, ids[:, FIRST:]], dim=1)

    def _splice(self, edit: Edit, strength: float) -> tuple[tuple[Insertion, ...], list[Intervention]]:
        if strength == 0 or not (edit.latents or edit.zeroed):
            return (), []
        hooks = (self.subject.hook,)
        edits = []
        if edit.floor:
            amounts = zip(edit.latents, edit.amounts, strict=True)
            edits += [Intervention("clamp", (latent,), low=strength * amount) for latent, amount in amounts]
        elif edit.latents:
            edits.append(Intervention("add", edit.latents, value=strength * torch.tensor(edit.amounts)))
        if edit.zeroed:
            edits.append(Intervention("set", edit.zeroed, value=0.0))
        return (Insertion(self.subject.dictionary, hooks, hooks),), edits

    def _kept(self, ids: Tensor, insertions: Sequence[Any]) -> Tensor | None:
        if not insertions:
            return None
        kept = torch.ones(ids.shape, dtype=torch.bool)
        kept[:, :FIRST] = False
        return kept

    @contextmanager
    def _added(self, edit: Edit, strength: float) -> Iterator[None]:
        """Context manager that adds the edit's vector."""
        if edit.vector is None or strength == 0:
            yield
            return
        amount = (strength * edit.vector).to(self.subject.model.device)

        def changed(x: Tensor) -> Tensor:
            new = x.clone()
            new[:, FIRST:] += amount.to(x.dtype)
            return new

        with self.subject.model.replacing(self.subject.hook, changed):
            yield


def random_edit(
    edit: Edit, density: Float[np.ndarray, " n_latents"], subject: ProbeTarget, rng: np.random.Generator, name: str
) -> Edit:
    """Return an edit of as many other latents of about equal firing density, raised by a vector of equal norm.

    Each latent is replaced by one of the ten live latents nearest in log density that the edit does not touch. The edit must
    touch at most half of the live latents.
    """
    own = {*edit.latents, *edit.zeroed}
    others = [int(latent) for latent in np.flatnonzero(density > 0) if latent not in own]
    taken: dict[int, int] = {}
    for latent in (*edit.latents, *edit.zeroed):
        free = np.array([other for other in others if other not in taken.values()])
        distance = np.abs(np.log(density[free]) - np.log(max(density[latent], density[density > 0].min())))
        taken[latent] = int(rng.choice(free[np.argsort(distance, kind="stable")[:10]]))
    found = Edit(name, tuple(taken[latent] for latent in edit.latents), edit.amounts, tuple(taken[z] for z in edit.zeroed))
    scale = float(edit.direction(subject).norm() / found.direction(subject).norm().clamp_min(1e-12))
    return replace(found, amounts=tuple(scale * amount for amount in edit.amounts), floor=edit.floor)
