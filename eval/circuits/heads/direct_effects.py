"""Direct effects of heads and MLPs on the answer's logit, and attention of heads to the labels of a multiple choice.

Direct logit attribution: what a node adds to the answer's logit, minus its mean addition to the logits of answers and foils,
with the denominator of the final norm held fixed. The parts of all nodes and of the biases sum to the model's centred logit.
Source: Lieberum et al. 2023, arXiv:2307.09458, who centre the logits of the labels and name classes of attention; the
thresholds between the classes here are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ....training.activations.architecture import Architecture, Trace
from ....training.activations.model import LanguageModel
from ..tasks.pairs import BATCH, PromptPairs

CONSTANT = "biases"
RIGHT_LABEL, OTHER_LABEL = "right_label", "other_label_"
# Least share of a head's attention that labels get together, for it to be about labels at all.
ON_LABELS = 0.5


@dataclass(frozen=True)
class LabelPlaces:
    """Positions of the labels of every prompt, in the order of the prompt, and the index of the right one among them."""

    positions: Int[Tensor, "pairs labels"]
    right: Int[Tensor, " pairs"]

    def take(self, rows: slice) -> "LabelPlaces":
        """Return some of the pairs."""
        return LabelPlaces(self.positions[rows], self.right[rows])


def label_places(pairs: PromptPairs) -> LabelPlaces | None:
    """Return the places of the labels, or None if these pairs have none, or not equally many."""
    rows, right = [], []
    for roles in pairs.roles:
        others = [position for name, position in roles.items() if name.startswith(OTHER_LABEL)]
        if RIGHT_LABEL not in roles or not others:
            return None
        rows.append(sorted([roles[RIGHT_LABEL], *others]))
        right.append(rows[-1].index(roles[RIGHT_LABEL]))
    if len({len(row) for row in rows}) != 1:
        return None
    return LabelPlaces(torch.tensor(rows), torch.tensor(right))


@dataclass(frozen=True)
class DirectEffects:
    """Effects by pair: ``direct`` of every node in ``nodes``, and the attention of heads ``(pairs, heads, labels)``.

    ``attention`` has the heads in the order of the nodes; None if the pairs have no labels. ``logit`` is the model's own
    centred logit.
    """

    nodes: list[str]
    heads: list[str]
    direct: Float[Tensor, "pairs nodes"]
    logit: Float[Tensor, " pairs"]
    attention: Float[Tensor, "pairs heads labels"] | None
    right: Int[Tensor, " pairs"] | None


@torch.no_grad()
def direct_effects(model: LanguageModel, pairs: PromptPairs) -> DirectEffects:
    """Measure the direct effect of every node on clean prompts, at the position of the question.

    Raises:
        ValueError: If the architecture is not supported, caps its logits, or a pair has several questions, or one without
            answer or foil.
    """
    anatomy = Architecture(model)
    if anatomy.logit_cap is not None:
        raise ValueError(f"--heads: expected logits that are linear in the stream, got {model.id}, which caps them.")
    readers = _readers(anatomy, pairs)
    places = label_places(pairs)
    direct, logit, attention = [], [], []
    start = 0
    for batch in pairs.batches(BATCH):
        rows = slice(start, start + len(batch))
        start += len(batch)
        trace = anatomy.trace(batch.clean.to(model.device))
        here = torch.arange(len(batch), device=model.device)
        at = torch.tensor([question.position for (question,) in batch.questions], device=model.device)
        reader, constant = (part[rows] for part in readers)
        folded = anatomy.final_norm.fold(reader) / trace.last_scale[here, at][:, None]
        parts = [torch.einsum("pd,pnd->pn", folded, written[here, at]) for written in _written(anatomy, trace)]
        biases = (folded * _unwritten(anatomy, folded)).sum(-1) + reader @ anatomy.final_norm.bias.to(reader) + constant
        direct.append(torch.cat([*parts, biases[:, None]], 1).cpu())
        logit.append(_centred(trace.logits[here, at].float(), batch).cpu())
        if places is not None:
            own = places.take(rows).positions.to(model.device)
            attention.append(
                torch.cat(
                    [
                        layer.pattern[here, :, at].gather(2, own[:, None].expand(-1, anatomy.n_heads, -1))
                        for layer in trace.layers
                    ],
                    1,
                ).cpu()
            )
    heads = [f"a{layer}.h{head}" for layer in range(anatomy.n_layers) for head in range(anatomy.n_heads)]
    seen = None if places is None else torch.cat(attention)
    right = None if places is None else places.right
    return DirectEffects([*_names(anatomy), CONSTANT], heads, torch.cat(direct), torch.cat(logit), seen, right)


def _readers(anatomy: Architecture, pairs: PromptPairs) -> tuple[Float[Tensor, "pairs d_model"], Float[Tensor, " pairs"]]:
    """Return the direction that reads every pair's centred logit off the normalized stream, and what the unembedding adds."""
    unembedding = anatomy.model.module.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    bias = getattr(unembedding, "bias", None)
    vectors, constants = [], []
    for questions in pairs.questions:
        if len(questions) != 1 or not questions[0].answers or not questions[0].foils:
            raise ValueError(
                f"--heads: expected one question with answers and foils in every pair of {pairs.task}, got {questions}."
            )
        (question,) = questions
        answers, every = list(question.answers), [*question.answers, *question.foils]
        vectors.append(anatomy.W_U[answers].float().mean(0) - anatomy.W_U[every].float().mean(0))
        constants.append(torch.zeros(()) if bias is None else (bias[answers].mean() - bias[every].mean()).float().cpu())
    return torch.stack(vectors), torch.stack(constants).to(vectors[0])


