"""Work, messages and memory of one rank of a mesh: hand-computed cases, the code's own messages, and limits."""

from dataclasses import replace

import pytest
import torch

from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.divided import own_part
from sparsary.training.fused_adam import FusedAdam
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.training.phases import Phases
from sparsary.training.recipe import check_recipe
from sparsary.training.scale.memory import device_memory, gradient_bytes, working_bytes
from sparsary.training.scale.mesh import (
    MeshShape,
    data_traffic,
    exchange_bytes,
    forward_work,
    latents_traffic,
    meshes,
    prefers_dense,
    rank_step,
    refusal,
    update_work,
)
from sparsary.training.scale.sizes import Given, run_sizes, split

HOOK = "inputs:out"


def recipe(d_encoder=None, **changes):
    values = {
        "harvest": {"hooks": [HOOK]},
        "dictionary": {"hook": HOOK, "n_latents": 512, "encoder": d_encoder or {"name": "topk", "k": 8}},
        "tokens": 102_400,
        "batch_tokens": 256,
        "out_dir": "nowhere",
    }
    return check_recipe(values | changes, "test")


def sizes(d=64, **changes):
    return run_sizes([recipe(**changes)], Given(d_model=d))


def wide(n_latents, tokens=8192):
    section = {"hook": HOOK, "n_latents": n_latents, "encoder": {"name": "topk", "k": 32}}
    return run_sizes([recipe(dictionary=section, batch_tokens=tokens)], Given(d_model=4096))


def test_sizes_of_a_dictionary_by_hand():
    run = sizes()
    (dictionary,) = run.dictionaries
    assert dictionary.parameters == 2 * 512 * 64 + 512 + 64
    assert dictionary.other_numbers == 512 + 64
    assert (dictionary.n_latents, dictionary.blocks[0].active) == (512, 8)


def test_forward_and_update_work_by_hand():
    run = sizes()
    (dictionary,) = run.dictionaries
    work = forward_work(dictionary, 10)
    assert (work.macs, work.scores) == (10 * 512 * 64, 10 * 512)
    # Decoder rows twice, six passes over inputs and outputs.
    assert work.row_numbers == 2 * 10 * 8 * 64 + 6 * 10 * 128
    change = update_work(dictionary, 10, run, dense=False)
    assert change.update_numbers == 6 * dictionary.parameters
    # Rows of two matrices, read for the norm and for the update.
    assert change.entry_numbers == 2 * 10 * 8 * 128
    assert update_work(dictionary, 10, replace(run, clipped=False), dense=False).entry_numbers == 10 * 8 * 128
    # Four ranks share the norm, and each makes the whole update.
    assert update_work(dictionary, 10, run, dense=False, ranks=4).entry_numbers == 10 * 8 * 128 * 5 / 4
    assert update_work(dictionary, 10, run, dense=True).update_numbers == 10 * dictionary.parameters


def test_a_split_dictionary_does_its_share_of_the_work():
    (dictionary,) = sizes().dictionaries
    whole, part = forward_work(dictionary, 16), forward_work(split(dictionary, 4), 16)
    assert (4 * part.macs, 4 * part.scores) == (whole.macs, whole.scores)


@pytest.fixture
def measured_step(load_beside):
    """Returns bytes and messages of every rank's axes, in one step that the real optimizer makes on a mesh of threads."""
    on_mesh = load_beside("thread_ranks").on_mesh

    def counted(ranks):
        calls, own = [], ranks.gather
        ranks.gather = lambda tensor: (calls.append(tensor), own(tensor))[1]
        return calls

    def measure(mesh, settings, d=64):
        torch.manual_seed(0)
        x = torch.randn(settings.batch_tokens, d)
        spec, n = settings.dictionary.encoder, settings.dictionary.n_latents

        def run(ranks, shards):
            calls = counted(ranks), counted(shards)
            sae = own_part(SAE(d, n, build_encoder(spec)), shards)
            sae.ranks, sae.encoder.n_shards = ranks, shards.size
            optimizer = FusedAdam(sae, Phases(sae, settings), settings)
            assert isinstance(optimizer, FusedAdam)
            objective = Objective(sae.train(), 7.0, AuxSettings(1 / 32, 5))
            usage = LatentUsage(torch.zeros(sae.n_latents, dtype=torch.bool), torch.zeros(sae.n_latents).double())
            loss, _ = objective(ActivationBatch(x.chunk(ranks.size)[ranks.rank]), usage)
            loss.backward()
            optimizer.step()
            return [(axis.sent_bytes, len(found)) for axis, found in zip((ranks, shards), calls, strict=True)]

        return on_mesh(mesh.data, mesh.latents, run)[0]

    return measure


