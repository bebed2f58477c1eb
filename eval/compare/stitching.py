"""Latents of two dictionaries: decoder directions matched one to one, and latents of one stitched into the other.

Sources: matching by optimal assignment, and the cosine above which two latents count as the same, of Paulo and Belrose 2025,
arXiv:2501.16615; novel and reconstruction latents of Leask et al. 2025, arXiv:2502.04878.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...sae.dictionary import SparseDictionary
from ...sae.metrics import RunningFvu

# Latents with this cosine count as the same.
SAME = 0.7
# Largest matrix of cosines that is matched: 8,192 latents on both sides take about a minute.
MATCHED_ENTRIES = 2**26
# Entries of a block of cosines, and tokens at a time.
BLOCK_ENTRIES, ROWS_AT_ONCE = 2**24, 512


@dataclass(frozen=True, eq=False)
class LatentMatching:
    """Cosines between the decoder directions of two dictionaries.

    Args:
        nearest_a: Of every latent of the first, the largest cosine with any of the second.
        nearest_b: The same the other way round.
        cosines: Cosines of the optimal one-to-one matching, as many as the smaller has latents; None if there are too many.
        partners: Latents of the first and the second that are matched.
    """

    nearest_a: Float[np.ndarray, " latents_a"]
    nearest_b: Float[np.ndarray, " latents_b"]
    cosines: Float[np.ndarray, " matched"] | None
    partners: tuple[np.ndarray, np.ndarray] | None


def match_latents(a: Float[Tensor, "latents_a d"], b: Float[Tensor, "latents_b d"], one_to_one: bool = True) -> LatentMatching:
    """Match directions one to one so that the sum of cosines is largest, and find each one's nearest."""
    a, b = (torch.nn.functional.normalize(atoms.detach().float(), dim=-1) for atoms in (a, b))
    whole = one_to_one and len(a) * len(b) <= MATCHED_ENTRIES
    nearest_a, nearest_b, blocks = [], torch.full((len(b),), -1.0, device=b.device), []
    step = max(1, BLOCK_ENTRIES // len(b))
    for begin in range(0, len(a), step):
        cosines = a[begin : begin + step] @ b.T
        nearest_a.append(cosines.amax(1))
        nearest_b = torch.maximum(nearest_b, cosines.amax(0))
        if whole:
            blocks.append(cosines.cpu().numpy())
    ends = torch.cat(nearest_a).cpu().numpy(), nearest_b.cpu().numpy()
    if not whole:
        return LatentMatching(*ends, None, None)
    cosines = np.concatenate(blocks)
    partners = linear_sum_assignment(cosines, maximize=True)
    return LatentMatching(*ends, cosines[partners], partners)


def random_cosines(n_a: int, n_b: int, d: int, seed: int = 0) -> Float[np.ndarray, " matched"] | None:
    """Return the matched cosines of random directions in place of both dictionaries; None if there are too many."""
    if n_a * n_b > MATCHED_ENTRIES:
        return None
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, d, generator=draw) for n in (n_a, n_b))
    return match_latents(a, b).cosines


@dataclass(frozen=True, eq=False)
class Stitching:
    """Latents of a larger dictionary added one at a time to the reconstruction of a smaller one.

    Args:
        change: Change of the summed squared error by each latent, divided by the error of the smaller dictionary.
        active: Latents that fire on the text.
        fvu_small: Fraction of variance unexplained by the smaller dictionary.
        fvu_large: The same of the larger one.
    """

    change: Float[np.ndarray, " latents"]
    active: Bool[np.ndarray, " latents"]
    fvu_small: float
    fvu_large: float

    @property
    def novel(self) -> Bool[np.ndarray, " latents"]:
        """Latents that lower the error: they write what the smaller dictionary lacks."""
        return self.active & (self.change < 0)

    @property
    def reconstruction(self) -> Bool[np.ndarray, " latents"]:
        """Active latents that raise the error or leave it: the smaller dictionary writes the same by its own latents."""
        return self.active & (self.change >= 0)


@torch.no_grad()
def stitch(
    small: SparseDictionary,
    large: SparseDictionary,
    x: Float[Tensor, "tokens d_in"],
    y: Float[Tensor, "tokens d_out"] | None = None,
) -> Stitching:
    """Add each latent of ``large``, with its own activations, to the reconstruction of ``small``.

    Args:
        x: Inputs of both.
        y: Targets, if they differ from the inputs.
    """
    y = x if y is None else y
    atoms = (large.atoms * large.out_scale).float()
    norms = atoms.pow(2).sum(-1)
    change = torch.zeros(large.n_latents, dtype=torch.float64, device=x.device)
    firings = torch.zeros(large.n_latents, dtype=torch.long, device=x.device)
    errors = [RunningFvu(y.shape[1], y.device) for _ in range(2)]
    total = 0.0
    for some, target in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
        guess, code = small.decode(small.encode(some), some), large.encode(some)
        errors[0].update(target, guess)
        errors[1].update(target, large.decode(code, some))
        left = (target - guess).float()
        total += float(left.double().pow(2).sum())
        fires = code.values != 0
        latents, values, tokens = code.latents[fires], code.values[fires].float(), code.token_ids()[fires]
        along = torch.einsum("nd,nd->n", atoms[latents], left[tokens])
        # |e - v d|^2 - |e|^2.
        change.index_add_(0, latents, (values.pow(2) * norms[latents] - 2 * values * along).double())
        firings += code.firings(large.n_latents)
    share = (change / max(total, 1e-30)).cpu().numpy()
    return Stitching(share, (firings > 0).cpu().numpy(), *(float(error.value()) for error in errors))
