"""Gradients of the documents of a context: equal to one document at a time, in few passes."""

import pytest
import torch
from torch import nn

from sparsary.training.activations.document_gradients import UnembeddingInput, document_numbers
from sparsary.training.activations.hooked_model import HookedModel, next_token_loss

# Four documents, one, two and padding, and documents of a single token.
DOCUMENTS = torch.tensor(
    [
        [3, 3, 3, 3, 5, 5, 5, 6, 6, 6, 6, 8, 8],
        [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2],
        [4, 4, 4, 4, 4, 9, 9, 9, -1, -1, -1, -1, -1],
        [0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 5],
    ]
)


@pytest.fixture
def token_ids():
    return torch.randint(3, 41, DOCUMENTS.shape, generator=torch.Generator().manual_seed(0))


def slow(model, token_ids, hooks, documents):
    """Return the gradients, each document in a forward and a backward pass of its own."""
    found = {}

    def leaf(hook):
        def reader(x):
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            found[hook] = x
            return x.clone()

        return reader

    gradients = {}
    for row, owners in enumerate(documents):
        for document in set(owners.tolist()) - {-1}:
            own = (owners[1:] == document) & (owners[:-1] == document)
            with model.hooked({hook: leaf(hook) for hook in hooks}):
                logits = model.module(input_ids=token_ids[row : row + 1], use_cache=False).logits
            loss = (next_token_loss(logits, token_ids[row : row + 1])[0] * own).sum()
            for hook, gradient in zip(hooks, torch.autograd.grad(loss, [found[hook] for hook in hooks]), strict=True):
                total = gradients.setdefault(hook, torch.zeros(*documents.shape, gradient.shape[-1]).to(gradient))
                total[row, owners == document] = gradient[0, owners == document]
    return gradients


@pytest.mark.parametrize(
    ("kind", "hooks"),
    [
        ("gpt2", ("transformer.h.0:out", "transformer.h.2.mlp:in")),
        ("gpt2", ("transformer.wte:out", "transformer.ln_f:out", "lm_head:in")),
        # The input of the last layer is not between the logits and the losses.
        ("gpt2", ("transformer.h.2:out", "lm_head:out")),
        ("gpt2", ("lm_head:out",)),
        ("llama", ("model.layers.0:out", "model.layers.1.self_attn:out")),
    ],
)
def test_gradients_equal_those_of_one_document_at_a_time(tiny_model, token_ids, kind, hooks):
    model = tiny_model(kind)
    expected = slow(model, token_ids, hooks, DOCUMENTS)
    _, found = model.activations_and_gradients(token_ids, hooks, DOCUMENTS)
    for hook in hooks:
        # Losses are in float32.
        torch.testing.assert_close(found[hook], expected[hook], rtol=1e-5, atol=1e-7)
        assert float(expected[hook][:2].abs().amax()) > 1e-3


def test_a_context_takes_as_many_passes_as_it_has_documents(tiny_model, token_ids):
    """And one through the unembedding; documents of one token and padding take none."""
    model = tiny_model("gpt2")
    passes = {"block": 0, "unembedding": 0}

    def count(name):
        def hook(_module, _gradients, out):
            passes[name] += len(out[0])

        return hook

    for name, module in (("block", model.module.transformer.h[2]), ("unembedding", model.module.lm_head)):
        module.register_full_backward_hook(count(name))
    model.activations_and_gradients(token_ids, ("transformer.h.1:out",), DOCUMENTS)
    assert (document_numbers(DOCUMENTS).amax(1) + 1).tolist() == [4, 1, 2, 3]
    assert passes == {"block": 4 + 1 + 2 + 3, "unembedding": 4}


def test_values_are_those_of_a_pass_without_gradients(tiny_model, token_ids):
    model, hooks = tiny_model("llama"), ("model.layers.2:out", "model.layers.0.mlp:in")
    values, gradients = model.activations_and_gradients(token_ids, hooks, DOCUMENTS)
    assert tuple(values) == tuple(gradients) == hooks
    for hook, expected in model.activations(token_ids, hooks).items():
        torch.testing.assert_close(values[hook], expected)


def test_a_loss_that_is_not_finite_stays_in_its_document(tiny_model, token_ids):
    model, hook = tiny_model("gpt2"), "transformer.h.0:out"
    _, expected = model.activations_and_gradients(token_ids, (hook,), DOCUMENTS)

    def broken(x):
        x = x.clone()
        x[:, 5] = x[:, 5] + torch.nan
        return x

    with model.replacing("lm_head:in", broken):
        _, found = model.activations_and_gradients(token_ids, (hook,), DOCUMENTS)
    good = torch.isfinite(found[hook]).all(-1)
    assert (DOCUMENTS[:, 5:6] == DOCUMENTS)[~good].all()
    assert not good[:, 5].any()
    torch.testing.assert_close(found[hook][good], expected[hook][good])


class Shortcut(nn.Module):
    """Model whose logits do not depend on the unembedding's input alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(41, 6), nn.Linear(6, 6), nn.Linear(6, 41)
        self.side = nn.Linear(6, 41)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        h = self.mix(x.cumsum(1))
        logits = self.head(h) + self.side(x.cumsum(1).tanh())
        return type("Output", (), {"logits": logits})


def test_logits_that_bypass_the_unembedding_are_noticed(token_ids):
    torch.manual_seed(0)
    model = HookedModel(Shortcut().double(), "shortcut")
    expected = slow(model, token_ids, ("embed:out",), DOCUMENTS)
    _, found = model.activations_and_gradients(token_ids, ("embed:out",), DOCUMENTS)
    torch.testing.assert_close(found["embed:out"], expected["embed:out"], rtol=1e-5, atol=1e-7)


def test_a_hook_that_nothing_depends_on_has_gradient_zero(tiny_model, token_ids):
    class Deaf(Shortcut):
        def forward(self, input_ids, **_):
            self.mix(self.embed(input_ids))
            return type("Output", (), {"logits": self.head(torch.ones(*input_ids.shape, 6).double())})

    _, found = HookedModel(Deaf().double(), "deaf").activations_and_gradients(token_ids, ("embed:out",), DOCUMENTS)
    assert not found["embed:out"].any()


def test_a_model_without_unembedding_has_its_logits_taken(token_ids):
    watched = UnembeddingInput(nn.Sequential())
    logits = torch.zeros(2, 3, 5)
    with watched.watched():
        pass
    assert watched.local(logits, []) is logits
