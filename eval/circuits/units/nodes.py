"""Nodes as units: latents, their errors, neurons, heads, components and residual positions, in any combination.

Every part of the space reads and writes at hooks of the model. It adds the difference between replacement and current values to
the activations, so with all units kept the output is bit-identical, and errors stay unless they are ablated.

Source: sparse feature circuits, Marks et al. 2024, arXiv:2403.19647; a transcoder's error is the rest of the MLP output.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ....sae import SparseDictionary
from ....sae.suggestions import require_choice
from ....training.activations.model import LanguageModel
from ....training.activations.routers import chosen_experts
from .passes import Seen
from .space import Space, State

ERRORS = ("node", "kept", "ablated")
POSITIONS = ("all", "each")


class Part(ABC):
    """Units that read at one hook and write at one hook, often the same. Their state has ``n_tensors`` tensors.

    ``routes`` is True if the hook is at the output of a mixture's router.
    """

    n_tensors: ClassVar[int] = 1
    routes: ClassVar[bool] = False

    def __init__(self, name: str, hook_in: str, hook_out: str):
        self.name, self.hook_in, self.hook_out = name, hook_in, hook_out

    @property
    @abstractmethod
    def n_units(self) -> int:
        """Number of units per position."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the activations at ``hook_out``."""

    @abstractmethod
    def labels(self) -> list[str]:
        """Return the name of every unit."""

    @abstractmethod
    def state(self, x: Float[Tensor, "pairs positions d_in"], y: Float[Tensor, "pairs positions d_out"]) -> State:
        """Return unit activations, ``n_tensors`` tensors."""

    @abstractmethod
    def slopes(self, grad: Float[Tensor, "pairs positions d_out"]) -> State:
        """Return the gradients with respect to unit activations, from the gradient at ``hook_out``."""

    @abstractmethod
    def past(
        self, x: Float[Tensor, "pairs positions d_in"], y: Float[Tensor, "pairs positions d_out"], state: State
    ) -> Float[Tensor, "pairs positions d_out"]:
        """Return the signal at ``hook_out`` that does not pass through the units, up to constants."""

    @abstractmethod
    def contrast(self, difference: State, slopes: State) -> Float[Tensor, "pairs positions n_units"]:
        """Return activation difference times slope for each unit and position."""

    @abstractmethod
    def change(
        self,
        x: Float[Tensor, "pairs positions d_in"],
        y: Float[Tensor, "pairs positions d_out"],
        absent: Float[Tensor, "#pairs #positions n_units"],
        filler: State,
    ) -> Float[Tensor, "pairs positions d_out"]:
        """Return the update at ``hook_out`` that takes a share of each unit (1: absent, 0: kept) from ``filler``."""

    def zeros(self, state: State) -> State:
        """Return the state of units that do nothing, in the form of ``state``."""
        return [torch.zeros_like(tensor) for tensor in state]

    def active(
        self, state: State, chosen: Bool[Tensor, "pairs positions n_units"] | None
    ) -> Float[Tensor, "pairs positions n_units"]:
        """Return 1 where a unit is active, else 0; ``chosen`` are the experts that a router chose.

        Raises:
            ValueError: If these units are not either active or silent.
        """
        raise ValueError(
            f"frequency: {self.name}: expected units that are active or silent (experts, latents, neurons behind a ReLU), got "
            "ones that always write. Use another method."
        )


class Coordinates(Part):
    """Coordinates of the activations at a hook, ``group`` per unit.

    Groups of one are neurons, groups of a head's width are heads (at site ``attn_heads``), one group of all is a component.
    """

    def __init__(self, name: str, hook: str, width: int, group: int):
        super().__init__(name, hook, hook)
        if group < 1 or width % group:
            raise ValueError(f"{name}: group: expected a divisor of the width at {hook}, {width}, got {group}.")
        self._width, self.group = width, group

    @property
    def n_units(self) -> int:
        return self._width // self.group

    @property
    def width(self) -> int:
        return self._width

    def labels(self) -> list[str]:
        return [self.name] if self.n_units == 1 else [f"{self.name}/{unit}" for unit in range(self.n_units)]

    def state(self, x: Tensor, y: Tensor) -> State:
        return [y]

    def slopes(self, grad: Tensor) -> State:
        return [grad]

    def past(self, x: Tensor, y: Tensor, state: State) -> Tensor:
        return torch.zeros_like(y)

    def contrast(self, difference: State, slopes: State) -> Tensor:
        return (difference[0] * slopes[0]).unflatten(-1, (self.n_units, self.group)).sum(-1)

    def change(self, x: Tensor, y: Tensor, absent: Tensor, filler: State) -> Tensor:
        return (filler[0] - y) * absent.repeat_interleave(self.group, -1)

    def active(self, state: State, chosen: Tensor | None) -> Tensor:
        return (state[0] > 0).to(state[0]) if self.group == 1 else super().active(state, chosen)


