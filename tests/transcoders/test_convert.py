"""Converting: round trips, whole or not at all, and what is said about it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import sparsary
from sparsary.sae.checkpoint import read_config
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
    with pytest.raises(ValueError, match="sparsify: it has no layer_norm of each token"):
        convert(tmp_path / "a", tmp_path / "b", "sparsify")
    with pytest.raises(ValueError, match=r"gemma_scope: .*read only"):
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
    with pytest.raises(ValueError, match="--dtype: expected float32, which our checkpoints are of, got 'bfloat16'"):
        convert(tmp_path / "a", tmp_path / "d", dtype="bfloat16")
    convert(tmp_path / "a", tmp_path / "c")
    assert sparsary.load(str(tmp_path / "c")).W_dec.dtype == torch.float32
