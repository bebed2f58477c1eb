"""What one pass keeps, against plain loops over dense codes; how latents are related; the way to the logits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from sparsary.eval.features.collect import Collector, Limits, TokenSample, bin_edges
from sparsary.eval.features.logit_lens import Unembedding, unembedding
from sparsary.eval.features.neighbours import as_matrix, nearest_latents, together, token_table
from sparsary.sae import ENCODERS, SAE, SparseCode
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.contexts import ContextBatch
from sparsary.training.text import BEGINNING
from sparsary.transcoders.transcoder import Transcoder

N, LENGTH, CONTEXTS = 13, 19, 23
LIMITS = Limits(top=3, sample=5, before=4, after=2, background=11)


def random_batches(seed=0, n=N, contexts=CONTEXTS):
    """One batch of text in which words repeat, and dense codes of it; every context is two documents."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 29, (contexts, LENGTH)).astype(np.int32)
    documents = (2 * np.arange(contexts)[:, None] + (np.arange(LENGTH) >= 11)).astype(np.int32)
    offsets = np.where(np.arange(LENGTH) >= 11, np.arange(LENGTH) - 11, np.arange(LENGTH)).astype(np.int32)
    offsets = np.broadcast_to(offsets, ids.shape).copy()
    kept = np.broadcast_to(np.arange(LENGTH) >= 2, ids.shape).copy()
    dense = np.where(rng.random((contexts, LENGTH, n)) < 0.1, rng.random((contexts, LENGTH, n)) + 0.1, 0).astype(np.float32)
    dense[~kept] = 0
    return ids, documents, offsets, kept, dense


def batch_of(ids, documents, offsets, kept, dense):
    rows = torch.from_numpy(dense[kept])
    tokens, latents = rows.nonzero(as_tuple=True)
    starts = torch.searchsorted(tokens, torch.arange(rows.shape[0]))
    batch = ContextBatch(ids, documents, offsets, kept, BEGINNING)
    return batch, SparseCode(latents, rows[tokens, latents], starts)


def collected(arrays, sizes=(CONTEXTS,), limits=LIMITS):
    collector, begin = Collector(arrays[-1].shape[-1], limits), 0
    for size in sizes:
        collector.update(*batch_of(*(array[begin : begin + size] for array in arrays)))
        begin += size
    return collector.result()


def test_counts_and_histogram_are_those_of_the_dense_code():
    arrays = random_batches()
    found, dense = collected(arrays), arrays[-1].reshape(-1, N)
    assert (found.tokens, found.documents) == (CONTEXTS * (LENGTH - 2), 2 * CONTEXTS)
    assert (found.firings == (dense > 0).sum(0)).all()
    np.testing.assert_allclose(found.sums, dense.sum(0), rtol=1e-5)
    assert (found.maxima == dense.max(0)).all()
    for latent in range(N):
        values = dense[:, latent][dense[:, latent] > 0]
        assert (found.histogram[latent] == np.histogram(values, bin_edges())[0]).all()


def test_top_contexts_are_the_strongest_places_with_their_words():
    ids, documents, _, _, dense = arrays = random_batches()
    found = collected(arrays)
    for latent in range(N):
        peaks = dense[:, :, latent].max(1)
        for rank, context in enumerate(np.argsort(-peaks)[: LIMITS.top]):
            at = int(dense[context, :, latent].argmax())
            assert found.top.keys[latent, rank] == peaks[context]
            assert found.top.documents[latent, rank] == documents[context, at]
            for place, token, value in zip(
                range(at - 4, at + 3), found.top.tokens[latent, rank], found.top.values[latent, rank], strict=True
            ):
                inside = 0 <= place < LENGTH
                assert token == (ids[context, place] if inside else -1)
                assert value == (dense[context, place, latent] if inside else 0)


@pytest.mark.parametrize("sizes", [(1,) * CONTEXTS, (7, 11, 5)])
def test_batches_cut_otherwise_give_the_same(sizes):
    arrays = random_batches()
    whole, parts = collected(arrays), collected(arrays, sizes)
    for name in ("top", "sample", "token_sample"):
        for one, other in zip(getattr(whole, name), getattr(parts, name), strict=True):
            assert np.array_equal(one, other), name
    assert np.array_equal(whole.background.tokens, parts.background.tokens)
    assert all(np.array_equal(*pair) for pair in zip(whole.background.fires, parts.background.fires, strict=True))


