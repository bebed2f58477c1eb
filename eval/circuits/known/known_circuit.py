"""Known: a model, prompt pairs, and the ground-truth circuit for them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ....sae.suggestions import require_choice
from ....training.activations.model import LanguageModel
from ..tasks.pairs import PromptPairs
from .toy import ToyConfig, ToyTransformer

ABLATIONS = ("resample", "zero")


@dataclass(frozen=True, eq=False)
class Known:
    """Model with a ground-truth circuit for its prompt pairs, per ablation.

    The circuit consists of the parts that change the metric when ablated; all other parts can be ablated at once without
    effect. Redundant parts (an OR of two heads) all belong, although ablating one alone has no effect; fallbacks that only a
    broken circuit uses do not belong. ``resample`` gives a unit its value on the corrupted prompt, so parts that are equal on
    both prompts are in no such circuit; ``zero`` gives it zeros.

    Nodes are ``embed`` (token and position together), ``a{layer}.h{head}``, ``m{layer}``; edges ``SENDER->RECEIVER``, where
    receivers are ``a{layer}.h{head}.q``, ``.k``, ``.v``, ``m{layer}`` and ``logits``.

    ``directions`` are named unit vectors of the residual stream that the model computes with. ``exact`` is True if parts
    outside the circuit have no effect; in trained models they have a small one.
    """

    name: str
    model: LanguageModel
    pairs: PromptPairs
    nodes: dict[str, frozenset[str]]
    edges: dict[str, frozenset[str]]
    directions: dict[str, Float[Tensor, " d_model"]]
    exact: bool = True

    def __post_init__(self) -> None:
        every_node, every_edge = set(node_names(self.config)), set(edge_names(self.config))
        for what, truth, every in (("nodes", self.nodes, every_node), ("edges", self.edges, every_edge)):
            for ablation, members in truth.items():
                strange = sorted(members - every)
                if strange or ablation not in ABLATIONS:
                    raise ValueError(
                        f"{self.name}: {what}: expected parts of the model by ablation ({', '.join(ABLATIONS)}), got "
                        f"{', '.join(strange) or 'none that it lacks'} for {ablation!r}."
                    )

    @property
    def module(self) -> ToyTransformer:
        """The transformer."""
        module = self.model.module
        assert isinstance(module, ToyTransformer)
        return module

    @property
    def config(self) -> ToyConfig:
        return self.module.config

    def node_labels(self, ablation: str, names: Iterable[str] | None = None) -> Tensor:
        """Return a mask of nodes in the circuit, in the order of ``names`` or of ``node_names``."""
        return _labels(self.nodes, ablation, node_names(self.config) if names is None else names)

    def edge_labels(self, ablation: str, names: Iterable[str] | None = None) -> Tensor:
        """Return a mask of edges in the circuit, in the order of ``names`` or of ``edge_names``."""
        return _labels(self.edges, ablation, edge_names(self.config) if names is None else names)


def _labels(truth: Mapping[str, frozenset[str]], ablation: str, names: Iterable[str]) -> Tensor:
    require_choice("ablation", ablation, truth, ", for which this circuit is known")
    return torch.tensor([name in truth[ablation] for name in names])


def node_names(config: ToyConfig) -> list[str]:
    """Return every sender, in the order of computation."""
    names = ["embed"]
    for layer in range(config.n_layers):
        names += [f"a{layer}.h{head}" for head in range(config.n_heads)]
        names += [f"m{layer}"] if config.d_mlp else []
    return names


def edge_names(config: ToyConfig) -> list[str]:
    """Return every edge: receivers in the order of computation, and for each the senders before it."""
    senders, names = ["embed"], []
    for layer in range(config.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(config.n_heads)]
        names += [f"{sender}->{head}.{side}" for head in heads for side in "qkv" for sender in senders]
        senders += heads
        if config.d_mlp:
            names += [f"{sender}->m{layer}" for sender in senders]
            senders.append(f"m{layer}")
    return names + [f"{sender}->logits" for sender in senders]


def ends(edges: Iterable[str]) -> frozenset[str]:
    """Return the nodes at the ends of edges."""
    parts = (edge.split("->") for edge in edges)
    return frozenset(node for sender, receiver in parts for node in (sender, _owner(receiver)) if node != "logits")


def _owner(receiver: str) -> str:
    return receiver[:-2] if receiver.endswith((".q", ".k", ".v")) else receiver


def wired(text: str) -> frozenset[str]:
    """Return the edges of text such as ``embed->a0.h0.q,k,v a0.h0->logits``, separated by spaces."""
    edges = set()
    for term in text.split():
        sender, receiver = term.split("->")
        first, *more = receiver.split(",")
        edges.add(f"{sender}->{first}")
        edges |= {f"{sender}->{first[:-1]}{side}" for side in more}
    return frozenset(edges)
