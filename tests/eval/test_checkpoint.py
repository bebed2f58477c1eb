"""Every evaluation takes every format's dictionaries, and says of them what it says of our checkpoint of the same."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import sparsary
from sparsary import CheckpointOptions
from sparsary.eval.checkpoint import EVERY_DOCUMENT, complete, open_checkpoint, sanity_of
from sparsary.eval.circuits.compared_units import open_dictionaries
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.eval.circuits.units.random_latents import random_like
from sparsary.eval.features.run import features
from sparsary.eval.report.evaluate import evaluate, evaluate_all, evaluate_loaded
from sparsary.sae.formats import FORMATS, write_dictionary
from sparsary.transcoders.convert import convert

# What says where a report comes from, not what was measured.
ABOUT = ("checkpoint", "report_path", "training_tokens", "git_commit", "weights_sha256")
TOKENS = 600
STORIES = {"text.context_length": 256, "text.packing": "separate", "harvest.exclude_leading": 0}
SETTINGS = {"text.context_length": 64, "harvest.exclude_leading": 4}
pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def both(build_format, tmp_path_factory):
    """A format's files with what they leave open, and our checkpoint of the same."""
    made = {}

    def build(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            left_open = build_format(name, folder / "theirs")
            given = CheckpointOptions(model="embedded", settings=SETTINGS, **left_open)
            convert(folder / "theirs", folder / "ours", options=given)
            made[name] = folder / "theirs", folder / "ours", given
        return made[name]

    return build


@pytest.mark.parametrize("name", FORMATS)
def test_figures_are_those_of_our_own_checkpoint(name, both, tmp_path):
    theirs, ours, given = both(name)
    report = evaluate(str(theirs), str(tmp_path / "theirs"), tokens=TOKENS, options=given)
    again = evaluate(
        str(ours), str(tmp_path / "ours"), tokens=TOKENS, options=CheckpointOptions(model="embedded", settings=SETTINGS)
    )
    assert report.keys() == again.keys()
    for key in report.keys() - {*ABOUT}:
        # Matrices that lie transposed in a file are summed in another order.
        value = again[key]
        close = isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float))
        assert report[key] == (pytest.approx(value, rel=1e-6) if close else value), key
    assert 0 < report["l0_mean"] < 40
    assert report["tokens"] >= TOKENS // 2
    assert report["ce_spliced"] != report["ce_clean"]
    # Their folder stays what it was.
    assert not (theirs / "eval_cache").exists()
    assert not (theirs / "report.json").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_circuits_pass_through_every_format(name, both, embedded_model):
    theirs, ours, given = both(name)
    tokens = torch.randint(5, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 2:5] = tokens[:, 3:6]
    clean = embedded_model.logits(tokens)
    found = []
    for path, said in ((theirs, given), (ours, CheckpointOptions(model="embedded"))):
        dictionaries = open_dictionaries(str(path), said)
        for errors in ("node", "ablated"):
            space = NodeSpace(embedded_model, dictionaries.parts(errors))
            state = _state(space, tokens)
            kept = torch.ones(space.size)
            if errors == "node":
                torch.testing.assert_close(space.run(tokens, kept, _state(space, other)), clean, rtol=0, atol=0)
            found.append((state, space.run(tokens, 1 - kept, _state(space, other))))
    half = len(found) // 2
    for (state, logits), (own, again) in zip(found[:half], found[half:], strict=True):
        # Mapped tensors lie elsewhere in either file, and products round by where operands lie.
        torch.testing.assert_close(state, own)
        torch.testing.assert_close(logits, again)
        assert not torch.equal(logits, clean)
    hook, dictionary = next(iter(dictionaries.by_hook.items()))
    x = embedded_model.activations(tokens, (dictionaries.hooks_in[hook],))[dictionaries.hooks_in[hook]].flatten(0, 1)
    chance = random_like(dictionary, x)
    assert float(chance.encode(x).l0().float().mean()) == pytest.approx(
        float(dictionary.encode(x).l0().float().mean()), rel=0.35
    )


