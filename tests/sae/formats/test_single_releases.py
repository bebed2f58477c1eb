"""Published sets without a library: files after their layouts give what the conventions say, written out in NumPy."""

import json

import numpy as np
import pytest
import torch

from sparsary.sae.formats import ReadOptions, SourceFiles, detect, read_dictionary, write_dictionary
from sparsary.sae.formats.single_releases import DeepSeekR1, block_output
from sparsary.sae.formats.torch_files import TorchFiles

D, LATENTS, K = 8, 24, 5


def arrays(latents=LATENTS, width=D):
    """W_enc and W_dec with latents first, and biases."""
    torch.manual_seed(9)
    return torch.randn(latents, width), 0.5 * torch.randn(latents), torch.randn(latents, width), torch.randn(width)


def relu_forward(x, W_enc, b_enc, W_dec, b_dec, subtracted=False, k=None):
    x, W_enc, b_enc, W_dec, b_dec = (v.double().numpy() for v in (x, W_enc, b_enc, W_dec, b_dec))
    a = np.maximum((x - b_dec if subtracted else x) @ W_enc.T + b_enc, 0)
    if k is not None:
        a *= a >= -np.sort(-a, axis=1)[:, k - 1 : k]
    return torch.tensor(a @ W_dec + b_dec).float()


def state(kind):
    W_enc, b_enc, W_dec, b_dec = arrays()
    if kind in ("goodfire", "deepseek_r1"):
        stem = "_linear" if kind == "goodfire" else ""
        found = {f"encoder{stem}.weight": W_enc, f"encoder{stem}.bias": b_enc}
        return found | {f"decoder{stem}.weight": W_dec.T, f"decoder{stem}.bias": b_dec}
    if kind == "qwen_scope":
        return {"W_enc": W_enc, "W_dec": W_dec.T, "b_enc": b_enc, "b_dec": b_dec}
    return {"W_enc": W_enc.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "l1_coeff": torch.tensor(1e-3)}


FILES = {
    "goodfire": "Llama-3.1-8B-Instruct-SAE-l19.pth",
    "deepseek_r1": "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
    "qwen_scope": "layer19.sae.pt",
    "hook_z": "gpt2_5_attn.pt",
}
MODELS = {"hook_z": "gpt2-small"}


def saved(tmp_path, kind, dtype=None, **changes):
    """A file of a kind, with changes to its tensors; ``None`` takes one out."""
    contents = {key: value for key, value in (state(kind) | changes).items() if value is not None}
    torch.save({key: v.to(dtype or v.dtype).contiguous() for key, v in contents.items()}, tmp_path / FILES[kind])
    if kind == "hook_z":
        cfg = {"act_size": D, "dict_size": LATENTS, "act_name": "blocks.5.attn.hook_z", "model_name": "gpt2-small"}
        (tmp_path / "gpt2_5_attn_cfg.json").write_text(json.dumps(cfg))
    return tmp_path


def options(kind, **more):
    return ReadOptions(model=MODELS.get(kind, "meta-llama/Llama-3.1-8B"), k=K if kind == "qwen_scope" else None, **more)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", FILES)
def test_outputs_are_the_convention_s(kind, dtype, tmp_path, assert_same_tensors):
    loaded = read_dictionary(saved(tmp_path, kind, dtype), options=options(kind))
    d, x = loaded.dictionary, 1.5 * torch.randn(17, D) + torch.randn(D)
    weights = (w.to(dtype or w.dtype).float() for w in arrays())
    y = relu_forward(x, *weights, subtracted=kind == "hook_z", k=K if kind == "qwen_scope" else None)
    torch.testing.assert_close(d(x), y, rtol=1e-5, atol=1e-5)
    hook = "transformer.h.5.attn.c_proj:in" if kind == "hook_z" else "model.layers.19:out"
    assert loaded.provenance["hook"] == hook
    assert loaded.warnings == ()
    # A file alone is as good as its folder.
    if kind != "hook_z":
        alone = read_dictionary(tmp_path / FILES[kind], options=options(kind))
        assert_same_tensors(alone.dictionary, d)


def test_each_is_told_by_its_keys_and_shapes(tmp_path):
    for kind in FILES:
        folder = tmp_path / kind
        folder.mkdir()
        found = detect(SourceFiles(saved(folder, kind)))
        assert found is not None
        assert found[0].name == kind


