"""Streams: a true global shuffle, exact resume, and every token once a pass."""

import itertools
import json

import numpy as np
import pytest
import torch

from sparsary.training.activations.context_stream import ContextStream
from sparsary.training.activations.harvest import harvest_activations
from sparsary.training.activations.harvested_rows import HarvestedRows
from sparsary.training.activations.live import Buffers, LiveStream
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.shuffle import permute
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.activations.tensor_stream import TensorStream
from sparsary.training.bad_rows import NOT_FINITE
from sparsary.training.embedded import corpus
from sparsary.training.recipe import HarvestSection, TextSection
from sparsary.training.text import Cursor, contexts, is_heldout

HOOK = "transformer.h.1:out"
READ, WRITTEN = "transformer.h.2.mlp:in", "transformer.h.2.mlp:out"
TEXT = TextSection(context_length=32)
BATCH = 101


@pytest.fixture(scope="module")
def store(embedded_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stores") / "s"
    hooks = (HOOK, READ, WRITTEN)
    section = HarvestSection(hooks=hooks, tokens=20_000, store=str(directory), shard_tokens=3000, exclude_leading=1)
    return harvest_activations(embedded_model, TEXT, section)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 4096, 4097, 100_003])
def test_permute_is_a_bijection(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, 5)), np.arange(n))


def test_permutations_of_other_keys_are_unrelated():
    n = 10_000
    a, b = permute(np.arange(n), n, 1), permute(np.arange(n), n, 2)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.04
    assert (a == b).mean() < 0.01