@pytest.mark.parametrize("mesh", [MeshShape(2), MeshShape(4), MeshShape(1, 2), MeshShape(2, 2)], ids=str)
def test_messages_are_those_that_a_step_sends(measured_step, mesh):
    settings = recipe()
    step = rank_step(replace(sizes(), live=False), mesh)
    for traffic, (sent, messages), ranks in zip(
        (step.data, step.latents), measured_step(mesh, settings), (mesh.data, mesh.latents), strict=True
    ):
        if ranks == 1:
            assert (traffic.bytes_, traffic.rounds) == (0, 0)
            continue
        # Shards of random weights do not get exactly equal numbers of entries.
        assert traffic.bytes_ == pytest.approx(sent, rel=0.1 if mesh.latents > 1 else 0.02)
        assert abs(traffic.rounds / (ranks - 1) - messages) <= 2


def test_exchange_bytes_by_hand_and_the_break_even():
    (dictionary,) = wide(65_536).dictionaries
    sparse, dense = exchange_bytes(dictionary, 2048, 2)
    entries = 2048 * 32
    assert sparse == 4 * (entries + 2048) + 2 * 4 * (entries + 2048 * 4096)
    assert dense == 2 * 4 * 65_536 * 4096
    assert not prefers_dense(dictionary, 2048, 2, wide(65_536))
    few = wide(2048)
    assert prefers_dense(few.dictionaries[0], 4096, 2, few)
    assert not prefers_dense(few.dictionaries[0], 4096, 1, few)


def test_without_sparse_gradients_ranks_exchange_dense_ones():
    run = sizes(accumulate=2)
    (dictionary,) = run.dictionaries
    assert prefers_dense(dictionary, 128, 2, run)
    assert data_traffic(dictionary, 128, 2, run).bytes_ > 4 * 512 * 128
    assert gradient_bytes(dictionary, 128, 2, run) == 4 * dictionary.parameters


def test_large_sums_take_an_all_reduce_whose_traffic_does_not_grow():
    (dictionary,) = wide(65_536).dictionaries
    two, many = latents_traffic(dictionary, 8192, 2), latents_traffic(dictionary, 8192, 64)
    candidates = 4 * 8192 * 32
    outputs = 4 * 8192 * 4096
    assert two.bytes_ == candidates + outputs + 4 * 4096
    assert many.bytes_ - 63 * candidates == pytest.approx(2 * outputs, rel=0.05)


def test_batch_wide_selection_costs_messages():
    batch_wide, per_token = sizes(d_encoder={"name": "batch_topk", "k": 8}), sizes()
    more = [data_traffic(run.dictionaries[0], 128, 2, run) for run in (batch_wide, per_token)]
    assert more[0].rounds > more[1].rounds
    assert more[0].bytes_ > more[1].bytes_


def test_meshes_are_all_divisions_of_the_devices():
    assert [(mesh.data, mesh.latents) for mesh in meshes(12)] == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        ({"batch_tokens": 250}, MeshShape(4), "batch_tokens 250 is not a multiple of 4 ranks"),
        ({"accumulate": 4}, MeshShape(128), "in 4 micro-batches"),
        ({}, MeshShape(1, 3), "n_latents 512 is not a multiple of 3 ranks"),
        ({"d_encoder": {"name": "matching_pursuit", "k": 4}}, MeshShape(1, 2), "every latent it chooses"),
        ({"d_encoder": {"name": "feature_choice", "k": 4}}, MeshShape(2, 2), "its budgets follow"),
    ],
)
def test_a_mesh_that_cannot_divide_the_run_says_why(changes, mesh, words):
    assert words in refusal(sizes(**changes), mesh)
    assert refusal(sizes(), MeshShape(4, 2)) == ""


