"""How well a dictionary reconstructs held-out targets, and how it spends its latents doing so."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.metrics import RunningFvu, dead_fraction, density

from .groups import MetricGroup, Setting, View

# A latent firing on more tokens than this is dense: it carries little information about any of them.
DENSE = 0.1
DENSITY_DECADES = 7
BINS_PER_DECADE = 4


class Reconstruction:
    """Running sums over batches of raw targets and reconstructions; ``report`` turns them into flat entries."""

    def __init__(self, d_out: int, n_latents: int, device: torch.device | str = "cpu"):
        self.fvu = RunningFvu(d_out, device)
        self.firings = torch.zeros(n_latents, dtype=torch.long, device=device)
        self.l0: list[Tensor] = []
        # Sums over tokens of cosine, norm ratio, x.x_hat and |x_hat|^2.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"], code: SparseCode) -> None:
        self.fvu.update(y, y_hat)
        self.firings += code.firings(self.firings.shape[0])
        self.l0.append(code.l0().cpu())
        y, y_hat = y.double(), y_hat.double()
        dot, norm, norm_hat = (y * y_hat).sum(-1), y.norm(dim=-1), y_hat.norm(dim=-1)
        tiny = torch.finfo(torch.float64).tiny
        cosine, ratio = dot / (norm * norm_hat).clamp_min(tiny), norm_hat / norm.clamp_min(tiny)
        self.sums += torch.stack([cosine.sum(), ratio.sum(), dot.sum(), norm_hat.pow(2).sum()])
        self.tokens += y.shape[0]

    def report(self) -> dict[str, Any]:
        l0 = torch.cat(self.l0).double()
        cosine, ratio, dot, squared = self.sums.tolist()
        rho = density(self.firings, self.tokens).cpu()
        low, median, high = torch.quantile(l0, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        counts, edges = density_histogram(rho)
        l0_edges = torch.arange(int(l0.max()) + 2)
        return {
            "tokens": self.tokens,
            "fvu": float(self.fvu.value()),
            "cosine": cosine / self.tokens,
            "l2_ratio": ratio / self.tokens,
            # Gated SAE paper (arXiv:2404.16014), eq. 10: 1 is unbiased, below 1 is shrinkage.
            "relative_reconstruction_bias": squared / dot if dot != 0 else None,
            "l0_mean": float(l0.mean()),
            "l0_p10": low,
            "l0_median": median,
            "l0_p90": high,
            "l0_histogram_counts": torch.bincount(l0.long(), minlength=len(l0_edges) - 1).tolist(),
            "l0_histogram_edges": l0_edges.tolist(),
            "dead_fraction": dead_fraction(self.firings),
            "dead_window_tokens": self.tokens,
            "dense_fraction": float((rho > DENSE).double().mean()),
            "density_histogram_log10_edges": edges,
            "density_histogram_counts": counts,
        }


def density_histogram(rho: Float[Tensor, " n_latents"]) -> tuple[list[int], list[float]]:
    """Counts of log10 density in quarter decades from 1e-7 to 1; dead latents (density 0) are in none."""
    bins = DENSITY_DECADES * BINS_PER_DECADE
    edges = torch.linspace(-DENSITY_DECADES, 0, bins + 1, dtype=torch.float64)
    alive = rho[rho > 0].double().log10()
    counts = torch.histc(alive.clamp(-DENSITY_DECADES + 1e-9, -1e-9), bins=bins, min=-DENSITY_DECADES, max=0)
    assert math.isclose(float(counts.sum()), alive.numel())
    return counts.long().tolist(), edges.tolist()


class Reconstructed(MetricGroup):
    """Reconstruction and sparsity, on activations of a model or given ones."""

    name = "reconstruction"
    version = 1
    reads_model = False
    explanations: ClassVar = {
        "Reconstruction": {
            "fvu": "Fraction of variance unexplained, a ratio of sums: squared error of the whole set over squares about the "
            "mean of the whole set. 0 is perfect, 1 is no better than the mean. A mean of per-token ratios is another number.",
            "cosine": "Cosine between target and reconstruction, mean over tokens. 1 is perfect.",
            "l2_ratio": "Norm of the reconstruction over norm of the target, mean over tokens. Below 1 is shrinkage.",
            "relative_reconstruction_bias": "Sum of squared reconstruction norms over sum of reconstruction times target. 1 is "
            "unbiased, below 1 is shrinkage (arXiv:2404.16014, eq. 10).",
        },
        "Sparsity": {
            "l0_mean": "Latents that fire on a token, mean over tokens.",
            "l0_p10": "A tenth of the tokens have at most so many latents firing.",
            "l0_median": "Half of the tokens have at most so many latents firing.",
            "l0_p90": "Nine tenths of the tokens have at most so many latents firing.",
            "dead_fraction": "Share of latents silent on the whole window of tokens. A longer one finds fewer: compare "
            "equal ones.",
            "dead_window_tokens": "That window, in tokens.",
            "dense_fraction": f"Share of latents that fire on more than {DENSE:g} of the tokens.",
        },
    }

    def __init__(self, setting: Setting):
        dictionary = setting.dictionary
        self.running = Reconstruction(dictionary.d_out, dictionary.n_latents, setting.device)
        self.documents: set[int] | None = None if setting.model is None else set()

    def fit(self, piece: View) -> None:
        pass

    def score(self, piece: View) -> None:
        self.running.update(piece.y, piece.y_hat, piece.code)
        if piece.passage is not None and self.documents is not None:
            self.documents |= piece.passage.piece.documents

    def report(self) -> dict[str, Any]:
        return ({} if self.documents is None else {"documents": len(self.documents)}) | self.running.report()