def test_the_shuffle_reaches_over_the_whole_store(store):
    """Documents of a batch are uniform over the store, and neighbours in the stream are strangers."""
    stream = StoreStream(store, (HOOK,), BATCH, seed=0, labels=True)
    documents = np.concatenate([next(stream).labels["document"].numpy() for _ in range(stream.n // BATCH)])
    stream.release()
    last = documents.max() + 1
    # Chi-square of 10 equal ranges of rows within each fifth of the pass: 9 degrees of freedom each.
    order = stream.order(0, stream.n)
    for fifth in np.array_split(order, 5):
        counts = np.bincount(fifth * 10 // stream.n, minlength=10)
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi2 < 27.9, counts  # 99.9 %
    serial = np.corrcoef(documents[:-1], documents[1:])[0, 1]
    position = np.corrcoef(documents, np.arange(len(documents)))[0, 1]
    bound = 4 / np.sqrt(len(documents))
    assert abs(serial) < bound, serial
    assert abs(position) < bound, position
    # What it would be unshuffled, so that the bound above means something.
    in_order = np.sort(documents)
    assert np.corrcoef(in_order[:-1], in_order[1:])[0, 1] > 0.99
    assert last > 100


def test_every_row_comes_once_a_pass_and_passes_differ(store):
    stream = StoreStream(store, (HOOK,), BATCH, seed=3)
    n = stream.n
    first, second = stream.order(0, n), stream.order(n, n)
    assert np.array_equal(np.sort(first), np.arange(n))
    assert np.array_equal(np.sort(second), np.arange(n))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, StoreStream(store, (HOOK,), BATCH, seed=4).order(0, n))


def test_batches_hold_the_rows_of_the_order(store):
    stream = StoreStream(store, (HOOK,), BATCH, seed=3)
    everything = stream.rows["x"].gather(np.arange(stream.n))
    for number, batch in enumerate(itertools.islice(stream, 7)):
        rows = stream.order(number * BATCH, BATCH)
        assert torch.equal(batch.x, everything[rows])
    stream.release()


LIVE = HarvestSection(hooks=(HOOK,), tokens=1, live_buffer_tokens=450, exclude_leading=1, batch_contexts=8)
PAIR = {"hooks_in": (READ, HOOK), "hooks_out": (WRITTEN,)}


def live_stream(model, hooks_in, hooks_out=(), text=TEXT, section=LIVE, batch_tokens=BATCH):
    source = Buffers(model, text, section, tuple(dict.fromkeys((*hooks_in, *hooks_out))))
    return LiveStream(source, hooks_in, batch_tokens, 1, hooks_out)


@pytest.fixture(params=["store", "live", "tensors", "pairs from a store", "pairs live", "pairs of tensors"])
def make(request, store, embedded_model):
    tensors = [torch.randn(n, 6) for n in (5, 300, 1, 77, 250)]
    pairs = [{"x": x, "target": x[:, :2] + 1, "grad": x[:, 4:]} for x in tensors]
    return {
        "store": lambda: StoreStream(store, (HOOK,), BATCH, seed=1),
        "live": lambda: live_stream(embedded_model, (HOOK,)),
        "tensors": lambda: TensorStream(tensors, BATCH),
        "pairs from a store": lambda: StoreStream(store, batch_tokens=BATCH, seed=1, **PAIR),
        "pairs live": lambda: live_stream(embedded_model, **PAIR),
        "pairs of tensors": lambda: TensorStream(pairs, BATCH, targets=True),
    }[request.param]


def assert_same(batch, other):
    for name in ("x", "target", "grad"):
        a, b = getattr(batch, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("stop", [0, 1, 4, 11])
def test_a_resumed_stream_goes_on_exactly(make, stop):
    whole = make()
    expected = [next(whole) for _ in range(15)]
    whole.close()
    part = make()
    for _ in range(stop):
        next(part)
    position = part.position()
    part.close()
    resumed = make()
    resumed.seek(position)
    for batch in expected[stop:]:
        assert_same(next(resumed), batch)
    resumed.close()


def test_sampling_does_not_move_the_stream(make):
    plain, sampled = make(), make()
    sample = sampled.sample(50)
    assert sample.x.shape[0] == 50
    assert torch.isfinite(sample.x).all()
    target = sample.x if sample.target is None else sample.target
    assert sampled.moments().mean.shape == (sample.x.shape[1],)
    assert sampled.target_moments().mean.shape == (target.shape[1],)
    if isinstance(sampled, StoreStream):
        # The embedded corpus has no end.
        assert sampled.sample(50, skip=10**7).x.shape == (0, sample.x.shape[1])
    assert_same(next(plain), next(sampled))
    plain.close()
    sampled.close()


def test_live_batches_are_training_tokens_and_match_the_model(embedded_model):
    section = HarvestSection(hooks=(HOOK,), tokens=1, live_buffer_tokens=450, exclude_leading=1, heldout=0.3)
    stream = live_stream(embedded_model, (HOOK,), section=section)
    documents = torch.cat([next(stream).labels["document"] for _ in range(12)])
    stream.close()
    assert not any(is_heldout(int(d), 0.3) for d in documents)


# What is read, and what is to be predicted from it.


def seen_by(model, batch, hooks):
    """What the hooks see in the contexts that the batch's rows come from, in its order."""
    ids, kept = batch.origin.token_ids, batch.origin.kept
    seen = model.activations(ids, hooks)
    return [seen[hook][kept] for hook in hooks]


def test_hooks_stand_side_by_side_and_target_and_gradient_are_those_of_the_output(embedded_model, tmp_path):
    hooks, directory = (HOOK, READ, WRITTEN), tmp_path / "store"
    section = LIVE.model_copy(update={"hooks": hooks, "tokens": 1000, "store": str(directory), "gradients": True})
    made = harvest_activations(embedded_model, TEXT, section)
    single = {hook: StoreStream(made, (hook,), BATCH, seed=1, gradients=True) for hook in hooks}
    stream = StoreStream(made, (READ, HOOK), BATCH, 1, hooks_out=(WRITTEN, HOOK), gradients=True)
    for _ in range(3):
        batch, alone = next(stream), {hook: next(each) for hook, each in single.items()}
        assert torch.equal(batch.x, torch.cat([alone[READ].x, alone[HOOK].x], 1))
        assert torch.equal(batch.target, torch.cat([alone[WRITTEN].x, alone[HOOK].x], 1))
        assert torch.equal(batch.grad, torch.cat([alone[WRITTEN].grad, alone[HOOK].grad], 1))
    assert torch.equal(stream.sample(7).target, torch.cat([single[WRITTEN].sample(7).x, single[HOOK].sample(7).x], 1))
    moments = stream.target_moments()
    for part, hook in ((slice(0, 128), WRITTEN), (slice(128, 256), HOOK)):
        assert torch.equal(moments.mean[part], made.moments(hook).mean)
        assert torch.equal(moments.deviation[part], made.moments(hook).deviation)
    assert moments.count == made.moments(HOOK).count
    for each in (stream, *single.values()):
        each.release()


def test_live_rows_of_all_hooks_are_of_the_same_tokens(embedded_model):
    section = LIVE.model_copy(update={"gradients": True})
    stream = live_stream(embedded_model, (READ, HOOK), (WRITTEN,), section=section)
    batch = next(stream)
    stream.close()
    one = {hook: live_stream(embedded_model, (hook,), section=section) for hook in (READ, HOOK, WRITTEN)}
    alone = {hook: next(each) for hook, each in one.items()}
    for each in one.values():
        # Before the model is used here: a stream's thread may be running it for the next buffer.
        each.close()
    assert torch.equal(batch.x, torch.cat([alone[READ].x, alone[HOOK].x], 1))
    assert torch.equal(batch.target, alone[WRITTEN].x)
    torch.testing.assert_close(batch.grad, alone[WRITTEN].grad)
    mlp = embedded_model.module.get_submodule("transformer.h.2.mlp")
    torch.testing.assert_close(mlp(batch.x[:, :128]), batch.target)


def test_contexts_come_with_what_is_read_and_what_is_written(embedded_model):
    stream = ContextStream(live_stream(embedded_model, (READ,), (WRITTEN,)))
    batch = next(stream)
    stream.close()
    read, written = seen_by(embedded_model, batch, (READ, WRITTEN))
    assert torch.equal(batch.x, read)
    assert torch.equal(batch.target, written)


def test_a_hook_that_the_store_lacks_is_named(store):
    with pytest.raises(
        ValueError, match=r"^dictionary\.hook: h:out is not in .*, which holds transformer\.h\.1:out, .*harvest RECIPE$"
    ):
        StoreStream(store, ("h:out",), BATCH, seed=0)
    with pytest.raises(ValueError, match=r"^dictionary\.hook_out: h:out is not in "):
        StoreStream(store, (HOOK,), BATCH, seed=0, hooks_out=("h:out",))


def test_a_number_that_is_not_finite_is_named_with_its_hook(embedded_model, tmp_path):
    section = LIVE.model_copy(update={"hooks": (READ, HOOK), "tokens": 1000, "store": str(tmp_path / "store")})
    made = harvest_activations(embedded_model, TEXT, section)
    stream = StoreStream(made, (READ, HOOK), BATCH, seed=0)
    shard = stream.rows["x"].parts[1].shards[0]
    with shard.path.open("r+b") as handle:
        handle.seek(shard.start + 5 * shard.row_bytes)
        handle.write(np.float32("nan").tobytes())
    with pytest.raises(ValueError, match=rf"train-00000\.safetensors: x:{HOOK}: row 5 is not finite"):
        list(itertools.islice(stream, 12))
    stream.release()


def test_live_text_starts_over(embedded_model, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(["The war lasted from the year 1732 to the year 1741."] * 12))
    text = TextSection(source="files", files=(str(tmp_path / "t.txt"),), context_length=16)
    section = HarvestSection(hooks=(HOOK,), tokens=1, live_buffer_tokens=200, exclude_leading=1, heldout=0.0)
    stream = live_stream(embedded_model, (HOOK,), text=text, section=section, batch_tokens=50)
    assert sum(next(stream).x.shape[0] for _ in range(20)) == 1000
    stream.close()


def test_a_batch_larger_than_the_store_or_the_buffer_is_refused(store, embedded_model):
    with pytest.raises(ValueError, match=r"batch_tokens: expected at most the \d+ train tokens of .*, got 50000"):
        StoreStream(store, (HOOK,), 50_000, seed=0)
    section = HarvestSection(hooks=(HOOK,), tokens=1, live_buffer_tokens=100)
    with pytest.raises(ValueError, match=r"live_buffer_tokens: expected at least batch_tokens = 101, got 100"):
        live_stream(embedded_model, (HOOK,), section=section)


def test_an_iterator_is_used_once_and_ends():
    rows = torch.arange(40.0).view(20, 2)
    stream = TensorStream(iter(rows.split(7)), 6)
    assert torch.equal(stream.sample(9).x, rows[:9])
    found = torch.cat([batch.x for batch in stream])
    assert torch.equal(found, rows[:18])


def test_a_list_is_passed_over_again():
    rows = torch.arange(40.0).view(20, 2)
    stream = TensorStream([rows], 6)
    found = torch.cat([next(stream).x for _ in range(10)])
    assert torch.equal(found, rows.repeat(3, 1))
    stream.close()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(3)], r"activations: tensor 0: expected \(tokens, d_in\), got \(3,\)"),
        ([torch.ones(9, 2), torch.full((4, 2), float("nan"))], r"activations: tensor 1: row 0 is not finite"),
    ],
)
def test_bad_tensors_are_named(tensors, message):
    stream = TensorStream(tensors, 3, section=HarvestSection(on_bad_row="error"))
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(stream, 5))


ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
WHOLE = [ROWS[:17], ROWS[17:]]


