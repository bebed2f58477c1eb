"""Step time of given and of measured machines, and the choice of a mesh."""

from dataclasses import replace

import pytest

from sparsary.training.recipe import check_recipe
from sparsary.training.scale.machine import Costs, Link, Machine, step_seconds
from sparsary.training.scale.mesh import MeshShape, Traffic, rank_step
from sparsary.training.scale.plan import Device, plan_run
from sparsary.training.scale.prediction import plan_as_json, predict_run, require_fit, table_of
from sparsary.training.scale.probe import LARGE_MESSAGE, SMALL_MESSAGE, Phase, ProbedCosts, measured_machine, probe_task
from sparsary.training.scale.sizes import Given, run_sizes

HOOK = "layers.2:out"
H200 = Device(memory=141e9, bandwidth=4.8e12, flops=989e12, link=450e9, node_link=50e9, latency=10e-6)


def recipe(n_latents=4096, tokens=10**9, **changes):
    values = {
        "harvest": {"hooks": [HOOK], "store": "there", "tokens": 10**6},
        "dictionary": {"hook": HOOK, "n_latents": n_latents, "encoder": {"name": "topk", "k": 16}},
        "tokens": tokens,
        "batch_tokens": 4096,
        "out_dir": "nowhere",
    }
    return check_recipe(values | changes, "test")


def machine(**changes):
    costs = Costs(mac=1e-12, score=1e-11, row_number=1e-10, entry_number=1e-10, update_number=1e-10, step=1e-3)
    found = Machine("made up", 10**12, costs, Link(1e-5, 1e9), Link(2e-5, 1e8), devices_per_node=4)
    return replace(found, **changes)


def test_a_step_takes_the_sum_of_its_parts():
    run = run_sizes([recipe(n_latents=64)], Given(d_model=32))
    step, made_up = rank_step(run, MeshShape(1)), machine()
    costs = made_up.costs
    forward = 4096 * (64 * 32 * costs.mac + 64 * costs.score) + 4096 * (2 * 16 * 32 + 6 * 64) * costs.row_number + 1e-3
    # Two matrices of 64 x 32, b_enc of 64 and b_dec of 32 numbers.
    update = 2 * 4096 * 16 * 64 * costs.entry_number + 6 * (2 * 64 * 32 + 64 + 32) * costs.update_number
    seconds = step_seconds(made_up, MeshShape(1), step)
    assert seconds.forward == pytest.approx(forward)
    assert seconds.update == pytest.approx(update)
    assert seconds.exchange == 0
    crowded = step_seconds(replace(made_up, crowd=2.0), MeshShape(1), step)
    assert crowded.total == pytest.approx(2 * seconds.total)


def test_messages_take_latency_and_bandwidth_of_the_slowest_connection():
    made_up = machine()
    assert made_up.near.seconds(Traffic(3, 10**6)) == pytest.approx(3e-5 + 1e-3)
    assert made_up.link(MeshShape(4), "data") is made_up.near
    assert made_up.link(MeshShape(4, 2), "data") is made_up.far
    assert made_up.link(MeshShape(4, 2), "latents") is made_up.near
    assert made_up.link(MeshShape(1, 8), "latents") is made_up.far


def test_given_figures_predict_the_encoder_product():
    found = plan_run([recipe(n_latents=131_072)], 1, H200, Given(d_model=4096))
    product = 2 * 4096 * 4096 * 131_072 / 989e12
    assert found.best.seconds.forward > product
    # Scores of 16 bits, written and read.
    fast = plan_run([recipe(n_latents=131_072)], 1, replace(H200, bandwidth=1e20), Given(d_model=4096))
    assert fast.best.seconds.total == pytest.approx(product, rel=1e-3)


def test_the_best_mesh_fits_and_is_the_fastest_that_does():
    run = run_sizes([recipe(n_latents=1 << 20)], Given(d_model=4096))
    for memory in (20e9, 60e9, 100e9, 1e12):
        found = predict_run(run, machine(memory_bytes=int(memory)), 8)
        assert found.best.memory.device <= memory
        others = [each for each in found.tried if not each.refused]
        assert found.best.step_seconds == min(each.step_seconds for each in others)
    small = predict_run(run, machine(memory_bytes=int(20e9)), 8)
    assert small.best.mesh.latents == 8
    assert "needs" in small.tried[0].refused
    assert [row[-1] for row in table_of(small)].count("best") == 1


def test_the_fastest_mesh_is_passed_over_if_it_needs_more_than_there_is():
    run = run_sizes([recipe(n_latents=1 << 16)], Given(d_model=1024))
    # Updates cost nothing and messages between nodes little: dividing only the tokens is fastest.
    quick = machine(costs=Costs(1e-12, 1e-9, 1e-12, 0.0, 1e-20, 0.0), near=Link(1e-3, 1e15), far=Link(0.0, 1e15))
    free = predict_run(run, quick, 8).best
    assert free.mesh == MeshShape(8)
    short = predict_run(run, replace(quick, memory_bytes=free.memory.device - 1), 8)
    assert short.best.mesh.latents > 1
    assert short.best.step_seconds > free.step_seconds


def test_if_nothing_fits_the_least_memory_is_told():
    run = run_sizes([recipe(n_latents=1 << 20)], Given(d_model=4096))
    found = predict_run(run, machine(memory_bytes=10**9), 4)
    assert found.best is None
    with pytest.raises(ValueError, match=r"expected enough memory on 4, got 1 GB each, of at least .* GB"):
        require_fit(found)


