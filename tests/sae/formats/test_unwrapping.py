"""Tensors of wrapped modules and nested state dictionaries are those of the module: the same outputs, and it is said."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae.formats import read_dictionary
from sparsary.sae.formats.unwrapping import unwrapped

GOLDEN = Path(__file__).parents[2] / "golden" / "formats"
# One of each way in which names are made up.
CASES = [
    "saelens/topk-none",
    "saelens/gated-none",
    "saelens/matching_pursuit-none",
    "saelens/skip_transcoder-none",
    "saelens/legacy_jumprelu",
    "sparsify/topk",
    "sparsify/groupmax_skip",
    "dictionary_learning/AutoEncoderTopK",
    "dictionary_learning/GatedAutoEncoder",
    "dictionary_learning/BatchTopKSAE-backup",
    "circuit_tracer/set_jumprelu",
    "circuit_tracer/across_jumprelu",
]
# torch.compile, DDP, DeepSpeed, FSDP, modules of modules, and several of them.
FRONTS = ["_orig_mod.", "module.", "_forward_module.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.module."]
CONTAINERS = ["sae.", "autoencoder.", "model.sae.", "state_dict.", "state_dict._forward_module.sae.", "net.module.ae_model."]


def paired(cases, fronts):
    """Every front with the first case, a third of them with each of the others."""
    return [(c, f) for i, c in enumerate(cases) for j, f in enumerate(fronts) if i == 0 or (i + j) % 3 == 0]


def same_outputs(a, b):
    first, second = read_dictionary(a), read_dictionary(b)
    assert first.dictionaries.keys() == second.dictionaries.keys()
    for hook, d in first.dictionaries.items():
        x = torch.randn(13, d.d_in)
        torch.testing.assert_close(second.dictionaries[hook](x), d(x), rtol=1e-5, atol=1e-5)
    return second


def rewritten(case, folder, rename, nest=lambda tensors: tensors):
    """A copy of a golden folder with other names in its files of tensors; torch's may hold other things besides."""
    shutil.copytree(GOLDEN / case, folder)
    for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.pt")]:
        if path.name == "expected.safetensors":
            path.unlink()
        elif path.suffix == ".pt":
            torch.save(nest(inner(torch.load(path, weights_only=True), rename)), path)
        else:
            save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    return folder


def inner(values, rename):
    """The same dictionary with its own tensors renamed; in a backup those of its module."""
    if "ae" in values:
        return values | {"ae": inner(values["ae"], rename)}
    return {rename(name): value for name, value in values.items()}


@pytest.mark.parametrize(("case", "front"), paired(CASES, FRONTS))
def test_wrappers_in_front_change_nothing(case, front, tmp_path):
    found = same_outputs(GOLDEN / case, rewritten(case, tmp_path / Path(case).name, lambda name: front + name))
    assert any("left out of tensors' names" in note for note in found.notes)


@pytest.mark.parametrize(("case", "front"), paired([case for case in CASES if "backup" not in case], CONTAINERS))
def test_containers_change_nothing(case, front, tmp_path):
    found = same_outputs(GOLDEN / case, rewritten(case, tmp_path / Path(case).name, lambda name: front + name))
    assert any("left out of tensors' names" in note for note in found.notes)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("case", ["sparsify/topk", "dictionary_learning/AutoEncoderTopK"])
def test_parts_of_a_module_may_be_wrapped(case, wrapper, tmp_path):
    same_outputs(GOLDEN / case, rewritten(case, tmp_path / Path(case).name, lambda name: name.replace("er.", f"er.{wrapper}.")))


@pytest.mark.parametrize(
    "nest",
    [
        lambda t: {"state_dict": t, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        lambda t: {"model_state_dict": t, "optimizer_state_dict": {"exp_avg": torch.zeros(3)}, "step": torch.tensor(7)},
        lambda t: {"checkpoint": {"model": {f"module.{name}": value for name, value in t.items()}}, "lr_scheduler": {"a": 1}},
        lambda t: {"sae": t, "global_step": 12, "rng_state": torch.zeros(5, dtype=torch.uint8), "k": 5},
    ],
)
@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "JumpReluAutoEncoder-backup", "MatryoshkaBatchTopKSAE"])
def test_nested_state_dictionaries_are_unpacked(kind, nest, tmp_path):
    case = f"dictionary_learning/{kind}"
    values = torch.load(GOLDEN / case / "ae.pt", weights_only=True)
    if "ae" in values:
        # Of a backup its module alone, beside which its factor would be needed.
        values = values["ae"]
        plain = tmp_path / "plain" / Path(case).name
        shutil.copytree(GOLDEN / case, plain)
        torch.save(values, plain / "ae.pt")
    else:
        plain = GOLDEN / case
    folder = tmp_path / "nested" / Path(case).name
    shutil.copytree(GOLDEN / case, folder)
    torch.save(nest(values), folder / "ae.pt")
    same_outputs(plain, folder)


def test_other_tensors_beside_a_container_are_named_not_dropped(tmp_path):
    case = "dictionary_learning/AutoEncoderTopK"
    nest = lambda t: {"state_dict": t, "input_mean": torch.ones(3)}  # noqa: E731
    with pytest.raises(ValueError, match="got also input_mean"):
        read_dictionary(rewritten(case, tmp_path / "x", str, nest))


def test_several_dictionaries_in_one_file_are_an_error(tmp_path):
    case = "dictionary_learning/AutoEncoderTopK"
    nest = lambda t: {"state_dict": t, "ema": t}  # noqa: E731
    with pytest.raises(ValueError, match=r"tensors of one dictionary, got those of 2: ema, state_dict\. Save"):
        read_dictionary(rewritten(case, tmp_path / "x", str, nest))


def test_two_names_that_become_one_are_an_error():
    with pytest.raises(ValueError, match=r"f.pt: expected one tensor for W_dec, got W_dec and _orig_mod.W_dec"):
        unwrapped(["W_dec", "_orig_mod.W_dec"], "f.pt")


def test_plain_names_and_backups_are_left_alone():
    plain = ["W_enc", "W_dec", "b_dec", "jumprelu.log_threshold"]
    assert unwrapped(plain, "f") == ({name: name for name in plain}, [])
    backup = ["ae.encoder.weight", "ae.decoder.weight", "norm_factor", "step"]
    assert unwrapped(backup, "f") == ({name: name for name in backup}, [])