def batched(*tensors, size=17):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=size)


class Frame:
    """What tables of data have: rows by position, numbers as an array."""

    iloc = None

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values

    def __iter__(self):
        return iter("abc")


def big_endian(rows):
    return rows.numpy().astype(">f4")


def read_only(rows):
    values = rows.numpy().copy()
    values.flags.writeable = False
    return values


CONTAINERS = {
    "tensor": lambda: ROWS,
    "array": lambda: ROWS.numpy(),
    "read-only array": lambda: read_only(ROWS),
    "reversed view": lambda: ROWS.flip(0).numpy()[::-1],
    "big-endian array": lambda: big_endian(ROWS),
    "table": lambda: Frame(ROWS.numpy()),
    "list of tensors": lambda: WHOLE,
    "tuple of tensors": lambda: tuple(WHOLE),
    "list of arrays": lambda: [x.numpy() for x in WHOLE],
    "list of float64 arrays": lambda: [x.double().numpy() for x in WHOLE],
    "numbers": lambda: [ROWS.tolist() for _ in range(1)],
    "DataLoader(TensorDataset)": lambda: batched(ROWS),
    "DataLoader(tensor)": lambda: torch.utils.data.DataLoader(ROWS, batch_size=7),
    "generator": lambda: iter(WHOLE),
    "generator of arrays": lambda: (x.numpy() for x in WHOLE),
    "lists of one": lambda: [[x] for x in WHOLE],
    "tuples of one": lambda: [(x,) for x in WHOLE],
    "mappings": lambda: [{"x": x} for x in WHOLE],
    "mappings by another name": lambda: [{"activations": x.numpy()} for x in WHOLE],
    "one mapping": lambda: {"x": ROWS},
    "with gradients attached": lambda: [x.clone().requires_grad_() for x in WHOLE],
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_activations_as_users_have_them(name):
    stream = TensorStream(CONTAINERS[name](), 9)
    torch.testing.assert_close(stream.sample(40).x, ROWS)
    found = torch.cat([batch.x for batch in itertools.islice(stream, 4)])
    stream.close()
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, ROWS[:36])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_activations_of_every_precision(dtype):
    rows = (ROWS * 4).to(dtype)
    stream = TensorStream([rows], 9)
    torch.testing.assert_close(next(stream).x, rows[:9].float())
    stream.close()


