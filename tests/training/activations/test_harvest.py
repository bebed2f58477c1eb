"""Harvest and shards: what is stored, how it resumes, and what damage says."""

import itertools
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae.files import sha256, write_tensors
from sparsary.training.activations import shards as shards_module
from sparsary.training.activations import store_writer as writer_module
from sparsary.training.activations.harvest import harvest_activations
from sparsary.training.activations.shards import ActivationStore, RowReader, dequantize, encode, quantize_rows
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.locks import locked
from sparsary.training.recipe import HarvestSection, TextSection
from sparsary.training.text import contexts, is_heldout

HOOK, SECOND = "transformer.h.2:out", "transformer.h.2.mlp:in"
TEXT = TextSection(context_length=32)


def section(directory, **options):
    defaults = {
        "hooks": (HOOK,),
        "tokens": 3000,
        "store": str(directory),
        "shard_tokens": 900,
        "exclude_leading": 2,
        "heldout": 0.2,
    }
    return HarvestSection(**(defaults | options))


@pytest.fixture(scope="module")
def store(embedded_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stores") / "two-hooks"
    return harvest_activations(embedded_model, TEXT, section(directory, hooks=(HOOK, SECOND), gradients=True))


@pytest.fixture
def copy(store, tmp_path):
    """A copy of the store that a test may damage."""
    shutil.copytree(store.directory, tmp_path / "copy")
    return ActivationStore.open(tmp_path / "copy")


def test_rows_are_the_model_s_activations(store, embedded_model):
    ids = [
        RowReader(store, "train", name).gather(np.arange(store.tokens("train"))) for name in ("token", "document", "position")
    ]
    x = RowReader(store, "train", f"x:{HOOK}").gather(np.arange(store.tokens("train")))
    g = RowReader(store, "train", f"grad:{HOOK}").gather(np.arange(store.tokens("train")))
    from sparsary.training.text import contexts

    first = next(contexts(TEXT, embedded_model.tokenizer))
    row = torch.from_numpy(first.token_ids).long().unsqueeze(0)
    documents = torch.from_numpy(first.document_ids).unsqueeze(0)
    values, gradients = embedded_model.activations_and_gradients(row, (HOOK,), documents)
    found = 0
    for i in range(40):
        token, document, position = (int(t[i]) for t in ids)
        if document == first.document_ids[position] and token == first.token_ids[position]:
            torch.testing.assert_close(x[i], values[HOOK][0, position], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(g[i], gradients[HOOK][0, position], rtol=1e-3, atol=1e-5)
            found += 1
    assert found > 10


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-12])
def test_small_gradients_lose_nothing_but_digits(store, embedded_model, tmp_path, monkeypatch, dtype, size):
    """Confident predictions leave gradients that float16 and its scales round to zero."""
    seen = embedded_model.activations_and_gradients

    def scaled(*arguments):
        values, gradients = seen(*arguments)
        return values, {hook: gradient * size for hook, gradient in gradients.items()}

    monkeypatch.setattr(embedded_model, "activations_and_gradients", scaled)
    options = {"tokens": 300, "dtype": dtype, "gradients": True}
    small = harvest_activations(embedded_model, TEXT, section(tmp_path / "s", **options))
    rows = np.arange(200)
    expected, found = (RowReader(s, "train", f"grad:{HOOK}").gather(rows).double() for s in (store, small))
    assert float((found / size - expected).norm() / expected.norm()) < 4e-3


def test_excluded_tokens_are_not_stored(store, embedded_model):
    for split in ("train", "heldout"):
        everything = np.arange(store.tokens(split))
        tokens, positions = (RowReader(store, split, name).gather(everything) for name in ("token", "position"))
        assert positions.min() >= 2
        # With gradients the last position, which predicts nothing, is left out too.
        assert positions.max() == 30
        assert not set(tokens.tolist()) & set(embedded_model.tokenizer.all_special_ids)


