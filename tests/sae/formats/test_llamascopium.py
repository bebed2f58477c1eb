"""llamascopium, and Llama Scope R1-Distill: files built after their layout against the equation written out in NumPy.

Golden ones are crosscoders that the library wrote: tests/parity/reference_formats_llamascopium.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae import load_dictionary
from sparsary.sae.formats import ReadOptions, read_dictionary, write_dictionary
from sparsary.transcoders import Crosscoder, CrossLayerTranscoder

LAYERS, D, LATENTS, TOKENS, K = 3, 8, 24, 40, 5
SITE = "blocks.5.hook_resid_post"
MLP = ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")
NORMS = {SITE: 5.0, MLP[0]: 4.0, MLP[1]: 11.0}
LOG = "activation_function.log_jumprelu_threshold"


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"W_E": (D, LATENTS), "b_E": (LATENTS,), "W_D": (LATENTS, D), "b_D": (D,)}
    found = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    return found | {LOG: rng.normal(1.0, 0.5, LATENTS).astype(np.float32)}


def config(hooks=(SITE, SITE), **changes):
    found = {"sae_type": "sae", "d_model": D, "expansion_factor": 3, "norm_activation": "dataset-wise", "top_k": K}
    found |= {"act_fn": "jumprelu", "sparsity_include_decoder_norm": True, "use_decoder_bias": True, "use_glu_encoder": False}
    return found | {"hook_point_in": hooks[0], "hook_point_out": hooks[1], "model_name": "meta-llama/Llama-3.1-8B"} | changes


def written(directory, found, about, norms=NORMS, dtype=torch.float32, suffix="safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in found.items()}
    tensors |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in norms.items()}
    if suffix == "pt":
        torch.save({"sae": tensors, "version": "2.0.0"}, directory / "sae_weights.pt")
    else:
        save_file(tensors, directory / "sae_weights.safetensors")
    (directory / "config.json").write_text(json.dumps(about))
    return directory


def near(ours, theirs):
    """Outputs of different sizes, to a part in a hundred thousand."""
    ours = ours.detach().numpy()
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def inputs(layers=1):
    return np.random.default_rng(9).normal(0.9, 1.5, (layers, TOKENS, D)).astype(np.float32)


def gated(p, n, found, about):
    """The gate, in the units of what is compared."""
    n = n if about["sparsity_include_decoder_norm"] else np.ones_like(n)
    m = p * n
    if about["act_fn"] == "relu":
        kept = np.maximum(m, 0)
    elif about["act_fn"] == "topk":
        kept = np.zeros_like(m)
        best = np.argsort(-m, axis=1)[:, :K]
        np.put_along_axis(kept, best, np.maximum(np.take_along_axis(m, best, 1), 0), 1)
    else:
        kept = m * (m > np.exp(found[LOG]))
    assert 0.02 < (kept != 0).mean() < 0.9
    return kept / n


def reference(found, x, about):
    scales = {"in": 1.0, "out": 1.0}
    if about["norm_activation"] == "dataset-wise":
        scales = {side: D**0.5 / NORMS[about[f"hook_point_{side}"]] for side in scales}
    xi, undo = x * scales["in"], scales["out"]
    if about["norm_activation"] == "token-wise":
        undo = D**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
        xi = x * undo
    p = xi @ found["W_E"] + found["b_E"]
    a = gated(p, np.linalg.norm(found["W_D"], axis=1), found, about)
    return a, (a @ found["W_D"] + found["b_D"]) / undo


def check(folder, found, about):
    x = inputs()[0]
    loaded = read_dictionary(folder)
    a, y = reference(found, x, about)
    code = loaded.dictionary.encode(torch.from_numpy(x))
    near(loaded.dictionary.decode(code, torch.from_numpy(x)), y)
    assert np.array_equal(code.to_dense(LATENTS).detach().numpy() != 0, a != 0)
    return loaded


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("gate", ["jumprelu", "topk", "relu"])
@pytest.mark.parametrize("how", ["dataset-wise", "inference", "token-wise"])
def test_an_autoencoder_is_its_equation(how, gate, by_norm, tmp_path):
    found, about = parameters(), config(norm_activation=how, act_fn=gate, sparsity_include_decoder_norm=by_norm)
    if gate != "jumprelu":
        del found[LOG]
    loaded = check(written(tmp_path, found, about), found, about)
    assert loaded.provenance["hook"] == "model.layers.5:out"
    assert any("compare l0" in warning for warning in loaded.warnings) == (how == "inference" and gate == "jumprelu")


@pytest.mark.parametrize("gate", ["jumprelu", "topk"])
def test_a_transcoder_is_its_equation(gate, tmp_path):
    found, about = parameters(), config(MLP, act_fn=gate)
    found = found if gate == "jumprelu" else {name: value for name, value in found.items() if name != LOG}
    loaded = check(written(tmp_path, found, about), found, about)
    assert loaded.provenance["hooks_in"] == ["model.layers.5.mlp:in"]
    assert loaded.dictionary.arguments()["kind"] == "transcoder"


def test_tensors_may_be_in_a_torch_file(tmp_path):
    found, about = parameters(), config()
    check(written(tmp_path, found, about, suffix="pt"), found, about)


def test_without_an_output_bias_it_is_zero(tmp_path):
    found, about = parameters(), config(use_decoder_bias=False)
    del found["b_D"]
    check(written(tmp_path, found, about), found | {"b_D": np.zeros(D, np.float32)}, about)


def test_half_precision_is_computed_in_float32(tmp_path):
    found, about = parameters(), config()
    rounded = {name: torch.from_numpy(value).bfloat16().float().numpy() for name, value in found.items()}
    check(written(tmp_path, found, about, dtype=torch.bfloat16), rounded, about)


@pytest.mark.parametrize("by_norm", [True, False])
def test_llama_scope_r1_has_the_same_under_earlier_names(by_norm, tmp_path):
    found = parameters()
    about = config(
        sparsity_include_decoder_norm=by_norm, dataset_average_activation_norm={"in": NORMS[SITE], "out": NORMS[SITE]}
    )
    del about["sae_type"]
    earlier = {"encoder.weight": found["W_E"].T.copy(), "encoder.bias": found["b_E"], "decoder.weight": found["W_D"].T.copy()}
    earlier |= {"decoder.bias": found["b_D"], "log_jumprelu_threshold": found[LOG]}
    loaded = check(written(tmp_path, earlier, about, norms={}), found, about)
    assert "encoder, decoder and threshold renamed" in loaded.notes


def layered(gate="jumprelu"):
    rng = np.random.default_rng(3)
    found = {"W_E": rng.normal(size=(LAYERS, D, LATENTS)), "b_E": rng.normal(size=(LAYERS, LATENTS))}
    for t in range(LAYERS):
        found |= {f"W_D.{t}": rng.normal(size=(t + 1, LATENTS, D)), f"b_D.{t}": rng.normal(size=D)}
    found |= {LOG: rng.normal(1.5, 0.5, (LAYERS, LATENTS))} if gate == "jumprelu" else {}
    return {name: value.astype(np.float32) for name, value in found.items()}


def layered_config(**changes):
    found = config(**changes) | {"sae_type": "clt"}
    del found["hook_point_in"], found["hook_point_out"]
    hooks = {
        f"hook_points_{side}": [f"blocks.{i}.{name}" for i in range(LAYERS)]
        for side, name in (("in", "mlp.hook_in"), ("out", "hook_mlp_out"))
    }
    return found | hooks | changes


def layered_norms():
    return {
        f"blocks.{i}.{name}": float(size + i) for i in range(LAYERS) for name, size in (("mlp.hook_in", 3), ("hook_mlp_out", 7))
    }


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("gate", ["jumprelu", "topk", "relu"])
@pytest.mark.parametrize("how", ["dataset-wise", "inference"])
def test_one_across_layers_is_its_equation(how, gate, by_norm, tmp_path):
    found, about = layered(gate), layered_config(norm_activation=how, act_fn=gate, sparsity_include_decoder_norm=by_norm)
    norms, x = layered_norms(), inputs(LAYERS)
    loaded = read_dictionary(written(tmp_path, found, about, norms))
    assert isinstance(loaded.dictionary, CrossLayerTranscoder)
    scale = {hook: D**0.5 / norm if how == "dataset-wise" else 1.0 for hook, norm in norms.items()}
    y = np.stack([np.tile(found[f"b_D.{t}"], (TOKENS, 1)) for t in range(LAYERS)])
    for s in range(LAYERS):
        p = x[s] * scale[f"blocks.{s}.mlp.hook_in"] @ found["W_E"][s] + found["b_E"][s]
        # Over all layers it writes to.
        n = np.sqrt(sum((found[f"W_D.{t}"][s] ** 2).sum(1) for t in range(s, LAYERS)))
        own = {LOG: found[LOG][s]} if gate == "jumprelu" else {}
        a = gated(p, n, own, about)
        for t in range(s, LAYERS):
            y[t] += a @ found[f"W_D.{t}"][s]
    y = np.concatenate([y[t] / scale[f"blocks.{t}.hook_mlp_out"] for t in range(LAYERS)], axis=1)
    beside = torch.from_numpy(np.concatenate(list(x), axis=1))
    near(loaded.dictionary(beside), y)
    assert loaded.provenance["hooks_out"] == [f"model.layers.{i}.mlp:out" for i in range(LAYERS)]
    if gate == "topk":
        return
    # Scales by layer, and norms, are folded for a format that has neither.
    write_dictionary(loaded.dictionary, tmp_path / "there", "circuit_tracer", loaded.provenance)
    again = read_dictionary(tmp_path / "there").dictionary(beside)
    near(again, y)


@pytest.mark.parametrize("gate", ["batchtopk", "layertopk", "batchlayertopk"])
def test_choices_shared_among_tokens_or_layers_need_a_threshold(gate, tmp_path):
    found = layered("shared")
    folder = written(tmp_path, found, layered_config(act_fn=gate), layered_norms())
    with pytest.raises(ValueError, match=rf"act_fn: {gate} needs a threshold .*threshold=NUMBER"):
        read_dictionary(folder)
    given = read_dictionary(folder, options=ReadOptions(threshold=4.0)).dictionary
    found[LOG] = np.full((LAYERS, LATENTS), np.log(4.0), np.float32)
    plain = read_dictionary(written(tmp_path / "b", found, layered_config(), layered_norms())).dictionary
    x = torch.randn(9, LAYERS * D)
    torch.testing.assert_close(given(x), plain(x))


def test_weights_in_shards_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "sae_weights.dcp").mkdir()
    (tmp_path / "sae_weights.dcp" / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "config.json").write_text(json.dumps(config()))
    with pytest.raises(ValueError, match=r"the weights are sharded \(.dcp\), .*save_checkpoint"):
        read_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sae_type": "lorsa"}, "sae_type: expected sae, transcoder, clt or crosscoder, got 'lorsa'"),
        ({"use_glu_encoder": True}, "use_glu_encoder: expected false, got true"),
        ({"act_fn": "swish"}, "act_fn: expected relu, topk, jumprelu, batchtopk"),
        ({"norm_activation": "batch-wise"}, "norm_activation: expected dataset-wise"),
        ({"hook_point_out": MLP[1], "norm_activation": "token-wise"}, "norms that inference does not know"),
        ({"hook_point_in": "blocks.1.hook_resid_post"}, "blocks.1.hook_resid_post: expected a number above 0, got None"),
        ({"d_model": 9}, r"W_E, its latents last: expected shape \(9, 24\), got \(8, 24\)"),
        ({"act_fn": "topk", "top_k": 99}, "k: expected at most the 24 latents there are, got 99"),
    ],
)
def test_damaged_configurations_are_named(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(written(tmp_path, parameters(), config(**changes)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({LOG: None}, "required with act_fn jumprelu, found none"),
        ({"b_D": None}, "b_D missing among"),
        ({"W_E": torch.zeros(LATENTS, D)}, r"W_E, its latents last: expected shape \(8, 24\), got \(24, 8\)"),
        ({"W_D": torch.zeros(D, LATENTS)}, r"W_D, its latents first: expected shape \(24, 8\), got \(8, 24\)"),
        ({LOG: torch.full((LATENTS,), 200.0)}, "threshold: expected finite numbers, got inf"),
        ({"W_E_glu": torch.zeros(2)}, "got also W_E_glu"),
        ({f"dataset_average_activation_norm.{SITE}": torch.tensor(torch.nan)}, "expected a number above 0, got nan"),
        ({f"dataset_average_activation_norm.{SITE}": torch.ones(2)}, r"expected shape \(\), got \(2,\)"),
    ],
)
def test_damaged_tensors_are_named(changes, says, tmp_path):
    folder = written(tmp_path, parameters(), config())
    path = folder / "sae_weights.safetensors"
    save_file({key: value for key, value in (load_file(path) | changes).items() if value is not None}, path)
    with pytest.raises(ValueError, match=says):
        read_dictionary(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"W_D.1": None}, "W_D.1 missing among"),
        ({"W_D.1": torch.zeros(1, LATENTS, D)}, r"W_D.1: expected shape \(2, 24, 8\), got \(1, 24, 8\)"),
        ({"b_D.2": torch.zeros(3)}, r"b_D.2: expected shape \(8\), got \(3,\)"),
        ({LOG: torch.zeros(LATENTS)}, r"expected shape \(3, 24\), got \(24,\)"),
        ({"W_E": torch.zeros(LAYERS, LATENTS, D)}, r"W_E, layers by width by latents: expected shape \(3, 8, any\)"),
    ],
)
def test_damaged_layers_are_named(changes, says, tmp_path):
    folder = written(tmp_path, layered(), layered_config(), layered_norms())
    path = folder / "sae_weights.safetensors"
    save_file({key: value for key, value in (load_file(path) | changes).items() if value is not None}, path)
    with pytest.raises(ValueError, match=says):
        read_dictionary(folder)


# Crosscoders.

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "llamascopium"
SITES = [f"blocks.{layer}.hook_resid_post" for layer in (2, 5, 9)]


def crosscoder(seed=0, equal_norms=False):
    rng = np.random.default_rng(seed)
    sizes = {"W_E": (3, D, LATENTS), "b_E": (3, LATENTS), "W_D": (3, LATENTS, D), "b_D": (3, D)}
    found = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    if equal_norms:
        norms = np.abs(rng.normal(2, 0.5, LATENTS)).astype(np.float32)
        found["W_D"] *= (norms / np.linalg.norm(found["W_D"], axis=-1))[..., None]
    return found


def crosscoder_config(**changes):
    found = config(sae_type="crosscoder", hook_points=SITES, act_fn="relu") | changes
    return {key: value for key, value in found.items() if key not in ("hook_point_in", "hook_point_out")}


def crosscoder_reference(found, x, about, norms):
    """The library's equation: one pre-activation, gated at every site by its value times the norm there."""
    scales = np.array([D**0.5 / norm for norm in norms]) if about["norm_activation"] == "dataset-wise" else np.ones(3)
    p = sum(x[s] * scales[s] @ found["W_E"][s] + found["b_E"][s] for s in range(3))
    outputs = []
    for s in range(3):
        a = gated(p, np.linalg.norm(found["W_D"][s], axis=1), found, about)
        outputs.append((a @ found["W_D"][s] + found["b_D"][s]) / scales[s])
    return outputs


