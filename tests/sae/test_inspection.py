"""Questions to a dictionary: shapes of batch and position, single tokens, directions, the strongest latents, its hook."""

import numpy as np
import pytest
import torch

from sparsary.sae import ENCODERS, SAE, load_dictionary
from sparsary.sae.sparse_code import SparseCode
from sparsary.transcoders import Crosscoder, CrossLayerTranscoder, Transcoder

KINDS = {
    "sae": lambda: SAE(12, 31, ENCODERS["topk"](k=3)),
    "transcoder": lambda: Transcoder(12, 10, 31, ENCODERS["topk"](k=3), skip=True),
    "crosscoder": lambda: Crosscoder([5, 7], 31, ENCODERS["topk"](k=3)),
    "across": lambda: CrossLayerTranscoder(3, 12, 12, 30, ENCODERS["topk"](k=2)),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=list(KINDS))
def dictionary(request):
    built = KINDS[request.param]().eval()
    built.b_dec.normal_()
    built.out_scale.mul_(2.5)
    for parameter in built.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def test_batch_and_position_come_back(dictionary):
    x = torch.randn(2, 5, 12)
    flat = dictionary.encode(x.flatten(0, 1))
    code = dictionary.encode(x)
    assert code.batch_shape == (2, 5)
    assert torch.equal(code.latents, flat.latents)
    y = dictionary(x)
    assert y.shape == (2, 5, dictionary.d_out)
    torch.testing.assert_close(y.flatten(0, 1), dictionary(x.flatten(0, 1)))
    torch.testing.assert_close(dictionary.decode(code.relu(), x), dictionary.decode(flat.relu(), x.flatten(0, 1)).view_as(y))
    dense = code.to_dense(dictionary.n_latents).view(2, 5, -1)
    torch.testing.assert_close(dictionary.decode(dense, x), y)
    torch.testing.assert_close(dictionary(x.double().numpy()), y)


def test_a_wrong_width_is_refused_in_any_shape(dictionary):
    for shape in ((5, 11), (2, 5, 11), (12,)):
        with pytest.raises(ValueError, match=r"x: expected \(tokens, 12\), got"):
            dictionary.encode(torch.randn(shape))


def test_a_token_has_its_firing_latents_the_largest_first(dictionary):
    x = torch.randn(2, 5, 12)
    code = dictionary.encode(x)
    dense = code.to_dense(dictionary.n_latents)
    for number, place in enumerate(np.ndindex(2, 5)):
        latents, values = code[place]
        assert torch.equal(dense[number, latents], values)
        assert int((dense[number] != 0).sum()) == len(latents)
        assert torch.equal(values.abs(), values.abs().sort(descending=True).values)
    assert torch.equal(code[-1][0], code[1, 4][0])
    assert torch.equal(code[9][0], code[-1, -1][0])
    for wrong in (10, -11, (2, 0), (0, 5), (0, 0, 0)):
        with pytest.raises(IndexError, match="token: expected"):
            code[wrong]


def test_silent_and_negative_entries():
    code = SparseCode.from_rows(torch.tensor([[4, 2, 7]]), torch.tensor([[0.5, -2.0, 0.0]]))
    latents, values = code[0]
    assert (latents.tolist(), values.tolist()) == ([2, 4], [-2.0, 0.5])
    with pytest.raises(IndexError):
        code[0, 0]


def test_activations_times_directions_are_contributions(dictionary):
    x = torch.randn(7, 12)
    bias = dictionary.decode(dictionary.encode(x).where(torch.zeros_like(dictionary.encode(x).latents, dtype=torch.bool)), x)
    latents = list(range(dictionary.n_latents))
    written = dictionary.activations_of(latents, x) @ torch.stack([dictionary.direction(latent) for latent in latents])
    torch.testing.assert_close(written + bias, dictionary(x))
    assert dictionary.activations_of(3, x).shape == (7,)
    assert dictionary.activations_of([3, 5], x.view(1, 7, 12)).shape == (1, 7, 2)
    for wrong in (-1, dictionary.n_latents):
        with pytest.raises(ValueError, match=f"latent: expected 0 to {dictionary.n_latents - 1}, got {wrong}"):
            dictionary.direction(wrong)
        with pytest.raises(ValueError, match="latent: expected 0 to"):
            dictionary.activations_of([1, wrong], x)


def test_the_strongest_latents_come_first_each_once(dictionary):
    x = torch.randn(9, 12)
    dense = dictionary.encode(x).to_dense(dictionary.n_latents)
    found = dictionary.top_latents(x, n=4)
    assert len(found) == 4
    maxima = dense.amax(0)
    assert [each.value for each in found] == maxima.sort(descending=True).values[:4].tolist()
    for each in found:
        assert float(dense[each.token, each.latent]) == each.value == float(maxima[each.latent])
    assert len(dictionary.top_latents(x, n=10_000)) == int((dense != 0).any(0).sum())
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        dictionary.top_latents(x, n=0)


def test_a_loaded_dictionary_says_where_it_comes_from(tmp_path):
    sae = SAE(12, 31, ENCODERS["topk"](k=3))
    assert (sae.hook, sae.model_id, sae.recipe) == (None, None, None)
    with pytest.raises(ValueError, match="provenance: expected the hooks"):
        _ = sae.hooks
    about = {"hook": "h.2:out", "model": {"id": "tiny"}, "recipe": {"tokens": 5}}
    sae.save(tmp_path, about)
    loaded = load_dictionary(tmp_path)
    assert (loaded.hook, loaded.model_id, loaded.recipe) == ("h.2:out", "tiny", {"tokens": 5})
    assert loaded.hooks == (("h.2:out",), ("h.2:out",))
    assert repr(loaded) == "SAE(12 -> 31 latents -> 12, topk, k=3, hook='h.2:out', model_id='tiny')"
    several = {"hooks_in": ["a:in", "b:in"], "hooks_out": ["a:out", "b:out"]}
    KINDS["transcoder"]().save(tmp_path / "t", several)
    assert load_dictionary(tmp_path / "t").hook is None