@pytest.mark.parametrize("pair", ["tuple", "list", "DataLoader", "mapping"])
@pytest.mark.parametrize("targets", [False, True])
def test_pairs_are_gradients_or_targets_in_whatever_holds_two(pair, targets):
    other = ROWS * 3 if not targets else ROWS[:, :2]
    name = "target" if targets else "grad"
    items = {
        "tuple": [(ROWS, other)],
        "list": [[ROWS.numpy(), other.double().numpy()]],
        "DataLoader": batched(ROWS, other),
        "mapping": [{"x": ROWS, name: other}],
    }[pair]
    stream = TensorStream(items, 40, targets)
    batch = next(stream)
    stream.close()
    torch.testing.assert_close(getattr(batch, name), other)
    three = TensorStream([[ROWS, ROWS[:, :2], ROWS[:, 2:4]]], 40, targets=True)
    assert torch.equal(next(three).grad, ROWS[:, 2:4])
    three.close()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ("activations.pt", r"expected an iterable of tensors or arrays.*got str\. Read files first"),
        (7, r"expected an iterable .*got int"),
        (lambda: iter(WHOLE), r"got function\. Call it: activations=f\(\)"),
        ([None], r"expected a tensor or an array of numbers, got NoneType"),
        (["a", "b"], r"expected a tensor or an array of numbers, got str"),
        ([ROWS.to(torch.complex64)], r"expected a dense tensor of real numbers, got torch\.complex64"),
        ([ROWS.to_sparse()], r"expected a dense tensor of real numbers, got .*sparse"),
        ([ROWS.view(4, 10, 6)], r"expected \(tokens, d_in\), got \(4, 10, 6\)\. Join batch and position"),
        (torch.utils.data.TensorDataset(ROWS), r"expected \(tokens, d_in\), got \(6,\)\. Give tokens in batches: DataLoader"),
        ([(ROWS, torch.arange(40))], r"gradients: tensor 0: expected \(tokens, d_in\) of 40 tokens, got \(40,\)"),
        ([(ROWS,) * 4], r"expected \(tokens, d_in\), got \(4, 40, 6\)"),
        ([{"a": ROWS, "b": ROWS}], r"expected x, and target and grad if needed, got \['a', 'b'\]"),
        ([], r"expected at least one tensor"),
        ([ROWS, ROWS[:, :3]], r"activations: tensor 1: expected width 6, as before, got 3"),
    ],
)
def test_what_cannot_be_activations_is_one_message(tensors, message):
    with pytest.raises(ValueError, match=message):
        TensorStream(tensors, 3).sample(100)