def test_special_tokens_are_kept_where_the_recipe_says_so(embedded_model, tmp_path):
    kept = harvest_activations(embedded_model, TEXT, section(tmp_path / "s", exclude_special=False, exclude_leading=0))
    tokens, offsets = (RowReader(kept, "train", name).gather(np.arange(kept.tokens("train"))) for name in ("token", "offset"))
    assert (tokens == embedded_model.tokenizer.bos_token_id).sum() > 50
    assert torch.equal(tokens == embedded_model.tokenizer.bos_token_id, offsets == -1)


def test_the_split_is_by_document(store):
    for split, expected in (("train", False), ("heldout", True)):
        documents = RowReader(store, split, "document").gather(np.arange(store.tokens(split)))
        assert documents.unique().numel() > 5
        assert {is_heldout(int(d), 0.2) for d in documents} == {expected}


def test_the_manifest_says_everything(store):
    manifest = store.manifest
    assert manifest["complete"]
    assert manifest["model"] == {"id": "embedded", "revision": None, "dtype": "float32"}
    assert manifest["exclude"] == {"special": True, "leading": 2}
    assert manifest["text"]["context_length"] == 32
    assert manifest["gradients"]["reduction"].startswith("sum")
    assert len(manifest["tokenizer_sha256"]) == 64
    assert set(manifest["hooks"]) == {HOOK, SECOND}
    assert sum(s["tokens"] for s in manifest["shards"]) >= 3000
    for shard in manifest["shards"]:
        assert sha256(store.directory / shard["name"]) == shard["sha256"]


def test_statistics_are_those_of_the_training_rows(store):
    x = RowReader(store, "train", f"x:{HOOK}").gather(np.arange(store.tokens("train"))).double()
    moments = store.moments(HOOK)
    assert moments.count == x.shape[0]
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.deviation, (x - x.mean(0)).pow(2).sum(0))


@pytest.mark.parametrize(("dtype", "fvu"), [("bfloat16", 1e-4), ("float16", 1e-6), ("int8", 1e-3)])
def test_other_dtypes_cost_what_the_manifest_says(embedded_model, tmp_path, dtype, fvu):
    exact = harvest_activations(embedded_model, TEXT, section(tmp_path / "exact", tokens=1500))
    small = harvest_activations(embedded_model, TEXT, section(tmp_path / "small", tokens=1500, dtype=dtype, block=64))
    rows = np.arange(exact.tokens("train"))
    x, x_small = (RowReader(s, "train", f"x:{HOOK}").gather(rows).double() for s in (exact, small))
    lost = float((x - x_small).pow(2).sum() / (x_small - x_small.mean(0)).pow(2).sum())
    assert 0 < lost < fvu
    assert small.manifest["hooks"][HOOK]["rounding_fvu"] == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("width", [5, 64, 130])
