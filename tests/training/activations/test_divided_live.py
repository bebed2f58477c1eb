"""Live streams of several ranks yield the batches of one process, of which each rank runs the model on a part."""

import itertools
import json

import numpy as np
import pytest
import torch

from sparsary.sae.ranks import Ranks
from sparsary.training.activations.context_stream import ContextStream
from sparsary.training.activations.live import Buffers, LiveStream
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.routes import routes
from sparsary.training.activations.stream import BatchPart
from sparsary.training.bad_rows import NOT_FINITE
from sparsary.training.embedded import corpus
from sparsary.training.objective import Divergence
from sparsary.training.processes import ONE_PROCESS, Mesh
from sparsary.training.recipe import HarvestSection, TextSection
from sparsary.training.text import BEGINNING, contexts

HOOK, READ = "transformer.h.1:out", "transformer.h.2.mlp:in"
TEXT = TextSection(context_length=32)
SECTION = HarvestSection(hooks=(HOOK,), live_buffer_tokens=450, exclude_leading=1, batch_contexts=5, max_bad_share=0.9)
BATCH, STEPS = 92, 9
MESHES = [(2, 1), (1, 2), (2, 2)]


@pytest.fixture
def on_mesh(load_beside):
    """Return a function that calls ``function(mesh)`` on every rank of a mesh."""
    threads = load_beside("thread_ranks")

    def run(size, function):
        return threads.on_mesh(*size, lambda batch, shards: function(Mesh(shards.world, batch, shards)))

    return run


class OverflowingModel(LanguageModel):
    """The embedded model, which overflows on one token."""

    def __init__(self, model, token):
        super().__init__(model.module, model.tokenizer, model.id, model.revision)
        self.token = token
        # Hooks are those of the module, which all ranks of these tests share.
        self._lock = model._lock

    def activations(self, token_ids, hooks):
        found = super().activations(token_ids, hooks)
        return {hook: x.masked_fill((token_ids == self.token)[..., None], float("inf")) for hook, x in found.items()}


