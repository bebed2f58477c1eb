"""Models spread over devices, and quantized ones."""

import importlib.util
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsary.sae import SAE
from sparsary.sae.encoders import TopK
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.harvest import Identity, model_identity, recipe_identity
from sparsary.training.activations.hooked_model import HookedModel
from sparsary.training.activations.insertions import Insertion
from sparsary.training.activations.model import load_model
from sparsary.training.activations.model_source import require_quantization
from sparsary.training.activations.splice import model_spliced
from sparsary.training.preflight import plan_all
from sparsary.training.recipe import HarvestSection, ModelSection, TextSection, check_recipe
from sparsary.training.resolve_hooks import resolve_recipe

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
HOOKS = ("h.0:out", "h.1:out", "h.2:in")


class Placed(Tensor):
    """Tensor that pretends to be on a device, and refuses to meet one on another."""

    place = FIRST

    @property
    def device(self):
        return self.place

    def to(self, *args, **kwargs):
        if not args or not isinstance(args[0], torch.device):
            return super().to(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            moved = self.view_as(self)
        return placed(moved, args[0])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.autograd.grad:
            # Each gradient is where its input is, wherever that of the loss is.
            inputs = args[1] if isinstance(args[1], (tuple, list)) else [args[1]]
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **kwargs or {})
            return tuple(None if g is None else placed(g, x.place) for g, x in zip(found, inputs, strict=True))
        places = {x.place for x in tree_leaves((args, kwargs)) if isinstance(x, Placed)}
        assert len(places) < 2, f"tensors on several devices in {func}"
        result = super().__torch_function__(func, types, args, kwargs or {})
        return tree_map_only(Placed, lambda x: placed(x, *places) if places else x, result)


def placed(x, device):
    with torch._C.DisableTorchFunctionSubclass():
        x = x.as_subclass(Placed)
    x.place = device
    return x


class Spread(nn.Module):
    """Model that moves hidden states to the device of each block, as accelerate does."""

    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(11, 7), nn.Linear(7, 11)
        self.h = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x.to(block.weight.device)).tanh()
        return SimpleNamespace(logits=self.head(x.to(self.head.weight.device)))


def spread(module):
    """Put two of three blocks and the head on the second device."""
    for path, parameter in list(module.named_parameters()):
        parent, _, name = path.rpartition(".")
        device = SECOND if path.startswith(("h.1", "h.2", "head")) else FIRST
        data = nn.Parameter(placed(parameter.data, device), requires_grad=False)
        module.get_submodule(parent)._parameters[name] = placed(data, device)
    module.hf_device_map = {"wte": 0, "h.0": 0, "h.1": 1, "h.2": 1, "head": 1}
    return HookedModel(module, "spread")


def plain(x):
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def test_hooks_of_a_spread_model_give_tensors_on_one_device():
    module, ids = Spread(), torch.randint(11, (2, 5))
    one = HookedModel(module, "one device")
    expected, of_loss = one.activations(ids, HOOKS), one.activations_and_gradients(ids, HOOKS)
    logits = one.logits(ids)
    model, there = spread(module), placed(ids, FIRST)
    assert model.device == FIRST
    read, (values, gradients) = model.activations(there, HOOKS), model.activations_and_gradients(there, HOOKS)
    for found, wanted in ((read, expected), (values, of_loss[0]), (gradients, of_loss[1])):
        assert {x.device for x in found.values()} == {FIRST}
        torch.testing.assert_close({hook: plain(x) for hook, x in found.items()}, wanted)
    assert model.logits(there).device == FIRST
    torch.testing.assert_close(plain(model.logits(there)), logits)


def test_a_replaced_tensor_goes_back_to_where_it_was():
    module, ids = Spread(), torch.randint(11, (2, 5))
    one, seen = HookedModel(module, "one device"), []
    dictionary = SAE(7, 13, TopK(3)).eval()
    with model_spliced(one, [Insertion(dictionary, ("h.1:out",), ("h.1:out",))]), torch.no_grad():
        expected = one.run(ids)
    assert not torch.allclose(expected, one.logits(ids))

    def reconstruct(x):
        seen.append(x.device)
        return placed(dictionary.decode(dictionary.encode(plain(x).flatten(0, 1))).view(2, 5, 7), FIRST)

    model = spread(module)
    with torch.no_grad(), model.replacing("h.1:out", reconstruct):
        found = model.run(placed(ids, FIRST))
    assert seen == [FIRST]
    torch.testing.assert_close(plain(found), expected)


def test_device_map_goes_to_transformers(embedded_model, monkeypatch):
    ids, given = torch.randint(3, 900, (2, 5)), []
    from transformers import GPT2LMHeadModel

    own = GPT2LMHeadModel.from_pretrained
    monkeypatch.setattr(
        GPT2LMHeadModel, "from_pretrained", lambda *a, **options: given.append(options["device_map"]) or own(*a, **options)
    )
    model = load_model(ModelSection(device="cpu", device_map="balanced"))
    assert given == ["balanced"]
    torch.testing.assert_close(model.logits(ids.to(model.device)).cpu(), embedded_model.logits(ids))


