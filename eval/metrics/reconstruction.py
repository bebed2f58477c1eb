"""Metrics: reconstruction error on held-out targets, and sparsity of the code."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...sae.metrics import Moments, dead_fraction, density
from ...sae.sparse_code import SparseCode
from ..bootstrap import LEVEL, RESAMPLES, SEED, ByDocument
from ..pages.glossary import DENSE
from ..undefined import Undefined
from .base import DictionaryOutputs, MetricGroup, Setting
from .histograms import Counts, Quantiles

FREQUENT = 0.01
DENSITY_DECADES = 7
BINS_PER_DECADE = 4
# High-norm tokens exceed the median target norm by this factor: the first of a context, delimiters (Sun et al. 2024,
# arXiv:2402.17762). A handful of them can hold most of the variance.
HIGH_NORM = 10
NO_VARIANCE = "all targets are equal: there is no variance to explain"
NO_TARGET = "all targets are zero"


class Errors:
    """Running float64 sums over tokens of targets, reconstructions and residuals."""

    def __init__(self, d_out: int, device: torch.device | str = "cpu"):
        self.target = Moments(d_out, device)
        self.residual = Moments(d_out, device)
        # Squared error per dimension.
        self.squares = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)
        # Sums over tokens of cosine, norm ratio, x.x_hat, |x_hat|^2, |x|^2 and |x - x_hat|^2 / |x|^2.
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.nonzero = 0
        self.tokens = 0

    def update(self, y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"]) -> None:
        y, y_hat = y.double(), y_hat.double()
        error = y - y_hat
        squares = error.pow(2)
        self.target.update(y)
        self.residual.update(error)
        self.squares += squares.sum(0)
        self.error += squares.sum()
        dot, norm, norm_hat = (y * y_hat).sum(-1), y.norm(dim=-1), y_hat.norm(dim=-1)
        tiny = torch.finfo(torch.float64).tiny
        cosine, ratio = dot / (norm * norm_hat).clamp_min(tiny), norm_hat / norm.clamp_min(tiny)
        lost = torch.where(norm > 0, squares.sum(-1) / norm.pow(2).clamp_min(tiny), 0)
        totals = (cosine, ratio, dot, norm_hat.pow(2), norm.pow(2), lost)
        self.sums += torch.stack([total.sum() for total in totals])
        self.nonzero += int((norm > 0).sum())
        self.tokens += y.shape[0]

    def fvu(self) -> float | Undefined:
        total = float(self.target.squared_deviation())
        return float(self.error) / total if total > 0 else Undefined(NO_VARIANCE)

    def means(self) -> dict[str, Any]:
        if self.tokens == 0:
            return dict.fromkeys(("fvu", "cosine", "l2_ratio"), Undefined("there are no such tokens"))
        cosine, ratio, *_ = self.sums.tolist()
        return {"fvu": self.fvu(), "cosine": cosine / self.tokens, "l2_ratio": ratio / self.tokens}

    def explained_variance(self) -> dict[str, Any]:
        """Return the definitions of explained variance in common use, each under its own name."""
        total, error = float(self.target.squared_deviation()), float(self.error)
        dimensions = self.target.mean.numel()
        *_, energy, lost = self.sums.tolist()
        # Deviation about a single mean over tokens and dimensions.
        scalar = energy - self.tokens * dimensions * float(self.target.mean.mean()) ** 2
        flat = bool((self.target.deviation <= 0).any())
        spread = Undefined(NO_VARIANCE)
        return {
            "mse": error / self.tokens,
            "mse_per_dimension": error / self.tokens / dimensions,
            "ev_global": 1 - error / total if total > 0 else spread,
            "ev_mean_dim": Undefined("a dimension of the target does not vary")
            if flat
            else float((1 - self.squares / self.target.deviation).mean()),
            "ev_residual_variance": 1 - float(self.residual.squared_deviation()) / total if total > 0 else spread,
            "ev_scalar_mean": 1 - error / scalar if scalar > 0 else spread,
            "ev_uncentred": 1 - error / energy if energy > 0 else Undefined(NO_TARGET),
            "ev_mean_token": 1 - lost / self.nonzero if self.nonzero else Undefined(NO_TARGET),
        }

    def bias(self) -> float | Undefined:
        """Return the relative reconstruction bias: 1 is unbiased, below 1 is shrinkage (arXiv:2404.16014, eq. 10)."""
        _, _, dot, squared, *_ = self.sums.tolist()
        return squared / dot if dot != 0 else Undefined("reconstructions are orthogonal to their targets, or zero")


class Reconstruction:
    """Running sums over batches of raw targets and reconstructions, reported as flat entries."""

    def __init__(self, d_out: int, n_latents: int, device: torch.device | str = "cpu"):
        self.errors = Errors(d_out, device)
        self.firings = torch.zeros(n_latents, dtype=torch.long, device=device)
        self.l0 = Counts()

    @property
    def tokens(self) -> int:
        return self.errors.tokens

    def update(self, y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"], code: SparseCode) -> None:
        self.errors.update(y, y_hat)
        self.firings += code.firings(self.firings.shape[0])
        self.l0.update(code.l0())

    def report(self) -> dict[str, Any]:
        rho = density(self.firings, self.tokens).cpu()
        low, median, high = self.l0.quantiles([0.1, 0.5, 0.9])
        counts, edges = density_histogram(rho)
        l0_counts = self.l0.counts[: int(self.l0.counts.nonzero().max()) + 1].tolist()
        return {
            "tokens": self.tokens,
            **self.errors.means(),
            "relative_reconstruction_bias": self.errors.bias(),
            "l0_mean": self.l0.mean(),
            "l0_p10": low,
            "l0_median": median,
            "l0_p90": high,
            "l0_histogram_counts": l0_counts,
            "l0_histogram_edges": list(range(len(l0_counts) + 1)),
            "dead_fraction": dead_fraction(self.firings),
            "dead_window_tokens": self.tokens,
            "dense_fraction": float((rho > DENSE).double().mean()),
            "density_histogram_log10_edges": edges,
            "density_histogram_counts": counts,
            "frequent_fraction": float((rho > FREQUENT).double().mean()),
            "effective_latents": effective_latents(rho),
            **self.errors.explained_variance(),
        }


def effective_latents(rho: Float[Tensor, " n_latents"]) -> float | Undefined:
    """Return the exponential of the entropy of firing shares: the equivalent number of equally frequent latents."""
    shares = rho[rho > 0] / rho.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else Undefined("no latent fires")


def density_histogram(rho: Float[Tensor, " n_latents"]) -> tuple[list[int], list[float]]:
    """Return counts of log10 density in quarter decades from 1e-7 to 1, and the bin edges; dead latents are excluded."""
    bins = DENSITY_DECADES * BINS_PER_DECADE
    edges = torch.linspace(-DENSITY_DECADES, 0, bins + 1, dtype=torch.float64)
    alive = rho[rho > 0].double().log10()
    counts = torch.histc(alive.clamp(-DENSITY_DECADES + 1e-9, -1e-9), bins=bins, min=-DENSITY_DECADES, max=0)
    assert math.isclose(float(counts.sum()), alive.numel())
    return counts.long().tolist(), edges.tolist()


class Reconstructed(MetricGroup):
    """Reconstruction and sparsity metrics, on activations of a model or on given ones.

    The first half of the documents determines the high-norm threshold and the mean used for the interval's deviations.
    """

    name = "reconstruction"
    version = 3
    reads_model = False

    def __init__(self, setting: Setting):
        dictionary, device = setting.dictionary, setting.device
        self.all = Reconstruction(dictionary.d_out, dictionary.n_latents, device)
        self.norms = Quantiles(floor=1e-30, largest=1e30)
        self.fitted = Moments(dictionary.d_out, device)
        self.usual = Errors(dictionary.d_out, device)
        self.usual_l0 = Counts()
        self.documents = ByDocument(("error", "deviation", "nonzeros", "tokens"))
        self.of_model = setting.model is not None

    @property
    def document_sums(self) -> ByDocument:
        return self.documents

    def fit(self, piece: DictionaryOutputs) -> None:
        self.norms.update(piece.y.double().norm(dim=-1))
        self.fitted.update(piece.y)

    @property
    def threshold(self) -> float:
        return HIGH_NORM * self.norms.quantiles([0.5])[0]

    def score(self, piece: DictionaryOutputs) -> None:
        y, y_hat = piece.y, piece.y_hat
        self.all.update(y, y_hat, piece.code)
        usual: Bool[Tensor, " tokens"] = y.double().norm(dim=-1) <= self.threshold
        self.usual.update(y[usual], y_hat[usual])
        self.usual_l0.update(piece.code.l0()[usual])
        if piece.passage is not None:
            error = (y.double() - y_hat.double()).pow(2).sum(-1)
            deviation = (y.double() - self.fitted.mean).pow(2).sum(-1)
            l0 = piece.code.l0().double()
            values = {"error": error, "deviation": deviation, "nonzeros": l0, "tokens": torch.ones_like(l0)}
            self.documents.update(piece.passage.documents, {name: value.cpu().numpy() for name, value in values.items()})

    def report(self) -> dict[str, Any]:
        entries: dict[str, Any] = {"documents": len(self.documents.rows)} if self.of_model else {}
        entries |= self.all.report()
        entries |= {f"{key}_without_high_norm": value for key, value in self.usual.means().items()}
        few = Undefined("there are no such tokens")
        entries["l0_mean_without_high_norm"] = self.usual_l0.mean() if self.usual.tokens else few
        entries["high_norm_threshold"] = self.threshold
        entries["high_norm_tokens"] = self.all.tokens - self.usual.tokens
        energy = float(self.all.errors.sums[4])
        rest = float(self.usual.sums[4])
        entries["high_norm_energy_share"] = max(0.0, 1 - rest / energy) if energy > 0 else Undefined(NO_TARGET)
        return entries | self._interval()

    def _interval(self) -> dict[str, Any]:
        # Deviations about the first half's mean and about the scored half's own mean differ slightly; the factor corrects this.
        about = sum(row[1] for row in self.documents.rows.values())
        own = float(self.all.errors.target.squared_deviation())
        factor = about / own if about > 0 and own > 0 else 1.0
        found = self.documents.intervals({"fvu": lambda totals: factor * totals["error"] / totals["deviation"]})
        # The stored sums then reproduce the report's fvu.
        self.documents.scale("deviation", 1 / factor)
        return found | {"interval_level": LEVEL, "interval_resamples": RESAMPLES, "interval_seed": SEED}
