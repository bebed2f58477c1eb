"""OpenAI's autoencoders: files after its layout give what its equation says, which is written out here in NumPy."""

import numpy as np
import pytest
import torch

from sparsary.sae.formats import ReadOptions, read_dictionary, write_dictionary

D, LATENTS, K = 8, 24, 5


def numpy_forward(state, x, activation, post="ReLU"):
    """Latents and output by the published equation."""
    x, W_enc, W_dec = (v.numpy().astype(np.float64) for v in (x, state["encoder.weight"], state["decoder.weight"]))
    pre, bias = (state[key].numpy().astype(np.float64) for key in ("pre_bias", "latent_bias"))
    mean, scale, seen = 0.0, 1.0, x
    if activation == "TopK":
        mean = x.mean(axis=1, keepdims=True)
        scale = (x - mean).std(axis=1, ddof=1, keepdims=True)
        seen = (x - mean) / (scale + 1e-5)
    p = (seen - pre) @ W_enc.T + bias
    if activation == "TopK":
        best = np.argsort(-p, axis=1)[:, :K]
        kept = np.take_along_axis(p, best, axis=1)
        a = np.zeros_like(p)
        np.put_along_axis(a, best, np.maximum(kept, 0) if post == "ReLU" else kept, axis=1)
    else:
        a = np.maximum(p, 0)
    return a, (a @ W_dec.T + pre) * scale + mean


def state(kind="TopK", post="ReLU", **changes):
    """A file's contents: random weights, and the statistics and strings that are kept beside them."""
    torch.manual_seed(5)
    found = {"pre_bias": torch.randn(D), "latent_bias": 0.5 * torch.randn(LATENTS)}
    found |= {"encoder.weight": torch.randn(LATENTS, D), "decoder.weight": torch.randn(D, LATENTS)}
    found |= {"stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.long), "latents_mean_square": torch.ones(LATENTS)}
    found |= {"latents_activation_frequency": torch.ones(LATENTS), "activation": kind}
    found["activation_state_dict"] = {"k": K, "postact_fn": post} if kind == "TopK" else {}
    return {key: value for key, value in (found | changes).items() if value is not None}


def saved(tmp_path, contents, name="6.pt"):
    torch.save(contents, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(("activation", "post"), [("TopK", "ReLU"), ("TopK", "Identity"), ("ReLU", "ReLU")])
def test_outputs_are_the_equation_s(activation, post, tmp_path):
    contents, x = state(activation, post), 1.5 * torch.randn(17, D) + torch.randn(D)
    if post == "Identity":
        # So that some of the k largest are negative.
        contents["latent_bias"] -= 5
    loaded = read_dictionary(saved(tmp_path, contents), options=ReadOptions(hook="transformer.h.6:out", model="gpt2"))
    d = loaded.dictionary
    a, y = numpy_forward(contents, x, activation, post)
    code = d.encode(x)
    torch.testing.assert_close(d.decode(code, x), torch.tensor(y, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    dense = code.to_dense(LATENTS)
    assert torch.equal(dense != 0, torch.tensor(a != 0))
    assert bool((dense < 0).any()) == (post == "Identity")
    assert loaded.provenance["hook"] == "transformer.h.6:out"
    assert loaded.provenance["source"]["config"]["activation"] == activation
    assert "pre_bias and latent_bias" in loaded.evidence


@pytest.mark.parametrize("tied", ["encoder", "decoder", "both"])
def test_tied_ones_have_one_matrix(tied, tmp_path):
    W, x = state()["encoder.weight"], torch.randn(9, D)
    matrices = {
        "encoder": {"encoder.weight": W, "decoder.weight": None},
        "decoder": {"encoder.weight": None, "decoder.weight": W.T},
        "both": {"encoder.weight": W, "decoder.linear.weight": W, "decoder.weight": None},
    }
    read = read_dictionary(saved(tmp_path, state(**matrices[tied])))
    # Only one of them says so itself; a file that lost a matrix looks like the others.
    assert any("taken for tied" in warning for warning in read.warnings) == (tied != "both")
    d = read.dictionary
    _, y = numpy_forward(state() | {"encoder.weight": W, "decoder.weight": W.T}, x, "TopK")
    torch.testing.assert_close(d(x), torch.tensor(y, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_an_activation_that_is_not_named_is_relu_and_normalises_nothing(tmp_path):
    contents, x = state("ReLU", activation_state_dict=None), torch.randn(9, D)
    del contents["activation"]
    d = read_dictionary(saved(tmp_path, contents)).dictionary
    torch.testing.assert_close(d(x), torch.tensor(numpy_forward(contents, x, "ReLU")[1]).float(), rtol=1e-5, atol=1e-5)


def test_a_folder_of_layers_is_read_by_file(tmp_path):
    for layer in (2, 10):
        saved(tmp_path, state(), f"{layer}.pt")
    assert list(read_dictionary(tmp_path).dictionaries) == ["2", "10"]
    for hook in ("10", "10.pt"):
        assert read_dictionary(tmp_path, options=ReadOptions(hook=hook)).provenance["source"]["config"]["file"] == "10.pt"
    with pytest.raises(ValueError, match="hook: expected one of 2, 10, got '4'"):
        read_dictionary(tmp_path, options=ReadOptions(hook="4"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation_state_dict": {"k": "5"}}, "k: expected a whole number from 1, got '5'"),
        ({"decoder.linear.weight": torch.zeros(3)}, r"decoder.linear.weight: expected shape \(24, 8\), got \(3,\)"),
        ({"activation": "Softmax"}, "activation: expected ReLU or TopK, got 'Softmax'"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Tanh"}}, "postact_fn: expected one of ReLU, Identity, got 'Tanh'"),
        ({"activation_state_dict": {"k": K, "postact_fn": []}}, r"postact_fn: expected one of ReLU, Identity, got \[\]"),
        ({"activation_state_dict": {}}, "k: expected the number of latents per token, found none"),
        ({"activation_state_dict": {"k": 25}}, "k: expected at most the 24 latents there are, got 25"),
        ({"activation_state_dict": {"k": -1}}, "k: expected a whole number from 1, got -1"),
        ({"encoder.weight": torch.zeros(D, LATENTS)}, r"encoder.weight: expected shape \(24, 8\), got \(8, 24\)"),
        ({"decoder.weight": torch.zeros(LATENTS, D)}, r"decoder.weight: expected shape \(8, 24\), got \(24, 8\)"),
        ({"encoder.weight": None, "decoder.weight": None}, "encoder.weight, decoder.weight missing among"),
        ({"latent_bias": torch.full((LATENTS,), torch.nan)}, "b_enc: expected finite numbers, got nan"),
        ({"pre_bias": torch.zeros(1, D)}, r"pre_bias: expected shape \(8\), got \(1, 8\)"),
        ({"b_dec": torch.zeros(D)}, "got also b_dec"),
    ],
)
def test_damaged_files_are_named(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(saved(tmp_path, state(**changes)))


def test_a_truncated_file_is_named(tmp_path):
    path = saved(tmp_path, state())
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="got a damaged or older one"):
        read_dictionary(path)


def test_they_are_read_only(tmp_path):
    d = read_dictionary(saved(tmp_path, state())).dictionary
    with pytest.raises(ValueError, match=r"openai: read-only format. Use --to saelens"):
        write_dictionary(d, tmp_path / "out", "openai")
    write_dictionary(d, tmp_path / "out", "saelens")
    x = torch.randn(9, D)
    torch.testing.assert_close(read_dictionary(tmp_path / "out").dictionary(x), d(x), rtol=1e-5, atol=1e-5)
