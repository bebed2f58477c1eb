"""Converting: round trips, whole or not at all, and what is said about it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import sparsary
from sparsary.sae.checkpoint_files import read_config
from sparsary.sae.formats import FORMATS
from sparsary.transcoders import Stack
from sparsary.transcoders.convert import _whole, convert

WRITABLE = ("saelens", "sparsify", "dictionary_learning")


def contents(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_our_checkpoint(name, build_format, tmp_path, assert_same_tensors):
    left_open = build_format(name, tmp_path / "theirs", 16)
    given = {"model": "gpt2", **left_open} if name != "llama_scope" else left_open
    options = sparsary.CheckpointOptions(**given)
    found = sparsary.convert(str(tmp_path / "theirs"), str(tmp_path / "ours"), options=options)
    assert found.format == "sparsary"
    assert found.difference < 1e-6
    assert contents(tmp_path / "ours") == {"dictionary.json", "dictionary.safetensors"} == {*found.files}
    theirs, ours = sparsary.load(str(tmp_path / "theirs"), options=options), sparsary.load(str(tmp_path / "ours"))
    x = torch.randn(9, 16)
    assert_same_tensors(ours, theirs)
    torch.testing.assert_close(ours(x), theirs(x))
    about = read_config(tmp_path / "ours")["provenance"]
    assert about["hooks_out"]
    assert about["source"]["format"] == name
    assert about["converted"]["evidence"] == found.evidence


@pytest.mark.parametrize("name", WRITABLE)
def test_there_and_back_changes_nothing(name, build_format, tmp_path):
    build_format("saelens", tmp_path / "a", 16)
    convert(tmp_path / "a", tmp_path / "b", name)
    back = convert(tmp_path / "b", tmp_path / "c", "saelens", format=name)
    assert back.difference < 1e-6
    first, last = sparsary.load(str(tmp_path / "a")), sparsary.load(str(tmp_path / "c"))
    x = torch.randn(9, 16)
    torch.testing.assert_close(first(x), last(x), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "c" / "cfg.json").exists()


def test_several_hooks_become_a_folder_of_checkpoints_and_a_set_again(build_format, tmp_path):
    build_format("circuit_tracer", tmp_path / "a", 16)
    found = convert(tmp_path / "a", tmp_path / "b")
    assert len(found.hooks) == 4
    assert found.difference < 1e-6
    stack = sparsary.load(str(tmp_path / "b"))
    assert isinstance(stack, Stack)
    again = convert(tmp_path / "b", tmp_path / "c", "circuit_tracer")
    assert again.difference < 1e-6
    assert contents(tmp_path / "c") == contents(tmp_path / "a")
    each = convert(tmp_path / "b", tmp_path / "d", "saelens")
    assert len([name for name in each.files if name.endswith("cfg.json")]) == 4


def test_what_is_there_is_not_replaced(build_format, tmp_path):
    build_format("saelens", tmp_path / "a", 16)
    (tmp_path / "b").mkdir()
    convert(tmp_path / "a", tmp_path / "b")
    before = contents(tmp_path / "b")
    with pytest.raises(ValueError, match=r"b: expected no such folder, or an empty one, got one that holds files"):
        convert(tmp_path / "a", tmp_path / "b", "sparsify")
    assert contents(tmp_path / "b") == before
    with pytest.raises(ValueError, match=r"cfg.json: expected no such folder"):
        convert(tmp_path / "a", tmp_path / "a" / "cfg.json")


def test_what_cannot_be_held_leaves_nothing(build_format, tmp_path):
    build_format("openai", tmp_path / "a", 16)
    left = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="sparsify: row_norm: expected null, as the library has none, got layer_norm"):
        convert(tmp_path / "a", tmp_path / "b", "sparsify")
    with pytest.raises(ValueError, match=r"gemma_scope: read-only format"):
        convert(tmp_path / "a", tmp_path / "b", "gemma_scope")
    with pytest.raises(ValueError, match=r"--to: .*expected one of sparsary, saelens, .*Did you mean 'sparsify'"):
        convert(tmp_path / "a", tmp_path / "b", "sparsifi")
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_killed_conversion_leaves_nothing(tmp_path):
    def killed():
        with _whole(tmp_path / "b") as temporary:
            (temporary / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_was_done(build_format, tmp_path, capsys):
    build_format("qwen_scope", tmp_path / "a", 16)
    sparsary.command_line()(
        ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--k", "5", "--hook", "transformer.h.1:out", "--to", "saelens"],
        standalone_mode=False,
    )
    out = " ".join(capsys.readouterr().out.split())
    for words in ("read as", "folded or renamed", "written as saelens: cfg.json", "outputs changed by", "done."):
        assert words in out, words
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["k"] == 5
    sparsary.command_line()(["info", str(tmp_path / "b")], standalone_mode=False)
    assert "self-check passed" in " ".join(capsys.readouterr().out.split())


def test_numbers_may_stay_what_they_are(tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "formats" / "saelens" / "jumprelu-bfloat16"
    shutil.copytree(golden, tmp_path / "a", ignore=shutil.ignore_patterns("expected*"))
    convert(tmp_path / "a", tmp_path / "b", "saelens", dtype="auto")
    assert sparsary.load(str(tmp_path / "b"), dtype="auto").W_dec.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="--dtype: expected float32, the dtype of sparsary checkpoints, got 'bfloat16'"):
        convert(tmp_path / "a", tmp_path / "d", dtype="bfloat16")
    convert(tmp_path / "a", tmp_path / "c")
    assert sparsary.load(str(tmp_path / "c")).W_dec.dtype == torch.float32


def stack_of(names, kind="sae", **about):
    """Dictionaries with unit atoms and a scale, by the hooks they write, as a stack that is not saved."""
    from sparsary.sae import ENCODERS, SAE
    from sparsary.transcoders import Transcoder

    members, provenances = {}, {}
    for name in names:
        d = SAE(16, 40, ENCODERS["topk"](k=3)) if kind == "sae" else Transcoder(16, 16, 40, ENCODERS["topk"](k=3))
        d.in_scale.fill_(1.9)
        d.out_scale.fill_(1.9)
        members[name] = d.eval()
        hook = {"hook": name, "hooks_in": [name], "hooks_out": [name]}
        hook = hook if kind == "sae" else {"hooks_in": [name.replace(":out", ":in")], "hooks_out": [name]}
        provenances[name] = {"model": {"id": "meta-llama/Llama-3.1-8B"}, "text": {"context_length": 64}, **hook, **about}
    return Stack(members, provenances)


def test_topk_of_equal_norms_may_be_folded_by_norm_there(tmp_path):
    stack_of(["model.layers.2:out"]).save(tmp_path)
    found = convert(next(tmp_path.iterdir()), tmp_path / "theirs", "saelens")
    # SAELens refuses to fold norms that do not count, and SAEDashboard folds them first of all.
    assert json.loads((tmp_path / "theirs" / "cfg.json").read_text())["rescale_acts_by_decoder_norm"] is True
    assert found.difference is not None
    assert found.difference < 1e-6


def test_a_stack_for_sparsify_lies_where_its_loaders_look(tmp_path):
    names = ["model.layers.0:out", "model.layers.1.mlp:out", "model.layers.2:in"]
    stack_of(names).save(tmp_path / "ours")
    found = convert(tmp_path / "ours", tmp_path / "theirs", "sparsify")
    folders = sorted(path.name for path in (tmp_path / "theirs").iterdir() if path.is_dir())
    # What a block reads is what the one before it gave out.
    assert folders == ["layers.0", "layers.1", "layers.1.mlp"]
    assert all({"cfg.json", "sae.safetensors"} == contents(tmp_path / "theirs" / folder) for folder in folders)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model"] == "meta-llama/Llama-3.1-8B"
    assert len(found.hooks) == 3
    again = sparsary.load(str(tmp_path / "theirs"))
    assert set(again) == {"model.layers.0:out", "model.layers.1:out", "model.layers.1.mlp:out"}


def test_sparsify_refuses_inputs_that_no_module_gives_out_and_two_of_one_module(tmp_path):
    stack_of(["model.layers.0:in", "model.layers.1:out"]).save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"model.layers.0:in: expected the output of a module"):
        convert(tmp_path / "a", tmp_path / "b", "sparsify")
    stack_of(["model.layers.1:out", "model.layers.2:in"]).save(tmp_path / "c")
    with pytest.raises(ValueError, match=r"one dictionary for each module, got two for layers.1"):
        convert(tmp_path / "c", tmp_path / "d", "sparsify")


@pytest.mark.parametrize("to", WRITABLE)
@pytest.mark.parametrize("known", [True, False])
def test_the_model_that_is_named_counts(to, known, tmp_path):
    about = {} if known else {"model": None}
    stack_of(["gpt_neox.layers.2:out"], **about).save(tmp_path)
    options = sparsary.CheckpointOptions(model="EleutherAI/pythia-160m")
    convert(next(tmp_path.iterdir()), tmp_path / "theirs", to, options=options)
    back = convert(tmp_path / "theirs", tmp_path / "again", format=to)
    assert back.hooks == ("gpt_neox.layers.2:out",)
    assert read_config(tmp_path / "again")["provenance"]["model"]["id"] == "EleutherAI/pythia-160m"


def test_a_hook_that_no_file_says_can_be_named(tmp_path):
    stack_of(["h.0:out"])["h.0:out"].save(tmp_path / "h", {})
    options = sparsary.CheckpointOptions(hook="blocks.3.hook_resid_post", model="gpt2")
    convert(tmp_path / "h", tmp_path / "theirs", "saelens", options=options)
    about = json.loads((tmp_path / "theirs" / "cfg.json").read_text())["metadata"]
    assert (about["hook_name"], about["hf_hook_name"]) == ("blocks.3.hook_resid_post", "transformer.h.3:out")


@pytest.mark.parametrize("to", WRITABLE)
@pytest.mark.parametrize("form", ["absolute", "relative", "home", "windows", "cache"])
def test_no_path_of_this_machine_leaves_it(to, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "my-gpt2").mkdir(parents=True)
    forms = {"absolute": str(tmp_path / "models" / "my-gpt2"), "relative": "models/my-gpt2", "home": "~/models/my-gpt2"}
    forms |= {"windows": "C:\\models\\my-gpt2", "cache": "/x/hub/models--me--my-gpt2/snapshots/0f3a"}
    stack_of(["transformer.h.2:out"], model={"id": forms[form]}).save(tmp_path / "ours")
    found = convert(next((tmp_path / "ours").iterdir()), tmp_path / "theirs", to)
    written = "".join(path.read_text() for path in (tmp_path / "theirs").rglob("*.json"))
    assert '"my-gpt2"' in written or '"me/my-gpt2"' in written
    assert not any(part in written for part in (str(tmp_path), "models/my", "models\\", "~", "snapshots"))
    assert any("local folder written by its name alone" in word for word in found.done)


def test_topk_becomes_thresholds_where_a_library_has_no_topk(tmp_path):
    names = ["model.layers.0.mlp:out", "model.layers.1.mlp:out"]
    stack_of(names, "transcoder").save(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"topk: version 0.5.0 reads it as relu.*--calibrate TOKENS"):
        convert(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer")
    found = convert(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer", thresholds=dict.fromkeys(names, 0.7))
    assert any("the 3 largest latents of a token as those above 0.7" in word for word in found.done)
    assert found.difference is not None
    again, x = sparsary.load(str(tmp_path / "theirs")), torch.randn(50, 16)
    assert isinstance(again, Stack)
    for name, d in sparsary.load(str(tmp_path / "ours")).items():
        p = d.normalised(x) @ d.weights.W_enc.T + d.weights.b_enc
        code = again[name].encode(x).to_dense(40)
        torch.testing.assert_close(code > 0, p > 0.7)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_training_that_is_not_over_says_so(stacked, tmp_path, caplog):
    about = {"training_tokens": 4096, "training_steps": 2}
    names = ["model.layers.0:out", "model.layers.1:out"][: 1 + stacked]
    for finished in (False, True):
        folder = tmp_path / str(finished)
        stack_of(names, finished=finished, **about).save(folder)
        place = folder if stacked else next(folder.iterdir())
        caplog.clear()
        sparsary.load(place)
        told = [record.message for record in caplog.records if "in the middle of its training" in record.message]
        assert len(told) == (0 if finished else len(names))
        found = convert(place, tmp_path / f"out-{finished}")
        assert len(found.warnings) == (0 if finished else len(names))
        assert any("doubt" in name for name, _ in found.lines()) != finished