@pytest.mark.parametrize("act_fn", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("how", ["dataset-wise", "inference"])
def test_a_crosscoder_computes_what_the_library_does(tmp_path, act_fn, how):
    found, about = crosscoder(equal_norms=act_fn != "relu"), crosscoder_config(act_fn=act_fn, norm_activation=how)
    if act_fn == "jumprelu":
        found[LOG] = np.random.default_rng(4).normal(3.0, 0.4, LATENTS).astype(np.float32)
    norms = (5.0, 7.0, 11.0)
    read = read_dictionary(written(tmp_path / act_fn, found, about, dict(zip(SITES, norms, strict=True))))
    (ours,) = read.dictionaries.values()
    assert isinstance(ours, Crosscoder)
    assert (ours.widths, ours.n_latents, ours.names) == ((D,) * 3, LATENTS, tuple(f"model.layers.{n}:out" for n in (2, 5, 9)))
    x = inputs(3)
    for y, expected in zip(ours(list(x)), crosscoder_reference(found, x, about, norms), strict=True):
        near(y, expected)
    ours.save(tmp_path / "saved", {})
    again = load_dictionary(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again(list(x)), ours(list(x)), strict=True))
    with pytest.raises(ValueError, match="got a crosscoder, which no format that is written can hold"):
        write_dictionary(ours, tmp_path / "theirs", "saelens")