def test_quantized_rows_are_within_half_a_step(width):
    rows = torch.randn(23, width) * torch.logspace(-3, 3, 23).unsqueeze(-1)
    rows[3] = 0.0
    codes, scale = quantize_rows(rows, 32)
    assert codes.dtype == torch.int8
    assert scale.shape == (23, -(-width // 32))
    error = (dequantize(codes, scale, 32) - rows).abs()
    bound = scale.float().repeat_interleave(32, dim=-1)[:, :width] * 0.501
    assert (error <= bound).all()
    assert (error[3] == 0).all()


def test_int8_refuses_what_float16_scales_cannot_hold():
    with pytest.raises(ValueError, match="bfloat16"):
        quantize_rows(torch.full((1, 4), 1e8), 4)


def test_an_interrupted_harvest_ends_as_if_never_stopped(embedded_model, tmp_path, monkeypatch):
    whole = harvest_activations(embedded_model, TEXT, section(tmp_path / "whole"))
    written = 0
    write = writer_module.write_tensors

    def dying(*arguments):
        nonlocal written
        written += 1
        if written == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(writer_module, "write_tensors", dying)
    with pytest.raises(KeyboardInterrupt):
        harvest_activations(embedded_model, TEXT, section(tmp_path / "parts"))
    broken = ActivationStore.open(tmp_path / "parts")
    assert not broken.manifest["complete"]
    assert broken.problems() == []
    monkeypatch.setattr(writer_module, "write_tensors", write)
    parts = harvest_activations(embedded_model, TEXT, section(tmp_path / "parts"))
    assert parts.manifest == whole.manifest


def test_nothing_is_stored_after_a_shard_that_failed(embedded_model, tmp_path, monkeypatch):
    """The model runs ahead of the writer: what it has already computed may not follow a shard that is missing."""
    whole = harvest_activations(embedded_model, TEXT, section(tmp_path / "whole", dtype="int8"))
    written = []

    def failing(path, *arguments):
        written.append(path.name)
        if len(written) == 3:
            time.sleep(1.0)
            raise OSError(f"{path}: could not be written (the disk is gone).")
        return write_tensors(path, *arguments)

    monkeypatch.setattr(writer_module, "write_tensors", failing)
    with pytest.raises(OSError, match=r"train-00001\.safetensors: could not be written \(the disk is gone\)"):
        harvest_activations(embedded_model, TEXT, section(tmp_path / "parts", dtype="int8"))
    assert len(written) == 3
    broken = ActivationStore.open(tmp_path / "parts")
    assert [shard["unit"] for shard in broken.manifest["shards"]] == [0, 0]
    assert broken.problems() == []
    monkeypatch.setattr(writer_module, "write_tensors", write_tensors)
    assert harvest_activations(embedded_model, TEXT, section(tmp_path / "parts", dtype="int8")).manifest == whole.manifest


def test_a_harvest_stopped_while_it_writes_completes_that_shard(embedded_model, tmp_path, monkeypatch):
    whole = harvest_activations(embedded_model, TEXT, section(tmp_path / "whole"))
    stopping = threading.Event()

    def slow(*arguments):
        stopping.wait()
        time.sleep(0.3)
        return write_tensors(*arguments)

    def stop(_shown, tokens):
        # By now another shard's rows are waiting.
        if tokens > 2000:
            stopping.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(writer_module, "write_tensors", slow)
    with monkeypatch.context() as patch:
        patch.setattr("sparsary.training.stages.StageProgress.update", stop)
        with pytest.raises(KeyboardInterrupt):
            harvest_activations(embedded_model, TEXT, section(tmp_path / "parts"))
    broken = ActivationStore.open(tmp_path / "parts")
    assert {shard["unit"] for shard in broken.manifest["shards"]} == {0}
    assert not list((tmp_path / "parts").glob(".*.partial"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sparsary-harvest")]
    monkeypatch.setattr(writer_module, "write_tensors", write_tensors)
    assert harvest_activations(embedded_model, TEXT, section(tmp_path / "parts")).manifest == whole.manifest


def test_shards_hold_the_training_rows_of_several_batches(embedded_model, tmp_path):
    """Memory is used again only after it was written: a shard of many small batches equals one of a few large ones."""
    many = harvest_activations(
        embedded_model, TEXT, section(tmp_path / "many", batch_contexts=2, shard_tokens=1000, exclude_leading=1)
    )
    few = harvest_activations(
        embedded_model, TEXT, section(tmp_path / "few", batch_contexts=64, shard_tokens=1000, exclude_leading=1)
    )
    rows = np.arange(min(many.tokens("train"), few.tokens("train")))
    assert len(rows) > 2000
    for name in ("token", "offset"):
        assert torch.equal(*(RowReader(store, "train", name).gather(rows) for store in (many, few)))
    found, expected = (RowReader(store, "train", f"x:{HOOK}").gather(rows) for store in (many, few))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_rows_are_stored_alike_with_and_without_the_compiler(dtype, monkeypatch):
    rows = torch.randn(53, 70) * torch.logspace(-9, 4, 53).unsqueeze(-1)
    rows[3], rows[5, :9] = 0.0, torch.tensor([1.00390625, 1.01171875, 3.0e38, -3.4e38, 65519.0, 65520.0, -0.0, 1e-40, -1e-7])
    if dtype == "int8":
        rows[5, 2:4] = 8e6
        # Halves of a step, which go to the even code.
        rows[7, :32] = torch.arange(32) * 2.0
        rows[7, 1:31] = (torch.arange(30) - 14.5) * quantize_rows(rows[7:8], 32)[1][0, 0].float()
    fast = encode(rows, dtype, 32)
    mean, deviation = writer_module._moments(rows)
    lost = writer_module._squared_difference(rows, fast[2].clamp(-3e38, 3e38))
    for module in (writer_module, shards_module):
        monkeypatch.setattr(module, "has_numba", lambda: False)
    plain = encode(rows, dtype, 32)
    for ours, theirs in zip(fast, plain, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
    assert fast[0].dtype == getattr(torch, dtype)
    mean_plain, deviation_plain = writer_module._moments(rows)
    np.testing.assert_allclose(mean, mean_plain, rtol=1e-12)
    np.testing.assert_allclose(deviation, deviation_plain, rtol=1e-12)
    assert lost == pytest.approx(writer_module._squared_difference(rows, plain[2].clamp(-3e38, 3e38)), rel=1e-12)


def test_more_tokens_can_be_added_later(embedded_model, tmp_path):
    first = harvest_activations(embedded_model, TEXT, section(tmp_path / "s", tokens=1000))
    before = [shard["sha256"] for shard in first.manifest["shards"]]
    more = harvest_activations(embedded_model, TEXT, section(tmp_path / "s", tokens=3000))
    assert [shard["sha256"] for shard in more.manifest["shards"]][: len(before)] == before
    assert more.tokens("train") + more.tokens("heldout") >= 3000


def test_text_that_ends_early_is_said_and_kept(embedded_model, tmp_path, caplog):
    (tmp_path / "t.txt").write_text("\n\n".join(["The war lasted from the year 1732 to the year 1741."] * 30))
    text = TextSection(source="files", files=(str(tmp_path / "t.txt"),), context_length=16)
    small = harvest_activations(embedded_model, text, section(tmp_path / "s", heldout=0.0))
    assert 0 < small.tokens("train") < 3000
    assert "The text has only" in caplog.text


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ({"context_length": 16}, {}, "text.context_length: 32 in the store, 16 in the recipe"),
        ({"seed": 5}, {}, "text.seed: 1 in the store, 5 in the recipe"),
        ({}, {"hooks": ("transformer.h.1:out",)}, "harvest.hooks: transformer.h.1:out is not in the store"),
        ({}, {"dtype": "int8"}, "dtype: 'float32' in the store, 'int8' in the recipe"),
        ({}, {"exclude_leading": 0}, "exclude.leading: 2 in the store, 0 in the recipe"),
        ({}, {"heldout": 0.1}, "heldout: 0.2 in the store, 0.1 in the recipe"),
        ({}, {"gradients": False}, "gradients: "),
    ],
)
def test_a_store_made_for_something_else_is_refused_and_says_why(copy, embedded_model, text, options, message):
    options = {"hooks": (HOOK, SECOND), "gradients": True} | options
    with pytest.raises(ValueError, match="expected a store of this recipe, got one made with other settings") as caught:
        harvest_activations(embedded_model, TextSection(**({"context_length": 32} | text)), section(copy.directory, **options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"id": "gpt2", "revision": None, "dtype": "float32"}, "model.id: 'gpt2' in the store, 'embedded'"),
        ("model", {"id": "embedded", "revision": None, "dtype": "bfloat16"}, "model.dtype: 'bfloat16' in the store"),
        ("tokenizer_sha256", "0", "tokenizer_sha256: '0' in the store"),
    ],
)
def test_a_store_of_another_model_is_refused(copy, embedded_model, key, value, message):
    copy.manifest[key] = value
    (copy.directory / "manifest.json").write_text(json.dumps(copy.manifest))
    with pytest.raises(ValueError, match=message):
        harvest_activations(embedded_model, TEXT, section(copy.directory, hooks=(HOOK,), gradients=True))


def test_a_store_of_another_width_is_refused(copy, embedded_model):
    held = copy.manifest["hooks"][HOOK]
    held |= {"width": 64, "mean": held["mean"][:64], "deviation": held["deviation"][:64]}
    (copy.directory / "manifest.json").write_text(json.dumps(copy.manifest))
    with pytest.raises(ValueError, match="width: 64 in the store, 128 in the recipe"):
        harvest_activations(embedded_model, TEXT, section(copy.directory, hooks=(HOOK,), gradients=True))


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"), [(damage_truncate, "truncated"), (damage_flip, "damaged"), (lambda p: p.unlink(), "missing")]
)
def test_a_damaged_shard_is_named(copy, damage, message):
    damage(copy.directory / "train-00001.safetensors")
    with pytest.raises(ValueError, match=rf"train-00001\.safetensors: .*{message}"):
        copy.verify()