class Latents(Part):
    """Latents of an SAE or a transcoder, and its reconstruction error.

    ``errors`` says how the error is treated: ``node`` makes it the last unit, ``kept`` always keeps it, and ``ablated`` always
    ablates it, even if all units are kept.
    """

    n_tensors = 2

    def __init__(self, name: str, dictionary: SparseDictionary, hook_in: str, hook_out: str, errors: str = "node"):
        super().__init__(name, hook_in, hook_out)
        require_choice("errors", errors, ERRORS)
        if len(dictionary.sites) > 1:
            raise ValueError(
                f"{name}: expected a dictionary that writes at one hook, got a cross-layer one. Compute an attribution "
                "graph instead: sparsary circuits CHECKPOINT --prompt TEXT."
            )
        if dictionary.training:
            raise ValueError(
                f"{name}: expected a dictionary in eval mode, as codes depend on the batch in training. Call eval()."
            )
        self.dictionary, self.errors = dictionary, errors
        with torch.no_grad():
            # Decoder directions in raw units.
            self.atoms = (dictionary.atoms * dictionary.out_scale).detach()

    @property
    def n_units(self) -> int:
        return self.dictionary.n_latents + (self.errors == "node")

    @property
    def width(self) -> int:
        return self.dictionary.d_out

    def labels(self) -> list[str]:
        latents = [f"{self.name}/{latent}" for latent in range(self.dictionary.n_latents)]
        return [*latents, f"{self.name}/error"] if self.errors == "node" else latents

    def state(self, x: Tensor, y: Tensor) -> State:
        rows = x.flatten(0, 1)
        code = self.dictionary.encode(rows)
        error = y - self.dictionary.decode(code, rows).view(y.shape).to(y)
        return [code.to_dense(self.dictionary.n_latents).view(*y.shape[:2], -1).to(y), error]

    def slopes(self, grad: Tensor) -> State:
        return [grad @ self.atoms.to(grad).T, grad]

    def past(self, x: Tensor, y: Tensor, state: State) -> Tensor:
        if self.errors == "node":
            # Skip path and bias.
            around = self.dictionary.bypass(x.flatten(0, 1)) * self.dictionary.out_scale
            return around.expand(y.shape[0] * y.shape[1], -1).view(y.shape).to(y)
        return y - state[0] @ self.atoms.to(y)

    def contrast(self, difference: State, slopes: State) -> Tensor:
        latents = difference[0] * slopes[0]
        if self.errors != "node":
            return latents
        return torch.cat([latents, (difference[1] * slopes[1]).sum(-1, keepdim=True)], dim=-1)

    def change(self, x: Tensor, y: Tensor, absent: Tensor, filler: State) -> Tensor:
        if self.errors != "ablated" and not absent.requires_grad and not absent.any():
            return torch.zeros_like(y)
        n = self.dictionary.n_latents
        code = self.dictionary.encode(x.flatten(0, 1))
        values = code.to_dense(n).view(*y.shape[:2], -1).to(y)
        change = ((filler[0] - values) * absent[..., :n]) @ self.atoms.to(y)
        if self.errors == "kept":
            return change
        error = y - self.dictionary.decode(code, x.flatten(0, 1)).view(y.shape).to(y)
        return change + (filler[1] - error) * (absent[..., n:] if self.errors == "node" else 1.0)

    def active(self, state: State, chosen: Tensor | None) -> Tensor:
        fires = (state[0] != 0).to(state[0])
        # The error is there at every token.
        return torch.cat([fires, torch.ones_like(fires[..., :1])], dim=-1) if self.errors == "node" else fires