def test_repeated_text_is_shown_once():
    arrays = tuple(np.concatenate([array, array]) for array in random_batches())
    once, twice = collected(random_batches()), collected(arrays, (5, 20, 21))
    assert np.array_equal(once.top.keys, twice.top.keys)
    assert np.array_equal(once.sample.tokens, twice.sample.tokens)
    for examples in (twice.top, twice.sample):
        for latent in range(N):
            assert len({row.tobytes() for row in examples.tokens[latent]}) == examples.tokens.shape[1]


def test_sampled_contexts_are_a_fair_share_of_weak_and_strong():
    arrays = random_batches(contexts=997)
    found = collected(arrays, (997,), replace(LIMITS, sample=200))
    peaks = arrays[-1].max(1)
    for latent in range(N):
        drawn = found.sample.values[latent, :, LIMITS.before]
        # Mean of 200 draws without replacement: within four standard errors.
        error = peaks[:, latent].std() / 200**0.5
        assert abs(drawn.mean() - peaks[peaks[:, latent] > 0, latent].mean()) < 4 * error


def test_the_token_sample_is_bounded_and_whole():
    arrays = random_batches(contexts=211)
    ids, _, _, kept, dense = arrays
    whole = collected(arrays, (211,)).token_sample
    assert np.array_equal(whole.tokens, ids[kept])
    assert np.array_equal(as_matrix(whole, N).toarray(), dense[kept])
    few = collected(arrays, (100, 111), replace(LIMITS, sample_entries=1000)).token_sample
    assert 250 < len(few.latents) <= 1000
    assert len(few.starts) == len(few.tokens) + 1 == len(few.following) + 1
    assert few.starts[-1] == len(few.latents)


def test_neighbours_stay_within_the_document():
    ids, _, _, kept, _ = arrays = random_batches()
    sample = collected(arrays).token_sample
    previous, following, repeated = (np.zeros_like(ids) for _ in range(3))
    previous[kept], following[kept], repeated[kept] = sample.previous, sample.following, sample.repeated
    assert (previous[:, 11] == -1).all()
    assert (following[:, 10] == -1).all()
    assert (following[:, -1] == -1).all()
    assert (previous[:, 12:] == ids[:, 11:-1]).all()
    assert (following[:, 2:10] == ids[:, 3:11]).all()
    for context, place in ((3, 9), (5, 17), (7, 12)):
        begin = 0 if place < 11 else 11
        assert repeated[context, place] == (ids[context, place] in ids[context, begin:place])


def test_background_says_which_latents_fire_in_a_window():
    ids, _, _, _, dense = arrays = random_batches()
    background = collected(arrays).background
    assert len(background.tokens) == LIMITS.background
    for window, fires in zip(background.tokens, background.fires, strict=True):
        there = window >= 0
        words, places = window[there], np.lib.stride_tricks.sliding_window_view(ids, there.sum(), axis=1)
        context, begin = np.argwhere((places == words).all(-1))[0]
        assert set(fires) == set(np.flatnonzero(dense[context, begin : begin + there.sum()].any(0)))


def test_no_token_is_an_error():
    ids, documents, offsets, kept, dense = random_batches()
    with pytest.raises(ValueError, match="expected held-out tokens, got none"):
        collected((ids, documents, offsets, np.zeros_like(kept), dense))


def test_a_silent_dictionary_is_collected():
    ids, documents, offsets, kept, dense = random_batches()
    found = collected((ids, documents, offsets, kept, np.zeros_like(dense)))
    assert found.firings.sum() == 0
    assert (found.top.documents == -1).all()
    assert len(found.background.tokens) == LIMITS.background


def test_firing_together_is_counted_as_on_dense_codes():
    arrays = random_batches(contexts=101)
    dense = arrays[-1][arrays[3]]
    dense[:, 5] = np.where(dense[:, 3] > 0, 2 * dense[:, 3], 0)
    found = together(as_matrix(_sample_of(dense), N), count=3)
    fires = dense > 0
    both = (fires.T.astype(int) @ fires).astype(float)
    alone = fires.sum(0)
    expected = {
        "jaccard": both / (alone[:, None] + alone - both),
        "lift": both * len(dense) / np.outer(alone, alone),
        "correlation": np.corrcoef(dense.T.astype(float)),
    }
    for name, matrix in expected.items():
        matrix = np.where(both >= 5, matrix, 0)
        np.fill_diagonal(matrix, 0)
        values = getattr(found, name).values
        np.testing.assert_allclose(values, np.maximum(-np.sort(-matrix, 1)[:, :3], 0), atol=1e-6)
    assert found.jaccard.latents[5, 0] == 3
    assert found.jaccard.values[5, 0] == 1
    assert found.count_of_jaccard[5, 0] == alone[3]
    assert found.lift_of_jaccard[5, 0] == pytest.approx(len(dense) / alone[3])
    # A pair that met a few times only is no pair.
    assert not ((found.lift.latents >= 0) & (found.lift.values == 0)).any()