def test_every_damaged_shard_is_named_at_once(copy):
    for name in ("train-00000.safetensors", "heldout-00001.safetensors"):
        damage_flip(copy.directory / name)
    with pytest.raises(ValueError, match="train-00000") as caught:
        copy.verify()
    assert "heldout-00001" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"format": "x"}', '{"format": "sparsary-store", "format_version": 7}'])
def test_a_damaged_manifest_is_named(copy, text):
    (copy.directory / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        ActivationStore.open(copy.directory)


@pytest.fixture
def spoil(embedded_model, monkeypatch):
    """Makes the model overflow, by a value, wherever it reads a token that is rare in the text."""
    some = itertools.islice(contexts(TEXT, embedded_model.tokenizer), 200)
    sample = np.concatenate([context.token_ids for context in some])
    counts = np.bincount(sample)
    rare = int(np.flatnonzero((counts > 3) & (counts < 12))[0])
    original = embedded_model.activations

    def spoiling(value, token=rare):
        def poisoned(token_ids, hooks):
            seen = original(token_ids, hooks)
            if token_ids.shape[1] > 3:
                seen[HOOK][..., 3].masked_fill_(token_ids == token, value)
            return seen

        monkeypatch.setattr(embedded_model, "activations", poisoned)

    return spoiling


def test_not_finite_activations_stop_a_strict_harvest_and_are_named(embedded_model, tmp_path, spoil):
    spoil(float("nan"))
    strict = section(tmp_path / "s", on_bad_row="error")
    message = r"s: x:transformer\.h\.2:out: not finite \(\{'token': \d+, 'document': \d+.*float32.*on_bad_row: skip"
    with pytest.raises(ValueError, match=message):
        harvest_activations(embedded_model, TEXT, strict)
    # What was corrected goes on.
    assert harvest_activations(embedded_model, TEXT, section(tmp_path / "s")).manifest["skipped"]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float32", float("nan")), ("bfloat16", float("inf")), ("float16", 1e5), ("int8", -1e8), ("float32", -float("inf"))],
)
def test_tokens_that_cannot_be_stored_are_left_out_and_counted(embedded_model, tmp_path, spoil, dtype, value, caplog):
    """The rest is stored as if they had not been there; a harvest that was interrupted stores and counts the same."""
    clean = harvest_activations(embedded_model, TEXT, section(tmp_path / "clean", dtype=dtype, tokens=3200))
    spoil(value)
    store = harvest_activations(embedded_model, TEXT, section(tmp_path / "s", dtype=dtype))
    assert store.tokens("train") + store.tokens("heldout") >= 3000
    left_out = store.manifest["skipped"]["tokens whose activations are not finite"]
    assert left_out > 0
    assert f"not finite: {left_out}" in caplog.text
    places = ("document", "offset")
    for split in ("train", "heldout"):
        n = store.tokens(split)
        rows = {name: RowReader(store, split, name).gather(np.arange(n)) for name in (*places, f"x:{HOOK}")}
        every = {name: RowReader(clean, split, name).gather(np.arange(clean.tokens(split))) for name in rows}
        known = {place: i for i, place in enumerate(zip(*(every[name].tolist() for name in places), strict=True))}
        index = [known[place] for place in zip(*(rows[name].tolist() for name in places), strict=True) if place in known]
        assert len(index) > 0.9 * n
        assert torch.equal(rows[f"x:{HOOK}"][: len(index)], every[f"x:{HOOK}"][index])
    moments = store.moments(HOOK)
    assert torch.isfinite(moments.mean).all()
    assert moments.count == store.tokens("train")
    harvest_activations(embedded_model, TEXT, section(tmp_path / "p", dtype=dtype, tokens=950))
    resumed = harvest_activations(embedded_model, TEXT, section(tmp_path / "p", dtype=dtype))
    assert resumed.manifest["skipped"] == store.manifest["skipped"]
    assert resumed.tokens("train") == store.tokens("train")