def _state(space, tokens):
    return space.state(space.model.activations(tokens, space.hooks))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, embedded_model):
    """A dictionary of a hook's principal directions, in SAELens's format: right, and without a scale."""
    from sparsary.sae import SAE
    from sparsary.sae.encoders import build_encoder

    hook = "transformer.h.1:out"
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 300, (40, 32), generator=generator)
    x = embedded_model.activations(tokens, (hook,))[hook][:, 4:].flatten(0, 1)
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    atoms = torch.cat([directions[:24], -directions[:24]])
    found = SAE(128, len(atoms), build_encoder({"name": "topk", "k": 12})).eval()
    with torch.no_grad():
        for parameter, value in (
            (found.W_enc, atoms),
            (found.W_dec, atoms),
            (found.b_dec, mean),
            (found.b_enc, 0 * found.b_enc),
        ):
            parameter.copy_(value)
    folder = tmp_path_factory.mktemp("trained")
    write_dictionary(found, folder / "right", "saelens", {"model": {"id": "embedded"}, "hook": hook})
    # As if outputs were in units of a thirtieth, and nobody had said so.
    with torch.no_grad():
        found.W_dec.div_(30)
        found.b_dec.div_(30)
    write_dictionary(found, folder / "unfolded", "saelens", {"model": {"id": "embedded"}, "hook": hook})
    return folder


def test_what_belongs_together_passes_and_a_wrong_hook_or_scale_is_loud(trained, capsys):
    right = sanity_of(open_checkpoint(str(trained / "right"), CheckpointOptions(settings=SETTINGS)), 500)["transformer.h.1:out"]
    assert (right.warnings, right.l0) == ((), 12)
    assert right.fvu < 0.6
    sparsary.command_line()(["info", str(trained / "right"), "--model", "embedded", "--tokens", "300"], standalone_mode=False)
    assert "fvu" in capsys.readouterr().out
    cfg = json.loads((trained / "right" / "cfg.json").read_text())
    cfg["metadata"] |= {"hook_name": "blocks.3.attn.hook_z", "hf_hook_name": "transformer.h.3.attn.c_proj:in"}
    wrong = trained / "wrong"
    shutil.copytree(trained / "right", wrong)
    (wrong / "cfg.json").write_text(json.dumps(cfg))
    for name in ("wrong", "unfolded"):
        with pytest.raises(ValueError, match=r"wrong hook or normalisation: .*fvu"):
            sparsary.command_line()(
                ["info", str(trained / name), "--model", "embedded", "--tokens", "300"], standalone_mode=False
            )
        out = capsys.readouterr().out
        assert "wrong?" in out


def test_a_report_lists_what_was_taken_for_granted_and_doubts(trained, tmp_path):
    found = evaluate(str(trained / "right"), str(tmp_path / "a"), tokens=TOKENS)
    assert found["assumed"][0] == "text: the embedded corpus"
    assert "leading positions left out: 8" in found["assumed"]
    assert found["doubts"] == []
    assert json.loads((tmp_path / "a" / "report.json").read_text())["assumed"] == found["assumed"]


@pytest.mark.parametrize(
    ("about", "given", "says"),
    [
        ({}, CheckpointOptions(), r"trained on tensors, or .*--model ID"),
        (
            {"model": {"id": "m"}},
            CheckpointOptions(),
            r"hook: expected a module path with a side.*got None.*--hook transformer.h.2:out",
        ),
        ({"model": {"id": "m"}}, CheckpointOptions(hook="nowhere"), r"hook: expected a module path with a side.*got 'nowhere'"),
        ({"model": {"id": "m"}, "hook": "a.b:out"}, CheckpointOptions(), r"text: expected text to evaluate on.*--text FILE"),
        (
            {"model": {"id": "m"}, "hook": "a.b:out"},
            CheckpointOptions(settings={"recipe.lr": 1}),
            r"--set recipe.lr: expected a key of model, ",
        ),
        (
            {"model": {"id": "embedded"}, "hook": "a.b:out"},
            CheckpointOptions(settings={"text.context_lenth": 3}),
            r"text.context_lenth: unknown key.*Did you mean 'context_length'",
        ),
        (
            {"model": {"id": "embedded"}, "hook": "a.b:out"},
            CheckpointOptions(settings={"harvest.exclude_leading": "no"}),
            r"harvest.exclude_leading: expected a valid integer, got 'no'",
        ),
    ],
)
def test_what_nobody_said_is_asked_for(about, given, says):
    with pytest.raises(ValueError, match=says):
        complete(about, given, "here")