def test_a_model_partly_on_disk_gives_the_same_activations(embedded_model, tmp_path):
    ids = torch.randint(3, 900, (2, 5))
    hooks = ("transformer.h.1:in", "transformer.h.2:out")
    module = load_model(ModelSection(device="cpu")).module
    places = {"transformer.wte": "disk", "lm_head": "disk", "transformer.h.2": "disk"}
    rest = ("transformer.wpe", "transformer.drop", "transformer.ln_f", *(f"transformer.h.{layer}" for layer in (0, 1, 3)))
    module = accelerate.dispatch_model(
        module, places | dict.fromkeys(rest, "cpu"), main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    model = HookedModel(module, "offloaded")
    assert next(module.transformer.wte.parameters()).is_meta
    assert model.device == torch.device("cpu")
    torch.testing.assert_close(model.activations(ids, hooks), embedded_model.activations(ids, hooks))
    torch.testing.assert_close(model.logits(ids), embedded_model.logits(ids))
    _, gradients = model.activations_and_gradients(ids, hooks)
    torch.testing.assert_close(gradients, embedded_model.activations_and_gradients(ids, hooks)[1])


def recipe(tmp_path, **model):
    values = {
        "model": {"device": "cpu"} | model,
        "harvest": {"store": str(tmp_path / "store"), "tokens": 4096},
        "dictionary": {"hook": "transformer.h.1:out", "n_latents": 32, "encoder": {"name": "topk", "k": 4}},
        "tokens": 4096,
        "out_dir": str(tmp_path / "run"),
    }
    return resolve_recipe(check_recipe(values, "recipe"))


def test_a_missing_package_is_one_message_before_any_work(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    message = r"model\.quantization: 4bit needs the package bitsandbytes, and a GPU .*not installed. Run: pip install"
    with pytest.raises(ValueError, match=message):
        plan_all([recipe(tmp_path, quantization="4bit")])
    with pytest.raises(ValueError, match=message):
        load_model(ModelSection(device="cpu", quantization="4bit"))
    plan_all([recipe(tmp_path)])


def test_a_device_that_it_does_not_support_is_one_message(monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"npu"})
    with pytest.raises(
        ValueError, match=r"8bit needs the package bitsandbytes, and a GPU or CPU that it supports \(None of the"
    ):
        require_quantization(ModelSection(quantization="8bit"))


def test_quantized_stores_are_another_identity():
    text, section = TextSection(), HarvestSection(hooks=("transformer.h.1:out",), store="s", tokens=9)
    found = [recipe_identity(ModelSection(quantization=kind), text, section) for kind in (None, "8bit", "4bit")]
    assert [each.entries["model", "quantization"] for each in found] == [None, "8bit", "4bit"]
    # A manifest without the entry is that of a store that is not quantized.
    store = SimpleNamespace(
        manifest={"model": {"id": "embedded", "dtype": "float32", "revision": None}, "hooks": {}, "content": None}
    )
    for identity, differs in zip(found, (False, True, True), strict=True):
        entry = {key: value for key, value in identity.entries.items() if key[0] == "model"}
        if differs:
            with pytest.raises(
                ValueError, match=rf"model\.quantization: None in the store, '{entry['model', 'quantization']}'"
            ):
                Identity(entry, ()).check(_with(store), {"model": {}, "tokenizer": ""}, text)
        else:
            Identity(entry, ()).check(_with(store), {"model": {}, "tokenizer": ""}, text)


def _with(store):
    return SimpleNamespace(manifest=store.manifest | {"content": {"text": {}}}, directory="s")


@pytest.mark.parametrize(("kind", "largest"), [("8bit", 0.01), ("4bit", 0.1)])
@pytest.mark.filterwarnings("ignore")
def test_quantized_activations_are_near_the_model_s(kind, largest, embedded_model):
    pytest.importorskip("bitsandbytes")
    hook = "transformer.h.2:out"
    model = load_model(ModelSection(device="cpu", dtype="bfloat16", quantization=kind))
    assert model.precision == {"dtype": "bfloat16", "quantization": kind}
    assert {parameter.dtype for parameter in model.module.parameters()} > {torch.bfloat16}
    ids = torch.randint(3, 900, (3, 17))
    x, exact = model.activations(ids, (hook,))[hook].float(), embedded_model.activations(ids, (hook,))[hook]
    error = (x - exact).square().sum() / (exact - exact.mean((0, 1))).square().sum()
    assert 0 < error < largest
    assert model_identity(model, (hook,)).entries["hooks", hook, "width"] == 128
    _, gradients = model.activations_and_gradients(ids, (hook,))
    assert gradients[hook].isfinite().all()
    with pytest.raises(ValueError, match=r"expected unquantized weights on one device, .* got quantized weights"):
        Architecture(model)