def test_more_of_them_than_the_share_stop_the_harvest(embedded_model, tmp_path, spoil):
    spoil(float("nan"), embedded_model.tokenizer.convert_tokens_to_ids("."))
    with pytest.raises(ValueError, match=r"rows are bad, above harvest\.max_bad_share = 0\.001\. The model overflows there"):
        harvest_activations(embedded_model, TEXT, section(tmp_path / "s", max_bad_share=0.001))


def test_bad_rows_of_the_text_are_in_the_manifest_and_keys_for_them_are_no_identity(embedded_model, tmp_path):
    from sparsary.training.embedded import corpus

    lines = [json.dumps({"text": corpus.embedded_document(1, i).text}) for i in range(120)]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines[:3], '{"text": null}', *lines[3:90], "no json", *lines[90:]]))
    text = TextSection(source="files", files=(str(tmp_path / "t.jsonl"),), context_length=32)
    store = harvest_activations(embedded_model, text, section(tmp_path / "s", tokens=900, shard_tokens=300))
    # The second stands behind what was stored.
    assert store.manifest["skipped"] == {"rows with null in place of text": 1}
    lenient = text.model_copy(update={"max_bad_share": 0.5})
    more = harvest_activations(embedded_model, lenient, section(tmp_path / "s", tokens=9000, shard_tokens=300))
    assert sum(more.manifest["skipped"].values()) == 2
    whole = harvest_activations(embedded_model, text, section(tmp_path / "whole", tokens=9000, shard_tokens=300))
    assert more.manifest["skipped"] == whole.manifest["skipped"]