def _centred(logits: Float[Tensor, "pairs vocabulary"], pairs: PromptPairs) -> Float[Tensor, " pairs"]:
    rows = []
    for row, (question,) in zip(logits, pairs.questions, strict=True):
        rows.append(row[list(question.answers)].mean() - row[[*question.answers, *question.foils]].mean())
    return torch.stack(rows)


def _names(anatomy: Architecture) -> list[str]:
    """Return the nodes that write to the stream, in the order of computation."""
    names = ["embed"]
    for layer in range(anatomy.n_layers):
        names += [f"a{layer}.h{head}" for head in range(anatomy.n_heads)]
        names += [f"m{layer}"] if anatomy.blocks[layer].mlp is not None else []
    return names


def _written(anatomy: Architecture, trace: Trace) -> Iterator[Float[Tensor, "pairs positions nodes d_model"]]:
    """Yield what the nodes write, in the order of ``_names``."""
    yield trace.layers[0].pre[:, :, None]
    for weights, block, layer in zip(anatomy.layers, anatomy.blocks, trace.layers, strict=True):
        yield torch.einsum("cphd,hdm->cphm", layer.z, weights.W_O.to(layer.z))
        if block.mlp is not None:
            yield layer.mlp_written[:, :, None]


def _unwritten(anatomy: Architecture, like: Tensor) -> Float[Tensor, " d_model"]:
    """Return the sum of the attention outputs' biases, which belong to no head."""
    return torch.stack([weights.b_O for weights in anatomy.layers]).sum(0).to(like)


def attends(attention: Float[Tensor, "pairs labels"], right: Int[Tensor, " pairs"]) -> str:
    """Return the class of a head by its attention from the question to the labels.

    ``right label`` and ``one place`` (the same label of every prompt, whichever is right): at least halfway from an equal share
    to all of the labels' attention; ``all labels``: neither; ``elsewhere``: the labels get less than half of the attention.
    """
    total = attention.sum(1).mean()
    if total < ON_LABELS:
        return "elsewhere"
    halfway = (1 + 1 / attention.shape[1]) / 2
    if attention.gather(1, right[:, None]).mean() >= halfway * total:
        return "right label"
    return "one place" if attention.mean(0).max() >= halfway * total else "all labels"
