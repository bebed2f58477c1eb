"""The BatchTopK repository: files after its layout give what its equations say, which are written out here in NumPy."""

import json

import numpy as np
import pytest
import torch

from sparsary.sae.formats import ReadOptions, read_dictionary, write_dictionary

D, LATENTS, K = 8, 24, 5
CONFIG = {
    "seed": 49,
    "dtype": "torch.float32",
    "model_name": "gpt2-small",
    "site": "resid_pre",
    "layer": 8,
    "act_size": D,
    "dict_size": LATENTS,
    "device": "cuda:0",
    "seq_len": 128,
    "top_k": K,
    "input_unit_norm": True,
    "sae_type": "topk",
    "hook_point": "blocks.8.hook_resid_pre",
}


def tensors(**changes):
    torch.manual_seed(7)
    found = {"W_enc": torch.randn(D, LATENTS), "W_dec": torch.randn(LATENTS, D)}
    found |= {"b_enc": 0.5 * torch.randn(LATENTS), "b_dec": torch.randn(D)} | changes
    return {key: value for key, value in found.items() if value is not None}


def saved(tmp_path, state, **config):
    torch.save(state, tmp_path / "sae.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
    return tmp_path


def numpy_forward(state, x, gate, unit, centred=True):
    """Latents and output by the repository's equations; ``gate`` is the threshold, or ``None`` for TopK."""
    s = {key: value.numpy().astype(np.float64) for key, value in state.items()}
    x = x.numpy().astype(np.float64)
    mean, scale, seen = 0.0, 1.0, x
    if unit:
        mean = x.mean(axis=1, keepdims=True)
        scale = (x - mean).std(axis=1, ddof=1, keepdims=True)
        seen = (x - mean) / (scale + 1e-5)
    p = np.maximum((seen - s["b_dec"] if centred else seen) @ s["W_enc"] + s["b_enc"], 0)
    a = p * (p >= -np.sort(-p, axis=1)[:, K - 1 : K] if gate is None else p > gate)
    return a, (a @ s["W_dec"] + s["b_dec"]) * scale + mean


LOG = -0.5 + 0.3 * torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))
CASES = {
    "vanilla": ("vanilla", {}, 0.0, True),
    "topk": ("topk", {}, None, True),
    "matryoshka": ("global-matryoshka-topk", {"threshold": torch.tensor(0.7), "group_sizes": torch.tensor([8, 16])}, 0.7, True),
    "batchtopk": ("batchtopk", {"threshold": torch.tensor([0.7])}, 0.7, True),
    "jumprelu": ("jumprelu", {"jumprelu.log_threshold": LOG}, np.exp(LOG.double().numpy()), False),
    "jumprelu_old": ("jumprelu", {"log_threshold": LOG}, np.exp(LOG.double().numpy()), False),
}


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_equations(case, unit, tmp_path):
    kind, more, gate, centred = CASES[case]
    state, x = tensors(**more), 1.5 * torch.randn(17, D) + torch.randn(D)
    loaded = read_dictionary(saved(tmp_path, state, sae_type=kind, input_unit_norm=unit))
    d = loaded.dictionary
    a, y = numpy_forward(state, x, gate, unit, centred)
    code = d.encode(x)
    torch.testing.assert_close(d.decode(code, x), torch.tensor(y).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(code.to_dense(LATENTS) != 0, torch.tensor(a != 0))
    assert 0.1 < (a != 0).mean() < 0.7
    assert loaded.provenance["hook"] == "transformer.h.8:in"
    assert loaded.provenance["text"] == {"context_length": 128}


def test_jumprelu_is_centred_only_if_said(tmp_path):
    state, x = tensors(log_threshold=LOG), torch.randn(9, D)
    folder = saved(tmp_path, state, sae_type="jumprelu")
    assert "b_dec is not subtracted" in read_dictionary(folder).warnings[0]
    d = read_dictionary(folder, options=ReadOptions(subtract_b_dec=True)).dictionary
    _, y = numpy_forward(state, x, np.exp(LOG.double().numpy()), True)
    torch.testing.assert_close(d(x), torch.tensor(y).float(), rtol=1e-5, atol=1e-5)


def test_switches_of_old_versions(tmp_path):
    state, x = tensors(), torch.randn(9, D)
    d = read_dictionary(saved(tmp_path, state, tied_weights=True, use_encoder_bias=False)).dictionary
    changed = state | {"W_dec": state["W_enc"].T, "b_enc": torch.zeros(LATENTS)}
    torch.testing.assert_close(d(x), torch.tensor(numpy_forward(changed, x, None, True)[1]).float(), rtol=1e-5, atol=1e-5)


def test_a_choice_over_the_batch_needs_a_threshold(tmp_path):
    for level in (None, torch.tensor(-1.0), torch.tensor(0.0), torch.ones(LATENTS)):
        with pytest.raises(ValueError, match=r"batchtopk selects latents over a whole batch.* threshold=NUMBER"):
            read_dictionary(saved(tmp_path, tensors(threshold=level), sae_type="batchtopk"))
    state, x = tensors(), torch.randn(9, D)
    d = read_dictionary(saved(tmp_path, state, sae_type="batchtopk"), options=ReadOptions(threshold=0.4)).dictionary
    torch.testing.assert_close(d(x), torch.tensor(numpy_forward(state, x, 0.4, True)[1]).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        ({"sae_type": "quantile"}, {}, "sae_type: expected vanilla, topk, .* got 'quantile'"),
        ({"activation": "gelu"}, {}, "activation: expected relu, got 'gelu'"),
        ({"act_size": "8"}, {}, "act_size: expected a whole number in config.json, got '8'"),
        ({"dict_size": 10**12}, {}, r"W_enc: expected shape \(8, 1000000000000\), got \(8, 24\)"),
        ({"top_k": None}, {}, "k: expected the number of latents per token, found none"),
        ({}, {"W_enc": torch.zeros(LATENTS, D)}, r"W_enc: expected shape \(8, 24\), got \(24, 8\)"),
        ({}, {"b_enc": None}, "b_enc missing among W_dec, W_enc, b_dec"),
        ({}, {"b_dec": torch.full((D,), torch.nan)}, "b_in: expected finite numbers, got nan"),
        ({}, {"log_threshold": torch.zeros(3)}, r"log_threshold: expected shape \(24\), got \(3,\)"),
        ({}, {"W_other": torch.zeros(3)}, "got also W_other"),
    ],
)
def test_damaged_folders_are_named(config, changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(saved(tmp_path, tensors(**changes), **config))


def test_files_are_needed_and_never_written(tmp_path):
    folder = saved(tmp_path, tensors())
    d = read_dictionary(folder).dictionary
    with pytest.raises(ValueError, match="batch_topk: read-only format"):
        write_dictionary(d, tmp_path / "out", "batch_topk")
    (folder / "sae.pt").rename(folder / "a.pt")
    assert read_dictionary(folder).dictionary.n_latents == LATENTS
    torch.save({}, folder / "b.pt")
    with pytest.raises(ValueError, match=r"expected sae\.pt, found a\.pt, b\.pt"):
        read_dictionary(folder)