def test_what_is_said_counts_and_the_rest_is_a_recipe_s():
    about = {"model": {"id": "m", "revision": "r"}, "text": {"context_length": 33}, "hook": "a.b:out"}
    said = CheckpointOptions(model="n", text=("x.txt",), settings={"harvest.exclude_leading": 0})
    found, assumed = complete(about, said, "here")
    assert found["model"] == {"id": "n", "revision": None, "trust_remote_code": False}
    assert found["text"] == {"context_length": 33, "source": "files", "files": ["x.txt"], "bos": "context"}
    assert found["harvest"]["heldout"] == EVERY_DOCUMENT
    assert assumed == ["BOS: context", "special tokens left out: True", "documents: all"]
    assert about["model"] == {"id": "m", "revision": "r"}


def test_ours_say_everything_themselves(trained, tmp_path):
    convert(trained / "right", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"k: expected none, because .* records it, got 3"):
        evaluate_all([str(tmp_path / "ours")], options=CheckpointOptions(k=3))


def test_a_folder_that_cannot_be_written_to_is_known_before_the_model_runs(trained, monkeypatch):
    monkeypatch.setattr("sparsary.eval.report.candidate.os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"--out: required, because .*right cannot be written to"):
        evaluate(str(trained / "right"))
    file = replace(open_checkpoint(str(trained / "right")), directory=trained / "right" / "cfg.json")
    with pytest.raises(ValueError, match=r"--out: required, because .* is not a local directory"):
        evaluate_loaded([file])


def test_the_shared_dictionary_is_one_in_all_three_formats(shared_data, tmp_path):
    text = (str(shared_data / "text" / "tinystories_valid.jsonl"),)
    given = CheckpointOptions(model=str(shared_data / "models" / "stories3M"), text=text, hook="model.layers.3:out")
    found = []
    for name in ("saelens", "sparsify", "dictionary_learning"):
        path = shared_data / "saes" / f"stories3M_L3_topk16_{name}"
        found.append(evaluate(str(path), str(tmp_path / name), tokens=1500, options=replace(given, settings=STORIES)))
    assert 0.1 < found[0]["fvu"] < 0.22
    for report in found[1:]:
        for key in ("fvu", "l0_mean", "ce_clean", "ce_spliced", "dead_fraction"):
            assert report[key] == pytest.approx(found[0][key], rel=1e-5)
    # The wrong layer is not mistaken for it: only where no file names the hook can it be asked for.
    path = shared_data / "saes" / "stories3M_L3_topk16_sparsify"
    wrong = evaluate(str(path), str(tmp_path / "wrong"), tokens=1500, options=replace(given, hook="model.layers.1:out"))
    assert [doubt for doubt in wrong["doubts"] if "Wrong hook" in doubt]


def test_latents_are_described(trained, tmp_path):
    about = features(str(trained / "right"), str(tmp_path), 2000)
    assert (about["n_latents"], about["model"], about["text"]) == (48, "embedded", "embedded")
    assert about["dead"] < 24


def test_a_cross_layer_transcoder_and_a_set_are_judged_in_place(build_format, tmp_path):
    from sparsary.sae.encoders import build_encoder
    from sparsary.transcoders import CrossLayerTranscoder

    torch.manual_seed(3)
    across = CrossLayerTranscoder(n_layers=4, d_in=512, d_out=512, n_latents=80, encoder=build_encoder({"name": "relu"})).eval()
    reads, writes = ([f"transformer.h.{layer}.mlp:{side}" for layer in range(4)] for side in ("in", "out"))
    about = {"model": {"id": "embedded"}, "hooks_in": reads, "hooks_out": writes}
    across.save(tmp_path / "ours", about)
    convert(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer")
    given = CheckpointOptions(model="embedded", settings=SETTINGS)
    found, again = (
        evaluate(str(tmp_path / n), str(tmp_path / "out" / n), tokens=TOKENS, options=given) for n in ("theirs", "ours")
    )
    assert found["layers"] == 4
    for key in ("ce_clean", "ce_spliced", "l0_total", "layer_fvu"):
        assert found[key] == pytest.approx(again[key], rel=1e-4), key
    build_format("circuit_tracer", tmp_path / "set")
    report = evaluate(str(tmp_path / "set"), str(tmp_path / "out" / "set"), tokens=TOKENS, options=given)
    assert (report["layers"], report["kind"]) == (4, "stack of transcoders")
    assert not (tmp_path / "set" / "report.json").exists()
