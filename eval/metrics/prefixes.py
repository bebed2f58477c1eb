"""Metric: error and sparsity of nested dictionaries."""

from typing import Any

import torch

from ...sae.encoders.lista import Lista
from ...sae.encoders.matryoshka import Matryoshka
from ...sae.metrics import Moments
from ..undefined import Undefined
from .base import DictionaryOutputs, MetricGroup, Setting
from .reconstruction import NO_VARIANCE


class Prefixes(MetricGroup):
    """FVU and active latents of every prefix of a nested dictionary (Matryoshka, or LISTA with shares); others have no entries.

    A prefix keeps those latents of the whole code that are within its width. Where training draws the widths at random, the
    prefixes are those of the encoder's ``shares``.
    """

    name = "prefixes"
    version = 1
    reads_model = False

    def __init__(self, setting: Setting):
        dictionary = setting.dictionary
        encoder, shares = dictionary.encoder, []
        if isinstance(encoder, Matryoshka) or (isinstance(encoder, Lista) and len(encoder.shares) > 1):
            shares = encoder.shares
        self.dictionary = dictionary
        self.widths = sorted({max(1, round(share * dictionary.n_latents)) for share in shares})
        self.target = Moments(dictionary.d_out, setting.device)
        self.errors = torch.zeros(len(self.widths), dtype=torch.float64, device=setting.device)
        self.active = torch.zeros(len(self.widths), dtype=torch.long, device=setting.device)

    def fit(self, piece: DictionaryOutputs) -> None:
        pass

    def score(self, piece: DictionaryOutputs) -> None:
        if not self.widths:
            return
        self.target.update(piece.y)
        for place, width in enumerate(self.widths):
            code = piece.code.where(piece.code.latents < width)
            y_hat = self.dictionary.decode(code, piece.x)
            self.errors[place] += (piece.y.double() - y_hat.double()).square().sum()
            self.active[place] += (code.values != 0).sum()

    def report(self) -> dict[str, Any]:
        if not self.widths:
            return {}
        total = self.target.squared_deviation()
        return {
            "prefix_latents": self.widths,
            "prefix_fvu": (self.errors / total).tolist() if total > 0 else Undefined(NO_VARIANCE),
            "prefix_l0": (self.active.double() / self.target.count).tolist(),
        }