def test_the_same_keys_the_other_way_round_are_not_qwen_scope_s(tmp_path):
    W_enc, b_enc, W_dec, b_dec = arrays()
    torch.save({"W_enc": W_enc.T.contiguous(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, tmp_path / "layer3.sae.pt")
    assert detect(SourceFiles(tmp_path)) is None


def test_k_of_qwen_scope_is_never_guessed(tmp_path):
    folder = tmp_path / "Qwen3-8B-W64K"
    folder.mkdir()
    saved(folder, "qwen_scope")
    with pytest.raises(ValueError, match=r"k: expected the number of latents per token, which no file says. Give it: k=NUMBER"):
        read_dictionary(folder)
    named = tmp_path / "SAE-Res-Qwen3-8B-W64K-L0_5"
    folder.rename(named)
    loaded = read_dictionary(named)
    assert loaded.dictionary.arguments()["encoder"] == {"name": "topk", "k": 5}
    assert any("k 5 is from the name" in warning for warning in loaded.warnings)
    assert read_dictionary(named, options=ReadOptions(k=7)).dictionary.arguments()["encoder"]["k"] == 7


def test_square_matrices_are_told_by_the_file_s_name_alone(tmp_path):
    W_enc, b_enc, W_dec, b_dec = arrays(D, D)
    contents = {"W_enc": W_enc, "W_dec": W_dec.T.contiguous(), "b_enc": b_enc, "b_dec": b_dec}
    torch.save(contents, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="expected a dictionary of a known format"):
        read_dictionary(tmp_path, options=ReadOptions(k=3))
    (tmp_path / "weights.pt").rename(tmp_path / "layer3.sae.pt")
    x = torch.randn(9, D)
    d = read_dictionary(tmp_path, options=ReadOptions(k=3)).dictionary
    torch.testing.assert_close(d(x), relu_forward(x, *arrays(D, D), k=3), rtol=1e-5, atol=1e-5)


def test_layers_of_one_folder_are_told_apart(tmp_path):
    for layer in (2, 10):
        torch.save(state("qwen_scope"), tmp_path / f"layer{layer}.sae.pt")
    given = options("qwen_scope")
    assert list(read_dictionary(tmp_path, options=given).dictionaries) == ["model.layers.2:out", "model.layers.10:out"]
    one = read_dictionary(tmp_path, options=options("qwen_scope", hook="model.layers.10:out"))
    assert one.provenance["source"]["config"] == {"file": "layer10.sae.pt"}
    one = read_dictionary(tmp_path, options=options("qwen_scope", hook="layer2.sae.pt"))
    assert one.provenance["hook"] == "model.layers.2:out"


class Remote(SourceFiles):
    """A folder as if on the hub: looking into a file would fetch it."""

    fetched: tuple[str, ...] = ()

    @property
    def remote(self):
        return True

    def values(self, name):
        self.fetched = (*self.fetched, name)
        return super().values(name)


def test_of_a_repository_only_what_is_asked_for_is_fetched(tmp_path):
    for layer in (2, 10):
        torch.save(state("qwen_scope"), tmp_path / f"layer{layer}.sae.pt")
    source = Remote(tmp_path)
    assert detect(source) is not None
    assert source.fetched == ()
    with pytest.raises(ValueError, match=r"hook: expected one of layer2\.sae\.pt, layer10\.sae\.pt, .* Give hook=FILE"):
        read_dictionary(source, options=options("qwen_scope"))
    read_dictionary(source, options=options("qwen_scope", hook="layer10.sae.pt"))
    assert set(source.fetched) == {"layer10.sae.pt"}


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (
            "goodfire",
            {"encoder_linear.weight": torch.zeros(D, LATENTS)},
            r"encoder_linear.weight: expected shape \(24, 8\), got \(8, 24\)",
        ),
        ("goodfire", {"decoder_linear.bias": torch.full((D,), torch.inf)}, "b_out: expected finite numbers, got inf"),
        (
            "deepseek_r1",
            {"decoder.weight": torch.zeros(LATENTS, D)},
            r"decoder.weight: expected shape \(8, 24\), got \(24, 8\)",
        ),
        (
            "deepseek_r1",
            {"decoder.weight": torch.zeros(D, LATENTS)},
            "W_dec: expected nonzero decoder directions, got only zeros",
        ),
        ("qwen_scope", {"W_dec": torch.zeros(LATENTS, D)}, r"W_dec, latents last in these files: expected shape \(8, 24\)"),
        ("qwen_scope", {"b_enc": torch.zeros(LATENTS, dtype=torch.int32)}, "b_enc: expected floating-point numbers"),
        ("hook_z", {"W_enc": torch.zeros(LATENTS, D)}, r"W_enc: expected shape \(8, 24\), got \(24, 8\)"),
        ("hook_z", {"b_dec": None}, "b_dec missing among W_dec, W_enc, b_enc, l1_coeff"),
        ("hook_z", {"b_dec": torch.zeros(9)}, "act_size: expected 9, as in the weights, got 8"),
    ],
)
def test_damaged_files_are_named(kind, changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(saved(tmp_path, kind, **changes), options=options(kind))


@pytest.mark.parametrize("kind", FILES)
def test_damage_to_the_whole_file_is_named(kind, tmp_path):
    saved(tmp_path, kind)
    path = tmp_path / FILES[kind]
    path.write_bytes(path.read_bytes()[:-600])
    for where, chosen in ((path, None), (tmp_path, kind)):
        with pytest.raises(ValueError, match="got a damaged or older one"):
            read_dictionary(where, chosen, options=options(kind))


class Bomb:
    """Pickled, it would create a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", FILES)
def test_no_pickled_object_is_built(kind, tmp_path):
    saved(tmp_path, kind)
    path = tmp_path / FILES[kind]
    torch.save(state(kind) | {"extra": Bomb(tmp_path / "ran")}, path)
    for where, chosen in ((path, None), (tmp_path, kind)):
        with pytest.raises(ValueError, match="pickled Python objects, which are never loaded here"):
            read_dictionary(where, chosen, options=options(kind))
    assert not (tmp_path / "ran").exists()


def test_they_are_read_only(tmp_path):
    d = read_dictionary(saved(tmp_path, "goodfire")).dictionary
    for kind in FILES:
        with pytest.raises(ValueError, match=f"{kind}: read-only format. Use --to saelens"):
            write_dictionary(d, tmp_path / "out", kind)


def test_names_say_layers_and_nothing_else():
    assert issubclass(DeepSeekR1, TorchFiles)
    for name, hook in (
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "blocks.19.hook_resid_post"),
        ("l7.pt", "blocks.7.hook_resid_post"),
        ("model8.pt", None),
        ("small.pt", None),
    ):
        assert block_output(DeepSeekR1.layer, name) == hook
