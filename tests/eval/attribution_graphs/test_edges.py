"""Memory of a graph: no tensor exceeds its bound, pieces give the graph of the whole, and what cannot fit is refused."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsary.eval.attribution_graphs.attention import graph_attention
from sparsary.eval.attribution_graphs.edges import latents_within, targets_within
from sparsary.eval.attribution_graphs.graph import graph_of
from sparsary.eval.attribution_graphs.interventions import runs_within
from sparsary.eval.attribution_graphs.local_replacement_model import LocalReplacement
from sparsary.eval.attribution_graphs.replacement_model import Replacement
from sparsary.training.activations.architecture import Architecture

POSITIONS = 23


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, beside views."""

    def __init__(self):
        super().__init__()
        self.numbers, self.sizes = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not func.is_view and tensor.untyped_storage().nbytes():
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.fixture
def local(tiny_model, random_transcoders):
    # Its heads together are wider than the stream, so that gradients of their outputs are the largest of a target's.
    anatomy = Architecture(tiny_model("llama"))
    token_ids = torch.randint(3, 41, (POSITIONS,), generator=torch.Generator().manual_seed(9))
    return LocalReplacement(Replacement(anatomy, random_transcoders(12)), token_ids, 1)


def least(local):
    """The smallest bound under which all latents fit: the adjacency matrix of all nodes."""
    return len(graph_of(local).adjacency) ** 2


def test_no_tensor_exceeds_the_bound(local):
    bound = least(local)
    with Largest() as free:
        whole = graph_of(local)
    with Largest() as bounded:
        pieces = graph_of(local, max_numbers=bound)
    assert free.numbers == bounded.numbers == bound
    torch.testing.assert_close(pieces.adjacency, whole.adjacency, rtol=1e-9, atol=1e-12)
    # A tenth of it: fewer latents, chosen by influence, and smaller pieces.
    with Largest() as smaller:
        some = graph_of(local, max_numbers=bound // 10)
    assert 0 < len(some.active) < len(whole.active)
    assert some.n_left_out == len(whole.active) - len(some.active)
    assert bound // 20 < smaller.numbers <= bound // 10
    assert torch.allclose(some.adjacency.sum(1) + some.constants + some.left_out, some.totals, atol=1e-9)


def test_gradients_of_one_layer_are_held_at_a_time(local):
    """Targets at once are limited by positions times the width of all heads, not by the number of layers."""
    positions, width = POSITIONS, 4 * 8
    assert positions * width > len(local.active) + 4 * positions + 1
    assert targets_within(local, 10**6, 7 * positions * width) == 7
    assert targets_within(local, 5, 10**9) == 5
    assert targets_within(local, 5, 1) == 1


def test_attention_and_interventions_stay_within_the_bound(local):
    graph = graph_of(local, max_latents=20)
    pruned = graph.prune()
    # Beside what is kept of every edge: three heads of each.
    bound = len(graph.adjacency) ** 2
    whole = graph_attention(local, graph, pruned)
    with Largest() as bounded:
        pieces = graph_attention(local, graph, pruned, max_numbers=bound)
    assert bounded.numbers <= bound
    assert [score.place for score in pieces.scores] == [score.place for score in whole.scores]
    assert [score.score for score in pieces.scores] == pytest.approx([score.score for score in whole.scores], abs=1e-9)
    per_run = POSITIONS * 41
    assert [runs_within(local, bound) for bound in (1, 3 * per_run, 10**9)] == [1, 3, 32]


def test_prompts_and_latents_above_the_bound_are_refused(local):
    n = len(local.active)
    with pytest.raises(
        ValueError, match=rf"prompt: expected a graph with tensors of at most 5,000 .* prompt of 23 positions with {n} active"
    ):
        graph_of(local, max_numbers=5000)
    bound = 110**2
    fitting = latents_within(local, 1, None, bound)
    assert 0 < fitting < n
    assert len(graph_of(local, answer=3, max_numbers=bound).active) == fitting
    with pytest.raises(ValueError, match=rf"max_latents: expected at most {fitting}, so that .* 12,100 numbers .*, got 100\."):
        graph_of(local, answer=3, max_latents=100, max_numbers=bound)
    assert len(graph_of(local, answer=3, max_latents=fitting, max_numbers=bound).active) == fitting