class Spoiled:
    """Tensors with tokens that are not finite, given anew at every pass."""

    def __init__(self, bad=(0, 5, 100, 101, 250, 399)):
        self.rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
        self.good = torch.ones(400, dtype=torch.bool)
        for number, row in enumerate(bad):
            self.rows[row, number % 6] = (float("nan"), float("inf"), -float("inf"))[number % 3]
            self.good[row] = False

    def __iter__(self):
        yield from self.rows.split(23)


def test_tokens_that_are_not_finite_are_left_out_and_counted_once():
    tensors = Spoiled()
    clean = tensors.rows[tensors.good]
    stream = TensorStream(tensors, 31)
    found = torch.cat([batch.x for batch in itertools.islice(stream, 30)])
    assert torch.equal(found, clean.repeat(3, 1)[: len(found)])
    assert stream.skipped == {NOT_FINITE: 6}
    stream.close()
    once = TensorStream(iter(tensors), 31)
    assert torch.equal(torch.cat([batch.x for batch in once]), clean[: len(clean) // 31 * 31])
    assert once.skipped[NOT_FINITE] in (5, 6)
    strict = TensorStream(tensors, 31, section=HarvestSection(on_bad_row="error"))
    with pytest.raises(ValueError, match=r"tensor 0: row 0 is not finite.*harvest\.on_bad_row: skip"):
        next(strict)
    many = TensorStream(Spoiled(range(0, 400, 20)), 31, section=HarvestSection(max_bad_share=0.0001))
    with pytest.raises(ValueError, match=r"row 0 is not finite\. 3 of 46 rows are bad, above harvest\.max_bad_share = 0\.0001"):
        next(many)


class OverflowingModel(LanguageModel):
    """A language model whose activations overflow on one token of the vocabulary."""

    def __init__(self, model, token):
        super().__init__(model.module, model.tokenizer, model.id, model.revision)
        self.token = token

    def activations(self, token_ids, hooks):
        found = super().activations(token_ids, hooks)
        return {hook: x.masked_fill((token_ids == self.token)[..., None], float("inf")) for hook, x in found.items()}


@pytest.fixture
def overflowing(embedded_model):
    """The embedded model, and a token that is rare in its text."""
    sample = list(itertools.islice(contexts(TEXT, embedded_model.tokenizer), 60))
    counts = np.bincount(np.concatenate([context.token_ids for context in sample]))
    rare = int(np.flatnonzero((counts > 1) & (counts < 6))[0])
    return OverflowingModel(embedded_model, rare), rare


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
@pytest.mark.parametrize("kind", ["live", "contexts", "tensors"])
def test_a_stream_with_bad_rows_goes_on_exactly_and_counts_them_once(overflowing, tmp_path, kind, stop):
    """Also bad rows of the text, which ends and begins again."""
    model, _ = overflowing
    lines = [json.dumps({"text": corpus.embedded_document(1, i).text}) for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines[:15], '{"text": null}', *lines[15:30], "no json", *lines[30:]]))
    text = TextSection(source="files", files=(str(tmp_path / "t.jsonl"),), context_length=32)
    section = LIVE.model_copy(update={"max_bad_share": 0.9, "heldout": 0.0})

    def make():
        if kind == "tensors":
            return TensorStream(Spoiled(), 31)
        rows = live_stream(model, (HOOK,), text=text, section=section)
        return ContextStream(rows) if kind == "contexts" else rows

    whole = make()
    expected = [next(whole) for _ in range(14)]
    counts = whole.skipped
    whole.close()
    assert counts[NOT_FINITE] > 0
    if kind != "tensors":
        assert len(counts) == 3
        assert sum(counts.values()) - counts[NOT_FINITE] == 2
    assert all(bool(torch.isfinite(batch.x).all()) and len(batch.x) == len(expected[0].x) for batch in expected)
    part = make()
    for _ in range(stop):
        next(part)
    position = json.loads(json.dumps(part.position()))
    part.close()
    resumed = make()
    resumed.seek(position)
    for batch in expected[stop:]:
        assert_same(next(resumed), batch)
    assert resumed.skipped == counts
    resumed.close()


