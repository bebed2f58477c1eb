"""Hidden states are found in whatever a module reads or returns, and put back there."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput

from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.training.activations.hidden_states import HookError, path_in, tensor_at, with_tensor
from sparsary.training.activations.insertions import Insertion
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.splice import Splice

WIDTH = 6
X, OTHER = torch.ones(2, 3, WIDTH), torch.zeros(2, 3, WIDTH)


class Pair(NamedTuple):
    hidden: torch.Tensor
    weights: torch.Tensor | None


@dataclass
class Plain:
    scale: float
    states: torch.Tensor


WRAPPED = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, OTHER),
    "tuple with none first": lambda x: (None, x),
    "list": lambda x: [x],
    "list in a tuple": lambda x: ([x, torch.zeros(2)], None),
    "named tuple": lambda x: Pair(x, None),
    "dictionary": lambda x: {"hidden_states": x, "other": OTHER},
    "dictionary of one": lambda x: {"weights": torch.zeros(2, 4, 3, 3), "x": x, "ids": torch.zeros(2, 3).long()},
    "ordered": lambda x: OrderedDict(y=x),
    "model output": lambda x: BaseModelOutputWithPast(last_hidden_state=x, hidden_states=(OTHER, OTHER)),
    "another model output": lambda x: transformers.modeling_outputs.CausalLMOutput(logits=x),
    "dataclass": lambda x: Plain(2.0, x),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_hidden_states_are_found_and_replaced(name):
    value = WRAPPED[name](X)
    path = path_in(value)
    assert tensor_at(value, path) is X
    new = X + 1
    changed = with_tensor(value, path, new)
    assert type(changed) is type(value)
    assert tensor_at(changed, path) is new
    # What was given is not written to.
    assert tensor_at(value, path) is X
    if isinstance(changed, ModelOutput):
        assert changed.to_tuple()[0] is new


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": X, "b": OTHER}, r"got dict of a \(2, 3, 6\), b \(2, 3, 6\)"),
        ((None, X, OTHER), r"got tuple of 1 \(2, 3, 6\), 2 \(2, 3, 6\)"),
        ({"ids": torch.zeros(2, 3)}, r"got dict of ids \(2, 3\)"),
        (None, "got NoneType without a tensor"),
        ({"a": "text"}, "got dict without a tensor"),
    ],
)
def test_what_is_ambiguous_is_told(value, message):
    with pytest.raises(LookupError, match=message):
        path_in(value)


class Wrapping(nn.Module):
    """Returns its input, changed, in some container; the model takes it out again."""

    def __init__(self, name, unwrap):
        super().__init__()
        self.wrap, self.unwrap = WRAPPED[name], unwrap
        self.inner = Inner(self.wrap)

    def forward(self, input_ids, use_cache=False):
        x = torch.nn.functional.one_hot(input_ids, WIDTH).float()
        return nn.Module() if self.unwrap is None else Logits(self.unwrap(self.inner(x, None)) * 3)


class Inner(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.scale = wrap, nn.Parameter(torch.tensor(2.0))

    def forward(self, x, other):
        return self.wrap(x * self.scale)


@dataclass
class Logits:
    logits: torch.Tensor


@pytest.mark.parametrize("name", WRAPPED)
def test_containers_are_read_replaced_and_spliced_in_a_pass(name):
    model = LanguageModel(Wrapping(name, lambda value: tensor_at(value, path_in(value))), None, name, None)
    ids = torch.randint(0, WIDTH, (2, 3))
    expected = 2 * torch.nn.functional.one_hot(ids, WIDTH).float()
    assert model.widths(("inner:out",)) == {"inner:out": WIDTH}
    torch.testing.assert_close(model.activations(ids, ("inner:out",))["inner:out"], expected)
    with model.replacing("inner:out", lambda x: x + 1):
        torch.testing.assert_close(model.logits(ids), 3 * (expected + 1))
    dictionary = SAE(WIDTH, 11, build_encoder({"name": "topk", "k": 2})).eval()
    with Splice(model, [Insertion(dictionary, ("inner:out",), ("inner:out",))], False, None, [], {}, {}).opened():
        spliced = model.logits(ids)
    torch.testing.assert_close(spliced, 3 * dictionary(expected.flatten(0, 1)).unflatten(0, (2, 3)))


class Odd(nn.Module):
    """Modules that lay their tokens out in other ways, or hold none."""

    def __init__(self):
        super().__init__()
        self.embed, self.rows, self.turned = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.longer, self.heads, self.named, self.nothing = nn.Identity(), nn.Identity(), Named(), Nothing()

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        x = x + self.rows(x.flatten(0, 1)).view_as(x)
        x = x + self.turned(x.transpose(0, 1)).transpose(0, 1)
        self.longer(torch.cat([x, x], 1))
        self.heads(x.unflatten(-1, (2, 3)))
        x = self.named(mask=torch.ones(2, 3), states=x)
        self.nothing()
        return Logits(x @ self.embed.weight.T)


class Named(nn.Module):
    def forward(self, states, mask):
        return states


class Nothing(nn.Module):
    def forward(self):
        return None


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (4, 3)])
def test_rows_and_positions_first_are_turned(shape):
    model = LanguageModel(Odd(), None, "odd", None)
    ids = torch.randint(0, 9, shape)
    seen = model.activations(ids, ("embed:out", "rows:in", "turned:in", "turned:out", "named:in"))
    torch.testing.assert_close(seen["rows:in"], seen["embed:out"])
    middle = seen["embed:out"] + model.module.rows(seen["embed:out"])
    torch.testing.assert_close(seen["turned:in"], middle)
    torch.testing.assert_close(seen["named:in"], middle + model.module.turned(middle))
    for hook in ("rows:out", "turned:in", "turned:out"):
        clean = model.logits(ids)
        with model.replacing(hook, lambda x: x + torch.arange(3.0)[:, None] * (x.shape[1] == 3)):
            changed = model.logits(ids)
        # What is added to the first position is nothing, whatever the module's own order of axes.
        torch.testing.assert_close(changed[:, 0], clean[:, 0])
        assert not torch.allclose(changed[:, 1], clean[:, 1])
    values, gradients = model.activations_and_gradients(ids, ("rows:out", "turned:out"))
    assert {x.shape for x in (*values.values(), *gradients.values())} == {(*shape, WIDTH)}


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("embed:in", r"of 2 contexts and 3 positions, got \(2, 3\) of int64"),
        ("longer:out", r"got \(2, 6, 6\)"),
        ("heads:in", r"got \(2, 3, 2, 3\)"),
        ("nothing:in", "got dict without a tensor"),
        ("nothing:out", "got NoneType without a tensor"),
    ],
)
def test_what_holds_no_hidden_states_is_told_with_its_shape(hook, message):
    with pytest.raises(HookError, match=rf"hook {hook}: expected a tensor \(contexts, positions, width\).*{message}"):
        LanguageModel(Odd(), None, "odd", None).widths((hook,))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.last = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Identity()

    def forward(self, input_ids, use_cache=False):
        return Logits(self.last(self.block(self.block(self.embed(input_ids)))))


def test_of_a_module_that_runs_twice_the_first_run_is_seen():
    model, ids = LanguageModel(Shared(), None, "shared", None), torch.randint(0, 9, (2, 3))
    alone = model.activations(ids, ("block:out",))["block:out"]
    torch.testing.assert_close(alone, model.module.block(model.module.embed(ids)))
    torch.testing.assert_close(model.activations(ids, ("block:out", "last:out"))["block:out"], alone)