@pytest.mark.parametrize("case", ["relu", "relu_folded", "topk", "jumprelu"])
def test_crosscoders_that_the_library_wrote_give_its_outputs(case):
    folder = GOLDEN / f"crosscoder_{case}"
    # Their files do not name the model, which tells what their hooks are.
    options = ReadOptions(model="meta-llama/Llama-3.1-8B")
    expected, read = load_file(folder / "expected.safetensors"), read_dictionary(folder, options=options)
    (ours,) = read.dictionaries.values()
    assert isinstance(ours, Crosscoder)
    assert ours.names == tuple(f"model.layers.{n}:out" for n in (2, 5, 9))
    x = list(expected["x"].unbind(1))
    torch.testing.assert_close(torch.stack(ours(x), dim=1), expected["y"], rtol=1e-5, atol=1e-4)
    assert torch.equal(ours.encode(x).to_dense(ours.n_latents) != 0, expected["fires"])


@pytest.mark.parametrize(
    ("changes", "left_out", "message"),
    [
        ({"act_fn": "jumprelu"}, (), "jumprelu gates a latent at each site by its value times its norm there"),
        ({"hook_points": SITES[:1]}, (), "hook_points: expected a list of two or more hooks"),
        ({}, ("b_D",), "b_D"),
        ({"hook_points": SITES[:2]}, (), r"W_E, sites first: expected .*2, 8, 24.*, got .*3, 8, 24"),
        ({"norm_activation": "token-wise"}, (), "norm_activation: expected dataset-wise or inference for a crosscoder"),
    ],
    ids=["gates", "one", "missing", "sites", "token-wise"],
)
def test_crosscoders_that_do_not_fit_are_refused(tmp_path, changes, left_out, message):
    found = crosscoder() | {LOG: np.zeros(LATENTS, np.float32)}
    found = {name: value for name, value in found.items() if name not in left_out}
    norms = dict.fromkeys(SITES, 5.0)
    with pytest.raises(ValueError, match=message):
        read_dictionary(written(tmp_path / "files", found, crosscoder_config(**changes), norms))