def test_a_number_of_devices_that_divides_nothing_is_refused():
    run = run_sizes([recipe(n_latents=4096)], Given(d_model=64))
    with pytest.raises(ValueError, match="4096 is not a multiple of 3"):
        require_fit(predict_run(run, machine(), 3))
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        predict_run(run, machine(), 0)


def test_tokens_duration_and_disk():
    given = Given(d_model=64, parameters=10**6, layers=6)
    run = run_sizes([recipe()], given)
    found = predict_run(run, machine(), 1)
    best = found.best
    assert found.tokens_per_day(best) == pytest.approx(86_400 * 4096 / best.step_seconds)
    # Three of six layers run to reach the hook of the third.
    assert found.harvest_seconds == pytest.approx(10**6 * 0.5 * 10**6 * 1e-12)
    assert predict_run(run, machine(), 4).harvest_seconds == pytest.approx(found.harvest_seconds / 4)
    assert found.run_seconds(best) == pytest.approx(found.harvest_seconds + 244_141 * best.step_seconds)
    assert found.store_bytes == 10**6 * (4 * 64 + 16)
    assert found.checkpoint_bytes == 28 * run.parameters


def test_a_streamed_model_adds_its_time_to_every_step_divided_by_the_ranks():
    given = Given(d_model=64, parameters=10**9, layers=6)
    run = run_sizes([recipe(harvest={"hooks": [HOOK]})], given)
    for devices in (1, 4):
        best = predict_run(run, machine(), devices).best
        assert best.seconds.model == pytest.approx(10**9 * 0.5 * 4096 * 128 / 120 * 1e-12 / devices, rel=1e-3)
    assert predict_run(run, machine(), 1).harvest_seconds == 0


def test_members_of_a_grid_add_their_weights_and_steps():
    one, three = (run_sizes([recipe()] * count, Given(d_model=64)) for count in (1, 3))
    alone, together = predict_run(one, machine(), 2).best, predict_run(three, machine(), 2).best
    assert together.memory.weights == 3 * alone.memory.weights
    assert together.memory.working == alone.memory.working
    assert together.step_seconds == pytest.approx(3 * alone.step_seconds)


def test_sixteen_million_latents_and_a_hundred_billion_tokens():
    huge = recipe(n_latents=1 << 24, tokens=10**11, batch_tokens=65_536)
    found = plan_run([huge], 256, H200, Given(d_model=8192, parameters=70 * 10**9))
    best = found.best
    assert best.mesh.latents >= 32
    assert best.memory.device <= 141e9
    assert found.steps == 1_525_879
    assert 0 < best.step_seconds < 3600
    assert plan_as_json(found)["best"] == [best.mesh.data, best.mesh.latents]


def test_a_measured_machine_predicts_the_step_that_was_measured():
    settings, given = recipe(n_latents=65_536), Given(d_model=64)
    run = run_sizes([settings], given)
    task = replace(
        probe_task(settings, {HOOK: 64}, run, 2, None), n_latents=65_536, few=1024, many=4096, processes=2, threads=1
    )
    phases = {
        "product": Phase(0.010, 0.040),
        "encode": Phase(0.021, 0.081),
        "passes": Phase(0.030, 0.111),
        "update": Phase(0.012, 0.018),
    }
    found = ProbedCosts(**phases, small=1e-4, large=1e-4 + (LARGE_MESSAGE - SMALL_MESSAGE) / 1e9, rounds=5)
    made = measured_machine(task, run, found, 2)
    whole = step_seconds(made, MeshShape(1), rank_step(run, MeshShape(1)))
    assert whole.forward == pytest.approx(made.crowd * 0.111)
    assert whole.update == pytest.approx(made.crowd * 0.018)
    quarter = step_seconds(made, MeshShape(4), rank_step(run, MeshShape(4)))
    assert quarter.forward == pytest.approx(made.crowd * 0.030)
    # Every rank makes the whole batch's update, and a quarter of the norm's sums: half of what grows with the tokens.
    grows = 0.008
    assert quarter.update == pytest.approx(made.crowd * (0.018 - grows / 2 + grows / 8))
    assert made.near.bandwidth == pytest.approx(1e9)
    assert made.near.latency == pytest.approx(1e-4)


def test_processes_beyond_the_cores_share_them(monkeypatch):
    monkeypatch.setattr("sparsary.training.scale.probe.usable_cores", lambda: 2)
    settings = recipe(model={"device": "cpu"})
    run = run_sizes([settings], Given(d_model=64))
    phases = dict.fromkeys(("product", "encode", "passes", "update"), Phase(0.01, 0.02))
    for devices, crowd in ((1, 1.0), (2, 1.0), (4, 2.0), (8, 4.0)):
        task = probe_task(settings, {HOOK: 64}, run, devices, None)
        assert task.processes == min(devices, 2)
        assert measured_machine(task, run, ProbedCosts(**phases, small=1e-4, large=1e-2, rounds=3), devices).crowd == crowd


def test_a_recipe_too_large_for_the_probe_is_probed_in_part():
    settings = recipe(n_latents=1 << 24)
    run = run_sizes([settings], Given(d_model=4096))
    task = probe_task(settings, {HOOK: 4096}, run, 1, None)
    assert 16 <= task.n_latents < 1 << 18
    assert 0 < task.few < task.many <= 4096


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (Device(flops=1e12), "--memory and --bandwidth: expected all of"),
        (Device(memory=1e9, bandwidth=1e9), "--flops: expected all of"),
        (replace(H200, link=-1.0), "--link: expected more than 0"),
        (replace(H200, per_node=0), "--devices-per-node: expected more than 0"),
    ],
)
def test_figures_must_be_complete_and_positive(device, words):
    with pytest.raises(ValueError, match=words):
        plan_run([recipe()], 1, device, Given(d_model=64))
