"""Rows of Neuronpedia's tables of features, activations and explanations, from the records of latents.

Names of columns are those of its database: a latent's row is a feature, ``layer`` is the id of its source, and ``*_l1`` of
correlations hold cosines. Logit effects and activations are in the units of ``features.jsonl``. Source: the import files that
SAEDashboard writes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from ..logit_lens import Unembedding
from ..neighbours import as_matrix
from ..records import Described, FeatureRecord, number
from .neurons import ROWS, Alignment, NeuronCorrelations, latent_cosines, value_histogram

BINS = 50
# Bin of the strongest contexts, as SAEDashboard marks it: of no interval.
TOP_BIN = {"binMin": -1.0, "binContains": -1.0}

Row = dict[str, Any]


@dataclass(frozen=True)
class SourceIdentity:
    """Ids under which rows are imported: ``layer`` is the id of the source, such as ``8-res-jb``."""

    model_id: str
    layer: str
    creator_id: str
    created_at: str

    def row(self, record: FeatureRecord) -> Row:
        """Return the columns that every row of a latent has."""
        return {"modelId": self.model_id, "layer": self.layer, "index": str(record["latent"])}

    def row_id(self, *parts: object) -> str:
        """Return a row's id: the same for the same model, source and parts."""
        told = "/".join(map(str, (self.model_id, self.layer, *parts)))
        return f"c{blake2b(told.encode(), digest_size=12).hexdigest()}"


@dataclass(frozen=True)
class Tables:
    """Figures of every latent that the records do not hold: neurons, correlated latents, and histograms."""

    aligned: Alignment
    neurons: NeuronCorrelations
    latents: tuple[np.ndarray, np.ndarray, np.ndarray]
    logit_histograms: list[tuple[list[int], list[float]]]
    activation_histograms: list[tuple[list[int], list[float]]]

    def columns(self, latent: int) -> Row:
        others, pearson, cosine = (part[latent] for part in self.latents)
        there = others >= 0
        logits, activations = self.logit_histograms[latent], self.activation_histograms[latent]
        return {
            "neuron_alignment_indices": self.aligned.neurons[latent].tolist(),
            "neuron_alignment_values": _numbers(self.aligned.values[latent]),
            "neuron_alignment_l1": _numbers(self.aligned.shares[latent]),
            "correlated_neurons_indices": self.neurons.neurons[latent].tolist(),
            "correlated_neurons_pearson": _numbers(self.neurons.pearson[latent]),
            "correlated_neurons_l1": _numbers(self.neurons.cosine[latent]),
            "correlated_features_indices": others[there].tolist(),
            "correlated_features_pearson": _numbers(pearson[there]),
            "correlated_features_l1": _numbers(cosine[there]),
            "freq_hist_data_bar_heights": activations[0],
            "freq_hist_data_bar_values": _numbers(activations[1]),
            "logits_hist_data_bar_heights": logits[0],
            "logits_hist_data_bar_values": _numbers(logits[1]),
        }


def latent_tables(described: Described, aligned: Alignment, neurons: NeuronCorrelations) -> Tables:
    """Compute the figures that records do not hold; histograms of activations are those of the sampled tokens."""
    collected, lens = described.collected, described.lens
    codes: Any = as_matrix(collected.token_sample, collected.n_latents)
    sums, squares = (np.asarray(each.sum(0)).ravel() for each in (codes.astype(np.float64), codes.astype(np.float64).power(2)))
    others, pearson = (part[:, :ROWS] for part in described.together.correlation)
    cosines = latent_cosines(sums, squares, codes.shape[0], others, pearson)
    spans = zip(codes.indptr[:-1], codes.indptr[1:], strict=True)
    activations = [value_histogram(codes.data[low:high], BINS) for low, high in spans]
    empty = [value_histogram(np.zeros(0), BINS)] * collected.n_latents
    logits = empty if isinstance(lens, str) else logit_histograms(lens, len(described.words))
    return Tables(aligned, neurons, (others, pearson, cosines), logits, activations)


def logit_histograms(lens: Unembedding, words: int) -> list[tuple[list[int], list[float]]]:
    """Return for each latent the histogram of its effects on the logits of all ``words`` tokens."""
    return [value_histogram(row, BINS) for effects in lens.blocks() for row in effects[:, :words].cpu().numpy()]


def feature_row(record: FeatureRecord, identity: SourceIdentity, columns: Mapping[str, Any], hook_name: str | None) -> Row:
    """Return a latent's row; a latent that never fired has no histogram and the maximum 0."""
    logits = record["logits"] or {"promoted": [], "suppressed": []}
    about = {
        f"{side}_{what}": [entry[key] for entry in logits[name]]
        for side, name in (("neg", "suppressed"), ("pos", "promoted"))
        for what, key in (("str", "token"), ("values", "effect"))
    }
    return {
        **identity.row(record),
        "creatorId": identity.creator_id,
        "createdAt": identity.created_at,
        "maxActApprox": record["max_activation"] or 0.0,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": 10.0,
        "hookName": hook_name,
        "topkCosSimIndices": [other["latent"] for other in record["nearest"]],
        "topkCosSimValues": [other["cosine"] for other in record["nearest"]],
        **columns,
        **about,
        "frac_nonzero": record["density"],
        "decoder_weights_dist": [],
        "sourceSetName": identity.layer.partition("-")[2],
    }


def activation_rows(record: FeatureRecord, identity: SourceIdentity, dataset: str) -> Iterator[Row]:
    """Yield a row for each context of a latent: the strongest, then those drawn from each slice of its peaks."""
    slices = record["quantiles"]
    found = [(TOP_BIN | {"binMax": record["max_activation"]}, context) for context in record["top"]]
    for part in slices:
        place = {"binMin": part["low"], "binMax": part["high"], "binContains": number(1 / len(slices))}
        found += [(place, context) for context in part["contexts"]]
    for at, (place, context) in enumerate(found):
        values, peak = context["activations"], context["peak"]
        strongest = max(range(len(values)), key=values.__getitem__)
        yield {
            "id": identity.row_id(record["latent"], at),
            **identity.row(record),
            "tokens": context["tokens"],
            "values": values,
            "maxValue": values[strongest],
            "maxValueTokenIndex": strongest,
            "minValue": min(values),
            "qualifyingTokenIndex": peak,
            "creatorId": identity.creator_id,
            "createdAt": identity.created_at,
            "dataSource": dataset,
            "dataIndex": str(context["document"]),
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
            **place,
        }


def explanation_rows(record: FeatureRecord, identity: SourceIdentity, explainer: str | None) -> Iterator[Row]:
    """Yield the explanation of a latent that has one; the explainer is in its notes, because Neuronpedia lists its own only."""
    found = record["explanation"]
    if found is not None and found["text"] is not None:
        yield {
            "id": identity.row_id(record["latent"], "explanation"),
            **identity.row(record),
            "description": found["text"],
            "authorId": identity.creator_id,
            "typeName": None,
            "explanationModelName": None,
            "notes": explainer,
        }


def _numbers(values: Any) -> list[float]:
    return [number(value) for value in values]