class NodeSpace(Space):
    """Parts of a model combined into one space. With ``positions="each"`` every position of a unit is a separate unit.

    Units are numbered part by part, then position by position; prompts must then have ``n_positions`` tokens.

    Raises:
        ValueError: If there are no parts, two share a name or an output hook, or a hook does not exist or has another width.
    """

    def __init__(self, model: LanguageModel, parts: Sequence[Part], positions: str = "all", n_positions: int | None = None):
        super().__init__(model)
        require_choice("positions", positions, POSITIONS)
        if (positions == "each") != (n_positions is not None):
            raise ValueError("n_positions: expected the length of all prompts if positions is 'each', else None.")
        self.parts, self.copies = list(parts), n_positions or 1
        self._require_valid()
        self.hooks = tuple(dict.fromkeys(hook for part in parts for hook in (part.hook_in, part.hook_out)))
        self.groups, end = {}, 0
        for part in parts:
            self.groups[part.name] = slice(end, end + part.n_units * self.copies)
            end += part.n_units * self.copies

    def _require_valid(self) -> None:
        if not self.parts:
            raise ValueError("parts: expected at least one, got none.")
        for kind, found in (("name", [p.name for p in self.parts]), ("hook", [p.hook_out for p in self.parts])):
            twice = sorted({name for name in found if found.count(name) > 1})
            if twice:
                raise ValueError(f"parts: expected every part with a {kind} of its own, got {', '.join(twice)} more than once.")
        widths = self.model.widths(tuple(dict.fromkeys(part.hook_out for part in self.parts)))
        for part in self.parts:
            if widths[part.hook_out] != part.width:
                raise ValueError(
                    f"{part.name}: expected the width at {part.hook_out} of {self.model.id}, {widths[part.hook_out]}, got a "
                    f"dictionary of {part.width} outputs, from another model or hook."
                )

    def names(self) -> list[str]:
        if self.copies == 1:
            return [label for part in self.parts for label in part.labels()]
        return [f"{label}@{at}" for part in self.parts for at in range(self.copies) for label in part.labels()]

    def state(self, seen: Seen) -> State:
        return [tensor for part in self.parts for tensor in part.state(seen[part.hook_in], seen[part.hook_out])]

    def slopes(self, seen: Seen, grads: Seen) -> State:
        return [tensor for part in self.parts for tensor in part.slopes(grads[part.hook_out])]

    def contrast(self, clean: State, corrupted: State, slopes: State) -> Float[Tensor, "pairs units"]:
        return self._by_unit([a - b for a, b in zip(clean, corrupted, strict=True)], slopes)

    def distance(self, a: State, b: State) -> Float[Tensor, "pairs units"]:
        difference = [x - y for x, y in zip(a, b, strict=True)]
        return self._by_unit(difference, difference).sqrt()

    def zeros(self, state: State) -> State:
        return [tensor for part, tensors in self._by_part(state) for tensor in part.zeros(tensors)]

    def frequency(self, token_ids: Int[Tensor, "pairs positions"], counted: Bool[Tensor, "pairs positions"]) -> Tensor:
        routers = {part.name: self.model.find(part.hook_out)[0] for part in self.parts if part.routes}
        with chosen_experts(routers, self.model.module) as chosen:
            _, state = self.see(token_ids)
        found = []
        for part, tensors in self._by_part(state):
            experts = chosen[part.name].unflatten(0, token_ids.shape) if part.routes else None
            weights = counted.to(tensors[0]) / counted.sum(1, keepdim=True).to(tensors[0])
            found.append(self._flat(part.active(tensors, experts) * weights[..., None]))
        return torch.cat(found, dim=1)

    def _by_part(self, state: State) -> Iterator[tuple[Part, State]]:
        at = 0
        for part in self.parts:
            yield part, state[at : at + part.n_tensors]
            at += part.n_tensors

    def run(self, token_ids: Int[Tensor, "pairs positions"], kept: Tensor, filler: State) -> Tensor:
        if self.copies > 1 and token_ids.shape[1] != self.copies:
            raise ValueError(f"positions: expected prompts of {self.copies} tokens, got {token_ids.shape[1]}.")
        kept = kept.to(self.model.device)
        # Keep a floating-point mask's precision, so that its gradients are no coarser.
        absent, live, readers, at = 1.0 - (kept if kept.is_floating_point() else kept.float()), {}, {}, 0
        for part in self.parts:
            end = at + part.n_tensors
            readers[part.hook_out] = self._writer(part, absent, filler[at:end], live)
            at = end
        writes = set(readers)
        for part in self.parts:
            if part.hook_in not in writes:
                readers[part.hook_in] = self._keeper(part.hook_in, live)
        with self.model.hooked(readers):
            return self.passes.run(token_ids)

    def _keeper(self, hook: str, live: Seen) -> Callable[[Tensor], None]:
        # A transcoder reads the input of its MLP, which modules may have overwritten in place by then.
        return lambda x: live.update({hook: x.clone()})

    def _writer(self, part: Part, absent: Tensor, filler: State, live: Seen) -> Callable[[Tensor], Tensor]:
        shares = self._shares(part, absent)

        def writer(y: Tensor) -> Tensor:
            x = y if part.hook_in == part.hook_out else live[part.hook_in]
            changed = y + part.change(x, y, shares.to(y), filler)
            live[part.hook_out] = changed
            return changed

        return writer

    def _shares(self, part: Part, absent: Tensor) -> Float[Tensor, "rows copies n_units"]:
        return absent.view(-1, absent.shape[-1])[:, self.groups[part.name]].unflatten(1, (self.copies, part.n_units))

    def _by_unit(self, difference: State, slopes: State) -> Float[Tensor, "pairs units"]:
        parts = zip(self._by_part(difference), self._by_part(slopes), strict=True)
        return torch.cat([self._flat(part.contrast(some, slope)) for (part, some), (_, slope) in parts], dim=1)

    def _flat(self, effects: Float[Tensor, "pairs positions n_units"]) -> Float[Tensor, "pairs units"]:
        return effects.sum(1) if self.copies == 1 else effects.flatten(1)