def _sample_of(dense, ids=None):
    ids = np.zeros(len(dense), np.int32) if ids is None else ids
    matrix = csr_array(dense)
    zeros = np.zeros(len(dense), np.int64)

    return TokenSample(ids, zeros, zeros, zeros, zeros, zeros, matrix.indptr, matrix.indices, matrix.data)


def test_tokens_of_a_latent_by_their_share_of_activation():
    dense = np.zeros((7, 2), np.float32)
    dense[[0, 1, 2, 3], 0] = 1, 2, 2, 5
    sample = _sample_of(dense, np.array([9, 9, 5, 7, 0, 0, 0], np.int32))
    table = token_table(sample, as_matrix(sample, 2), count=3)
    assert table.tokens.tolist() == [[7, 9, 5], [-1, -1, -1]]
    assert table.shares[0] == pytest.approx([0.5, 0.3, 0.2])


def test_nearest_atoms_by_cosine():
    atoms = torch.randn(N, 7)
    atoms[4] = 3 * atoms[11]
    found = nearest_latents(atoms, 2)
    assert (found.latents[4, 0], found.latents[11, 0]) == (11, 4)
    assert found.values[4, 0] == pytest.approx(1)
    cosines = torch.nn.functional.cosine_similarity(atoms[:, None], atoms[None], dim=-1).fill_diagonal_(-2)
    assert torch.allclose(torch.from_numpy(found.values), cosines.topk(2).values, atol=1e-6)
    assert nearest_latents(atoms[:1]).latents.shape == (1, 0)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_logit_effects_are_the_slopes_of_the_logits(tiny_model, family):
    model = tiny_model(family)
    anatomy = Architecture(model)
    hook = anatomy.blocks[2].sites()["resid_post"][0]
    sae = SAE(12, N, ENCODERS["topk"](k=3)).double()
    sae.out_scale.fill_(1.7)
    lens = unembedding(sae, model, {"hook": hook})
    assert isinstance(lens, Unembedding)
    effects = torch.cat(list(lens.blocks(size=5)))
    assert effects.mean(-1).abs().max() < 1e-6
    ids = torch.arange(6)[None] + 3
    stream = anatomy.trace(ids).last[0, -1]
    for latent in (0, 7):
        step = 1.7 * sae.W_dec[latent].detach()
        centred = anatomy.final_norm.centre(stream)
        # The denominator is left out of effects; orthogonal to the stream, it does not move at first order.
        along = (anatomy.final_norm.centre(step) @ centred) / (centred @ centred)
        ahead, behind = (_last_logits(model, hook, ids, sign * 1e-4 * (step - along * centred)) for sign in (1, -1))
        slope = (ahead - behind) / 2e-4 * anatomy.final_norm.scale(stream)
        expected = effects[latent].double() - _effect_of(anatomy, along * centred)
        torch.testing.assert_close(slope - slope.mean(), expected - expected.mean(), atol=1e-4, rtol=1e-3)


def _effect_of(anatomy, vector):
    return vector @ anatomy.final_norm.fold(anatomy.W_U).T


def _last_logits(model, hook, ids, change):
    with model.replacing(hook, lambda x: x + change):
        return model.logits(ids)[0, -1]


def test_logit_effects_where_there_are_none_say_why(tiny_model):
    model = tiny_model("gpt2")
    block = Architecture(model).blocks[1]
    sites = {site: hooks[0] for site, hooks in block.sites().items()}
    sae = SAE(12, N, ENCODERS["topk"](k=3)).double()
    for site in ("resid_pre", "attn_out", "mlp_out"):
        assert isinstance(unembedding(sae, model, {"hook": sites[site]}), Unembedding)
    heads = unembedding(sae, model, {"hook": sites["attn_heads"]})
    W_O = Architecture(model).layers[1].W_O.reshape(12, 12)
    torch.testing.assert_close(heads.written, (sae.atoms @ W_O).float(), atol=1e-5, rtol=1e-5)
    reason = unembedding(sae, model, {"hook": sites["mlp_in"]})
    assert "not the residual stream" in reason
    transcoder = Transcoder(12, 12, N, ENCODERS["topk"](k=3)).double()
    provenance = {"hooks_in": [block.sites()["mlp"][0]], "hooks_out": [block.sites()["mlp"][1]]}
    assert torch.equal(unembedding(transcoder, model, provenance).written, transcoder.atoms.detach().float())