def test_ranks_divide_the_latents_of_every_layer_of_a_cross_layer_transcoder():
    section = {"kind": "cross_layer_transcoder", "site": "mlp", "layers": "all", "n_latents": 64}
    run = run_sizes([recipe(dictionary=section | {"encoder": {"name": "topk", "k": 4}})], Given(d_model=16, layers=5))
    (dictionary,) = run.dictionaries
    # A decoder for each pair of a layer and itself or a later one.
    assert sum(block.d_out for block in dictionary.blocks) == 16 * 15
    assert sum(block.matrix_numbers for block in dictionary.blocks) == 64 * 16 * (5 + 15)
    assert refusal(run, MeshShape(4)) == ""
    assert refusal(run, MeshShape(2, 2)) == ""
    assert [block.n_latents for block in split(dictionary, 4).blocks] == [16] * 5
    assert "n_latents 64 is not a multiple of 3" in refusal(run, MeshShape(1, 3))


def test_ranks_of_a_streamed_model_send_each_other_rows():
    given = Given(d_model=64, parameters=1000, layers=4)
    live = run_sizes([recipe()], given)
    stored = run_sizes([recipe(harvest={"hooks": [HOOK], "store": "there", "tokens": 1000})], given)
    for mesh, own in ((MeshShape(4), 64), (MeshShape(2, 2), 128), (MeshShape(1), 0)):
        more = rank_step(live, mesh).data.bytes_ - rank_step(stored, mesh).data.bytes_
        # Three of four ranks hold rows of this rank's part.
        assert more == own * 64 * 4 * 3 // 4


def test_memory_by_hand():
    run = sizes()
    memory = device_memory(run, MeshShape(2), on_cpu=False)
    parameters = run.parameters
    assert memory.weights == 12 * parameters
    # Positions (two of 8 bytes) and values (4 for each matrix) of 256 x 8 entries, rows of 256 tokens.
    assert memory.gradients == 256 * 8 * 24 + 256 * 128 * 4
    assert memory.working == 4 * (128 * 512 + 4 * 128 * 128)
    assert memory.queued == 12 * 128 * (4 * 64 + 16)
    assert memory.snapshot == 12 * parameters
    assert (memory.device, memory.model) == (memory.weights + memory.gradients + memory.working, 0)
    half = working_bytes(run.dictionaries[0], 128, on_cpu=False, half=True)
    assert half - memory.working == 2 * 512 * 64


def test_a_streamed_model_is_whole_on_every_rank_and_a_stored_one_on_none():
    given = Given(d_model=64, parameters=1000, layers=4)
    streamed = run_sizes([recipe()], given)
    stored = run_sizes([recipe(harvest={"hooks": [HOOK], "store": "there", "tokens": 1000})], given)
    assert device_memory(streamed, MeshShape(8), on_cpu=False).model == 4000
    assert device_memory(stored, MeshShape(8), on_cpu=False).model == 0


@pytest.mark.parametrize("n_latents", [2048, 131_072, 1 << 24])
def test_more_ranks_never_need_more_memory_on_each(n_latents):
    run, counts = wide(n_latents), (1, 2, 4, 8, 64)
    for on_cpu in (False, True):
        found = {(d, s): device_memory(run, MeshShape(d, s), on_cpu) for d in counts for s in counts}
        for (d, s), memory in found.items():
            larger = [found[pair].all for pair in found if pair[0] >= d and pair[1] >= s]
            assert max(larger) <= memory.all
    alone, divided = device_memory(run, MeshShape(1), False), device_memory(run, MeshShape(1, 64), False)
    assert divided.weights < alone.weights / 60
