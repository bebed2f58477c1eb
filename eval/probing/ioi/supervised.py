"""Supervised feature dictionaries of the indirect object identification (IOI) task."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..subject import ProbeTarget
from .prompts import Prompts

BATCH = 64


@torch.no_grad()
def cross_section(subject: ProbeTarget, prompts: Prompts) -> Float[Tensor, "prompts 4 d"]:
    """Return the activations at the four positions."""
    found = []
    for ids, places in zip(prompts.token_ids.split(BATCH), prompts.places.split(BATCH), strict=True):
        seen = subject.model.activations(ids.to(subject.model.device), (subject.hook,))[subject.hook].float().cpu()
        found.append(seen.gather(1, places[..., None].expand(-1, -1, seen.shape[-1])))
    return torch.cat(found)


@torch.no_grad()
def end_logits(
    subject: ProbeTarget, prompts: Prompts, positions: Sequence[int] = (), put: Float[Tensor, "prompts 4 d"] | None = None
) -> Float[Tensor, "prompts names"]:
    """Return the logits of the names at END, with the activations at some of the four positions replaced."""
    model, found = subject.model, []
    for start in range(0, len(prompts.token_ids), BATCH):
        rows = slice(start, start + BATCH)
        ids, places = prompts.token_ids[rows].to(model.device), prompts.places[rows].to(model.device)
        line = torch.arange(len(ids), device=model.device)

        def change(x: Tensor, rows: slice = rows, places: Tensor = places, line: Tensor = line) -> Tensor:
            x = x.clone()
            for position in positions:
                assert put is not None
                x[line, places[:, position]] = put[rows, position].to(x)
            return x

        with model.replacing(subject.hook, change):
            logits = model.logits(ids)
        found.append(logits[line, places[:, 3]][:, prompts.name_ids.to(model.device)].float().cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Supervised:
    """Supervised dictionary: a mean activation and one feature per attribute value, at every position."""

    mean: Float[Tensor, "4 d"]
    features: dict[str, Float[Tensor, "values 4 d"]]

    def reconstruct(self, prompts: Prompts) -> Float[Tensor, "prompts 4 d"]:
        return self.mean + sum(self.of(prompts, name) for name in self.features)

    def of(self, prompts: Prompts, attribute: str) -> Float[Tensor, "prompts 4 d"]:
        """Return each prompt's feature of an attribute."""
        return self.features[attribute][torch.from_numpy(prompts.values(attribute))]


def mean_dictionary(x: Float[Tensor, "prompts 4 d"], prompts: Prompts) -> Supervised:
    """Fit features as conditional means minus the overall mean; optimal if attributes are independent."""
    mean = x.mean(0)
    sizes = {"io": len(prompts.name_ids), "s": len(prompts.name_ids), "pos": 2}
    features = {}
    for name, size in sizes.items():
        values = torch.from_numpy(prompts.values(name))
        sums = torch.zeros(size, *x.shape[1:]).index_add_(0, values, x - mean)
        features[name] = sums / torch.bincount(values, minlength=size).clamp_min(1)[:, None, None]
    return Supervised(mean, features)


def least_squares_dictionary(x: Float[Tensor, "prompts 4 d"], prompts: Prompts) -> Supervised:
    """Fit features as least-squares coefficients of one-hot attributes; equal to the means in a balanced design."""
    mean = x.mean(0)
    sizes = {"io": len(prompts.name_ids), "s": len(prompts.name_ids), "pos": 2}
    design = torch.cat(
        [torch.nn.functional.one_hot(torch.from_numpy(prompts.values(n)), size).double() for n, size in sizes.items()], 1
    )
    # Minimum-norm solution, because the one-hot columns of an attribute sum to a constant.
    solution = torch.linalg.pinv(design) @ (x - mean).double().flatten(1)
    parts = solution.float().unflatten(1, x.shape[1:]).split(list(sizes.values()))
    return Supervised(mean, dict(zip(sizes, parts, strict=True)))


def logit_difference(logits: Float[Tensor, "prompts names"], prompts: Prompts) -> Float[np.ndarray, " prompts"]:
    line = torch.arange(len(logits))
    return (logits[line, torch.from_numpy(prompts.io)] - logits[line, torch.from_numpy(prompts.s)]).numpy()


@torch.no_grad()
def prompt_codes(subject: ProbeTarget, x: Float[Tensor, "prompts 4 d"]) -> Float[Tensor, "prompts 4 n_latents"]:
    found = [subject.encode(part).to_dense(subject.dictionary.n_latents).float().cpu() for part in x.flatten(0, 1).split(1024)]
    return torch.cat(found).unflatten(0, x.shape[:2])