@pytest.fixture(scope="module")
def rare(embedded_model):
    """A token that is rare in the text."""
    sample = list(itertools.islice(contexts(TEXT, embedded_model.tokenizer), 60))
    counts = np.bincount(np.concatenate([context.token_ids for context in sample]))
    return int(np.flatnonzero((counts > 1) & (counts < 6))[0])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A short text, which begins again, with a line that cannot be read."""
    file = tmp_path_factory.mktemp("text") / "t.jsonl"
    lines = [json.dumps({"text": corpus.embedded_document(1, i).text}) for i in range(40)]
    file.write_text("\n".join([*lines[:15], '{"text": null}', *lines[15:]]))
    return TextSection(source="files", files=(str(file),), context_length=32)


def stream(model, mesh, text, kind, hooks_out=()):
    source = Buffers(model, text, SECTION, tuple(dict.fromkeys((HOOK, *hooks_out))), ranks=mesh.world)
    part = BatchPart(mesh.batch.rank, mesh.batch.size)
    rows = LiveStream(source, (HOOK,), BATCH, 1, hooks_out, part=part, mesh=mesh)
    return ContextStream(rows) if kind == "contexts" else rows


@pytest.mark.parametrize("size", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["live", "contexts"])
def test_the_parts_of_all_ranks_are_the_batches_of_one_process(on_mesh, embedded_model, rare, text, kind, size):
    """Also with bad rows, with targets, in samples, in moments, and after a resume."""

    def run(mesh):
        model = OverflowingModel(embedded_model, rare)
        own = stream(model, mesh, text, kind, (READ,))
        sample, heldout, moments = own.sample(700), own.heldout(300), own.target_moments()
        batches = [next(own) for _ in range(STEPS)]
        position = json.loads(json.dumps(own.position()))
        own.close()
        later = stream(model, mesh, text, kind, (READ,))
        later.seek(position)
        batches += [next(later) for _ in range(2)]
        later.close()
        return batches, [sample, heldout], moments, position, own.skipped

    batches, samples, moments, position, skipped = run(ONE_PROCESS)
    assert skipped[NOT_FINITE] > 0
    everywhere = on_mesh(size, run)
    shards = size[1]
    for number, batch in enumerate(batches):
        if kind == "contexts":
            contexts_of = [int(found[0][number].origin.kept.any(1).sum()) for found in everywhere]
            assert sum(contexts_of) == len(batch.origin.token_ids)
            assert max(contexts_of) < sum(contexts_of)
        for name in ("x", "target"):
            parts = [getattr(found[0][number], name) for found in everywhere]
            assert {len(part) for part in parts} == {BATCH // size[0]}
            for first in range(0, len(parts), shards):
                assert all(torch.equal(part, parts[first]) for part in parts[first : first + shards])
            torch.testing.assert_close(torch.cat(parts[::shards]), getattr(batch, name), rtol=1e-4, atol=1e-4)
    for _, own_samples, own_moments, own_position, own_skipped in everywhere:
        for own, one in zip(own_samples, samples, strict=True):
            torch.testing.assert_close(own.x, one.x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own.target, one.target, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own_moments.mean, moments.mean, rtol=1e-4, atol=1e-4)
        assert (own_position, own_skipped) == (position, skipped)


@pytest.mark.parametrize("size", MESHES, ids=str)
def test_the_divergence_of_all_ranks_and_its_gradient_are_those_of_one_process(on_mesh, embedded_model, size):
    """Each rank has the reconstructions of its rows; contexts that two parts share are spliced with those of both."""
    noise = torch.randn(3, BATCH, 128, generator=torch.Generator().manual_seed(3))

    def run(mesh):
        own, part = stream(embedded_model, mesh, TEXT, "contexts"), BatchPart(mesh.batch.rank, mesh.batch.size)
        divergence, found = Divergence(embedded_model, HOOK, mesh.shards), []
        for offsets in noise:
            batch = next(own)
            guesses = [(batch.x + scale * offsets[part.places(BATCH)]).requires_grad_() for scale in (0.3, 1.0)]
            kl = torch.stack([divergence(batch, guess) for guess in guesses]).mean()
            (kl / mesh.batch.size).backward()
            mean = mesh.batch.mean(kl.detach())
            found.append((mean, *(torch.cat(mesh.batch.gather(guess.grad)) for guess in guesses)))
        own.close()
        return found

    expected = run(ONE_PROCESS)
    for found in on_mesh(size, run):
        for own, one in zip(found, expected, strict=True):
            for value, wanted in zip(own, one, strict=True):
                assert float(wanted.abs().max()) > 1e-5
                torch.testing.assert_close(value, wanted, rtol=2e-3, atol=1e-6)


def test_each_rank_runs_its_part_of_a_buffer_s_contexts(load_beside, embedded_model):
    def run(ranks):
        rows, cursor = Buffers(embedded_model, TEXT, SECTION, (HOOK,), ranks=ranks).after(BEGINNING)
        return rows.labels["document"], rows.labels["offset"], cursor

    *labels, cursor = run(Ranks())
    found = load_beside("thread_ranks").on_ranks(3, run)
    assert {each[-1] for each in found} == {cursor}
    for number, wanted in enumerate(labels):
        parts = [each[number] for each in found]
        assert torch.equal(torch.cat(parts), wanted)
        assert max(map(len, parts)) < 0.5 * len(wanted)


def test_rows_come_in_the_order_in_which_they_are_wanted(load_beside):
    held, wanted = [3, 0, 4], [np.array([6, 0, 2]), np.array([], dtype=np.int64), np.array([1, 5, 0, 4])]
    whole = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))

    def run(ranks):
        first = sum(held[: ranks.rank])
        own = whole[first : first + held[ranks.rank]].clone().requires_grad_()
        got = routes(ranks, held, wanted)(own)
        (got * (ranks.rank + 1)).sum().backward()
        return got.detach(), own.grad

    found = load_beside("thread_ranks").on_ranks(3, run)
    for (got, _), rows in zip(found, wanted, strict=True):
        assert torch.equal(got, whole[torch.from_numpy(rows)])
    uses = torch.tensor([1.0 + 3, 3, 1, 0, 3, 3, 1])
    assert torch.equal(torch.cat([grad for _, grad in found]), uses[:, None].expand(7, 2))
    alone = routes(Ranks(), [7], [np.array([3, 1])])(whole)
    assert torch.equal(alone, whole[[3, 1]])


def test_a_rank_without_contexts_takes_part(on_mesh, embedded_model):
    """Contexts of 120 tokens: a batch of 92 rows has one or two."""
    text = TextSection(context_length=120)

    def run(mesh):
        own = stream(embedded_model, mesh, text, "contexts")
        batch, guess = next(own), None
        own.close()
        guess = (batch.x * 0.9).requires_grad_()
        kl = Divergence(embedded_model, HOOK, mesh.shards)(batch, guess)
        (kl / mesh.batch.size).backward()
        return mesh.batch.mean(kl.detach()), torch.cat(mesh.batch.gather(guess.grad))

    expected = run(ONE_PROCESS)
    for found in on_mesh((4, 1), run):
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=2e-3, atol=1e-6)