def test_live_tokens_that_are_not_finite_stop_above_the_share(overflowing):
    model, _ = overflowing
    broken = OverflowingModel(model, model.tokenizer.bos_token_id)
    section = LIVE.model_copy(update={"exclude_leading": 0, "exclude_special": False, "max_bad_share": 0.0001})
    stream = live_stream(broken, (HOOK,), section=section)
    with pytest.raises(ValueError, match=rf"x:{HOOK}: not finite \(\{{'token'.*harvest\.max_bad_share = 0\.0001.*float32"):
        list(itertools.islice(stream, 9))
    stream.close()


def test_an_error_in_the_background_reaches_the_caller():
    def broken():
        yield torch.ones(4, 2)
        raise OSError("the disk is gone")

    stream = TensorStream(broken(), 2)
    next(stream)
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_waiting_is_measured():
    import time

    def slow():
        for _ in range(3):
            time.sleep(0.3)
            yield torch.ones(2, 2)

    stream = TensorStream(slow(), 2)
    assert len(list(stream)) == 3
    assert stream.waited_seconds > 0.1


# Samples and moments of a stream without a store.


class Counting(Buffers):
    """A text of ``tokens`` rows, whose values are their places in it, in buffers of 100; it starts over when it ends."""

    def __init__(self, tokens):
        self.tokens, self.text_tokens, self.made = tokens, 0, 0
        self.section = HarvestSection(live_buffer_tokens=100)

    def after(self, cursor):
        begin = cursor.document
        self.made += 1
        places = torch.arange(begin, begin + 100) % self.tokens
        if begin + 100 >= self.tokens:
            self.text_tokens = self.tokens
        end = (begin + 100) % self.tokens
        return HarvestedRows({"token": places}, {"x:h": places[:, None].float()}), Cursor(end, 0)


