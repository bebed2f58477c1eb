"""Questions to ask a loaded dictionary: its hook and model, a latent's direction, the latents that fire on an input."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .sparse_code import SparseCode


class LatentActivation(NamedTuple):
    """The strongest activation of one latent, in the units of ``encode``, and the token it occurs on."""

    latent: int
    value: float
    token: int


def hooks_of_provenance(provenance: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the hooks a dictionary reads and the hooks it writes, from its checkpoint's provenance.

    Raises:
        ValueError: If the provenance names none.
    """
    hook = provenance.get("hook")
    one = (hook,) if hook else ()
    reads, writes = (tuple(provenance.get(key) or one) for key in ("hooks_in", "hooks_out"))
    if not reads or not writes:
        raise ValueError("provenance: expected the hooks the dictionary was trained on, found none. Train it on a model.")
    return reads, writes


class Inspection:
    """Methods of ``SparseDictionary`` that answer questions and change nothing."""

    if TYPE_CHECKING:
        # Of SparseDictionary.
        d_in: int
        d_out: int
        n_latents: int
        out_scale: Float[Tensor, "..."]

        @property
        def blocks(self) -> list[Any]: ...
        def arguments(self) -> dict[str, Any]: ...
        def encode(self, x: Any, grad: Any = None) -> SparseCode: ...
        def _padded(self, columns: Tensor, writes: slice) -> Tensor: ...

    # Set by loading: the checkpoint's record of model, hooks, text and recipe. Empty for a dictionary built in Python.
    provenance: dict[str, Any]

    @property
    def hooks(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The hooks the dictionary reads and the hooks it writes, in the order of its sites.

        Raises:
            ValueError: If the checkpoint names none, as for a dictionary trained on a user's tensors.
        """
        return hooks_of_provenance(self.provenance)

    @property
    def hook(self) -> str | None:
        """The hook it writes; ``None`` if it writes several, or the checkpoint names none."""
        written = tuple(self.provenance.get("hooks_out") or ()) or (self.provenance.get("hook"),)
        return written[0] if len(written) == 1 else None

    @property
    def model_id(self) -> str | None:
        """The hub id or directory of the language model it was trained on; ``None`` if unknown."""
        return (self.provenance.get("model") or {}).get("id")

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The resolved recipe it was trained by; ``None`` for dictionaries of other libraries."""
        return self.provenance.get("recipe")

    def direction(self, latent: int) -> Float[Tensor, " d_out"]:
        """Return the decoder direction of a latent: its contribution to the output per unit of activation, in raw units.

        >>> import torch
        >>> from sparsary import ENCODERS, SAE
        >>> sae = SAE(5, 7, ENCODERS["topk"](k=2)).eval()
        >>> x = torch.randn(3, 5)
        >>> written = sum(sae.activations_of(i, x)[:, None] * sae.direction(i) for i in range(7))
        >>> torch.allclose(sae(x), written + sae.b_dec, atol=1e-5)
        True

        Raises:
            ValueError: If there is no such latent.
        """
        self._require_latents([latent])
        block = next(block for block in self.blocks if block.latents.start <= latent < block.latents.stop)
        row = block.weights.W_dec[latent - block.latents.start].detach()
        return self._padded(row[None], block.writes)[0] * self.out_scale

    @torch.no_grad()
    def activations_of(self, latents: int | Sequence[int], x: Any) -> Float[Tensor, "..."]:
        """Return the activations of one latent on raw inputs, ``(tokens,)``, or of several, ``(tokens, latents)``.

        They are the values of ``encode``; multiplied by ``direction`` they are contributions in raw units. Inputs of shape
        (batch, position, d_in) give (batch, position) or (batch, position, latents).

        Raises:
            ValueError: If there is no such latent, one is named twice, or ``x`` is not ``(tokens, d_in)``.
        """
        one = isinstance(latents, int | np.integer)
        wanted = [int(latents)] if one else [int(latent) for latent in latents]  # pyright: ignore
        self._require_latents(wanted)
        code = self.encode(x)
        columns = code.columns(torch.tensor(wanted, dtype=torch.long, device=code.latents.device))
        columns = columns.unflatten(0, code.batch_shape) if code.batch_shape else columns
        return columns[..., 0] if one else columns

    @torch.no_grad()
    def top_latents(self, x: Any, n: int = 10) -> list[LatentActivation]:
        """Return the ``n`` latents with the largest activations on raw inputs, each with its strongest token.

        Raises:
            ValueError: If ``n`` is below 1, or ``x`` is not ``(tokens, d_in)``.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}.")
        code = self.encode(x)
        values = code.values.cpu().numpy()
        order = np.argsort(-values, kind="stable")
        order = order[values[order] != 0]
        latents, tokens = (part.cpu().numpy()[order] for part in (code.latents, code.token_ids()))
        first = np.sort(np.unique(latents, return_index=True)[1])[:n]
        return [LatentActivation(int(latents[i]), float(values[order[i]]), int(tokens[i])) for i in first]

    def _require_latents(self, latents: Sequence[int]) -> None:
        wrong = [latent for latent in latents if not 0 <= latent < self.n_latents]
        if wrong:
            raise ValueError(f"latent: expected 0 to {self.n_latents - 1}, got {', '.join(map(str, wrong))}.")

    def __repr__(self) -> str:
        if "encoder" not in self.__dict__.get("_modules", ()):
            # Half built, in the message of an error in its constructor.
            return f"{type(self).__name__}(...)"
        encoder = dict(self.arguments()["encoder"])
        name = encoder.pop("name")
        settings = "".join(f", {key}={value!r}" for key, value in encoder.items())
        about = "".join(
            f", {key}={value!r}" for key, value in (("hook", self.hook), ("model_id", self.model_id)) if value is not None
        )
        return f"{type(self).__name__}({self.d_in} -> {self.n_latents} latents -> {self.d_out}, {name}{settings}{about})"