def test_not_finite_activations_in_a_shard_name_shard_and_row(copy):
    path = copy.directory / "train-00001.safetensors"
    tensors = load_file(path)
    tensors[f"x:{HOOK}"][5, 2] = float("inf")
    save_file(tensors, path)
    stream = StoreStream(copy, (HOOK,), batch_tokens=copy.tokens("train"), seed=0)
    with pytest.raises(ValueError, match=r"train-00001\.safetensors: x:transformer\.h\.2:out: row 5 is not finite"):
        next(stream)


def test_a_folder_with_other_things_is_not_harvested_into(embedded_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="expected an empty directory or a store"):
        harvest_activations(embedded_model, TEXT, section(tmp_path))


def test_a_store_that_another_process_fills_is_refused(embedded_model, tmp_path):
    with (
        locked(tmp_path / "s", "harvest.store"),
        pytest.raises(ValueError, match=r"harvest\.store: .* in use by another process"),
    ):
        harvest_activations(embedded_model, TEXT, section(tmp_path / "s"))


def test_a_full_disk_keeps_what_was_complete(embedded_model, tmp_path, files_of_at_most):
    """Small shards fit, a large one does not: the store keeps the small ones, and a later call goes on from there."""
    small = harvest_activations(embedded_model, TEXT, section(tmp_path / "s", tokens=1500))
    held = len(small.manifest["shards"])
    large = section(tmp_path / "s", tokens=6000, shard_tokens=2500)
    with files_of_at_most(600_000), pytest.raises(OSError, match="could not be written"):
        harvest_activations(embedded_model, TEXT, large)
    kept = ActivationStore.open(tmp_path / "s")
    assert len(kept.manifest["shards"]) == held
    assert kept.problems() == []
    assert harvest_activations(embedded_model, TEXT, large).tokens("train") > 4000
    assert not list((tmp_path / "s").glob(".*.partial"))