def counting(tokens, start_tokens=0):
    return LiveStream(Counting(tokens), ("h",), 10, 0, start_tokens=start_tokens)


def test_no_buffer_is_computed_for_batches_that_no_run_takes(embedded_model):
    first = live_stream(embedded_model, (HOOK,))
    while len(first.buffers) < 3:
        next(first)
    first.close()
    stream, cursors = live_stream(embedded_model, (HOOK,)), []
    after = stream.source.after
    stream.source.after = lambda cursor: cursors.append(cursor) or after(cursor)
    # All of two buffers.
    stream.needed = sorted(first.buffers)[2]
    for _ in range(stream.needed):
        next(stream)
    # The thread that reads ahead ends by itself.
    stream._coming._thread.join()
    assert len(cursors) == 2
    with pytest.raises(StopIteration):
        next(stream)


def test_samples_one_after_the_other_read_an_iterable_once():
    class Counted:
        def __init__(self):
            self.read = 0

        def __iter__(self):
            for number in range(50):
                self.read += 1
                yield torch.full((3, 2), float(number)) + torch.arange(3)[:, None] / 10

    items = Counted()
    stream = TensorStream(items, 4)
    rows = torch.cat([stream.sample(4, start).x for start in range(0, 100, 4)])
    assert torch.equal(rows, torch.cat(list(Counted()))[:100])
    assert items.read == 34
    # Backward, it begins anew; beyond the end there is nothing, and sampling still goes on.
    assert torch.equal(stream.sample(2, 1).x, rows[1:3])
    assert len(stream.sample(4, 148).x) == 2
    assert len(stream.sample(4, 150).x) == len(stream.sample(4, 200).x) == 0
    assert torch.equal(stream.sample(4).x, rows[:4])


def test_a_sample_reads_as_many_buffers_as_it_needs():
    stream = counting(10_000)
    places = stream.sample(250).x[:, 0]
    assert len(places.unique()) == 250
    assert set(places[:200].tolist()) == set(range(200))
    assert set(places[200:].tolist()) < set(range(200, 300))
    # In pieces it is the same.
    pieces = [stream.sample(70, skip).x[:, 0] for skip in (0, 70, 140)] + [stream.sample(40, 210).x[:, 0]]
    assert torch.equal(torch.cat(pieces), places)
    assert places[:100].tolist() != sorted(places[:100].tolist())


@pytest.mark.parametrize("tokens", [30, 100, 230])
def test_a_sample_holds_no_token_of_the_text_twice(tokens):
    stream = counting(tokens)
    places = stream.sample(500).x[:, 0]
    assert sorted(places.tolist()) == list(range(tokens))
    assert len(stream.sample(10, tokens).x) == 0
    assert len(stream.sample(10, tokens - 3).x) == 3


@pytest.mark.parametrize(("tokens", "asked", "expected"), [(10_000, 300, 300), (10_000, 10, 100), (120, 300, 120)])
def test_moments_are_those_of_as_many_tokens_as_asked_for(tokens, asked, expected):
    stream = counting(tokens, asked)
    moments = stream.moments()
    assert moments.count == stream.target_moments().count == expected
    torch.testing.assert_close(moments.mean, torch.arange(expected).double().mean()[None])


def test_moments_make_no_buffer_twice():
    stream = counting(10_000, start_tokens=300)
    stream.moments()
    stream.target_moments()
    assert stream.source.made == 3
