"""End-to-end training: the loss of the model's predictions, the contexts it is computed on, and gradient SAEs from a store."""

import contextlib
import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsary.sae import ENCODERS, SAE, load_dictionary
from sparsary.training.activations.context_stream import ContextStream
from sparsary.training.activations.contexts import Origin
from sparsary.training.activations.live import Buffers, LiveStream
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.objective import AuxSettings, Divergence, LatentUsage, LossWeights, Objective, Terms, combine
from sparsary.training.recipe import HarvestSection, TextSection, check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import run_harvest, train_recipe
from sparsary.training.text import contexts, is_heldout

HOOK = "transformer.h.2:out"
TEXT = TextSection(context_length=32)
SECTION = HarvestSection(hooks=(HOOK,), live_buffer_tokens=450, exclude_leading=2, heldout=0.3)
BATCH = 101


def context_stream(model, text=TEXT, section=SECTION, batch_tokens=BATCH):
    return ContextStream(LiveStream(Buffers(model, text, section, (HOOK,)), (HOOK,), batch_tokens, seed=1))


@pytest.fixture
def stream_of(embedded_model):
    """Makes context streams and closes them, however the test ends."""
    with contextlib.ExitStack() as stack:

        def make(*arguments):
            stream = context_stream(embedded_model, *arguments)
            stack.callback(stream.close)
            return stream

        yield make


@pytest.fixture(scope="module")
def batch(embedded_model):
    stream = context_stream(embedded_model)
    first = next(stream)
    stream.close()
    return first


@pytest.fixture(scope="module")
def exact_model(embedded_model):
    """The same model in float64."""
    module = copy.deepcopy(embedded_model.module).double()
    return LanguageModel(module, embedded_model.tokenizer, "embedded", None)


def usage(n_latents):
    return LatentUsage(torch.zeros(n_latents, dtype=torch.bool), torch.zeros(n_latents, dtype=torch.float64))


# Contexts.


def test_every_batch_has_exactly_so_many_rows_and_they_are_the_model_s(embedded_model, stream_of):
    stream = stream_of()
    for batch in itertools.islice(stream, 5):
        origin = batch.origin
        assert batch.x.shape == (BATCH, 128)
        assert int(origin.kept.sum()) == BATCH
        seen = embedded_model.activations(origin.token_ids, (HOOK,))[HOOK]
        assert torch.equal(batch.x, seen[origin.kept])


def any_kept(context, special):
    kept = [not is_heldout(int(d), 0.3) for d in context.document_ids] & ~np.isin(context.token_ids, list(special))
    return kept[2:].any()


def test_batches_are_the_text_in_order_less_held_out_documents_and_excluded_positions(embedded_model, stream_of):
    stream = stream_of()
    text = contexts(TEXT, embedded_model.tokenizer)
    special = set(embedded_model.tokenizer.all_special_ids)
    heldout_seen = 0
    for batch in itertools.islice(stream, 6):
        origin = batch.origin
        # Contexts of which nothing is kept are passed over.
        rows = list(itertools.islice((c for c in text if any_kept(c, special)), len(origin.token_ids)))
        token_ids, documents = np.stack([c.token_ids for c in rows]), np.stack([c.document_ids for c in rows])
        assert np.array_equal(origin.token_ids.numpy(), token_ids)
        wanted = np.array([[not is_heldout(int(d), 0.3) for d in row] for row in documents])
        heldout_seen += int((~wanted).sum())
        wanted &= ~np.isin(token_ids, list(special))
        wanted[:, :2] = False
        # Surplus of the last context is left to the model.
        wanted &= wanted.cumsum().reshape(wanted.shape) <= BATCH
        assert np.array_equal(origin.kept.numpy(), wanted)
        follows = documents[:, 1:] == documents[:, :-1]
        assert np.array_equal(origin.counted.numpy(), wanted[:, :-1] & follows)
        assert not (wanted[:, :-1] & ~follows).all()
    assert heldout_seen > 20


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_context_stream_goes_on_exactly(stream_of, stop):
    whole = stream_of()
    expected = [next(whole) for _ in range(8)]
    part = stream_of()
    for _ in range(stop):
        next(part)
    position = json.loads(json.dumps(part.position()))
    resumed = stream_of()
    resumed.seek(position)
    for batch in expected[stop:]:
        again = next(resumed)
        assert torch.equal(again.x, batch.x)
        assert torch.equal(again.origin.kept, batch.origin.kept)
        assert torch.equal(again.origin.token_ids, batch.origin.token_ids)


def test_the_position_after_a_batch_is_known_when_it_is_handed_out(stream_of):
    """The reading thread may be held up right after a batch is in the queue, and the run saved in the meantime."""
    stream = stream_of()
    next(stream.produce(0))
    stream.batches = 1
    assert stream.position()["batches"] == 1


def test_the_text_starts_over_when_it_ends(stream_of, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(["The war lasted from the year 1732 to the year 1741."] * 12))
    text = TextSection(source="files", files=(str(tmp_path / "t.txt"),), context_length=16)
    stream = stream_of(text, SECTION.model_copy(update={"heldout": 0.0}), 53)
    assert [len(batch.x) for batch in itertools.islice(stream, 20)] == [53] * 20


# The divergence.


def test_a_perfect_reconstruction_loses_nothing(embedded_model, batch):
    divergence = Divergence(embedded_model, HOOK)
    assert abs(float(divergence(batch, batch.x))) < 1e-7
    assert float(divergence(batch, batch.x.mean(0).expand_as(batch.x))) > 0.1


def test_the_divergence_is_the_mean_kl_of_the_counted_predictions(embedded_model, batch):
    y_hat = batch.x + torch.randn(batch.x.shape)
    origin = batch.origin

    def put(x):
        x = x.clone()
        x[origin.kept] = y_hat
        return x

    clean = embedded_model.logits(origin.token_ids).log_softmax(-1)
    with embedded_model.replacing(HOOK, put):
        spliced = embedded_model.logits(origin.token_ids).log_softmax(-1)
    per_position = (clean.exp() * (clean - spliced)).sum(-1)[:, :-1]
    expected = sum(
        float(per_position[c, p]) for c, p in itertools.product(*map(range, per_position.shape)) if origin.counted[c, p]
    ) / int(origin.counted.sum())
    assert float(Divergence(embedded_model, HOOK)(batch, y_hat)) == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


def test_positions_that_are_not_kept_read_what_the_model_has(embedded_model, batch):
    """If nothing is kept, nothing is replaced."""
    origin = batch.origin
    none = Origin(origin.token_ids, torch.zeros_like(origin.kept), origin.counted)
    assert abs(float(Divergence(embedded_model, HOOK)(ActivationBatch(batch.x, origin=none), torch.zeros_like(batch.x)))) < 1e-7


def test_the_divergence_s_gradient_is_that_of_finite_differences(exact_model, batch):
    """On the weights that matter most, in float64 but for the logits; the model itself gets none."""
    torch.manual_seed(2)
    sae = SAE(128, 67, ENCODERS["topk"](k=5)).double()
    exact = ActivationBatch(
        exact_model.activations(batch.origin.token_ids, (HOOK,))[HOOK][batch.origin.kept], origin=batch.origin
    )
    sae.out_scale.fill_(float(exact.x.std()))
    sae.in_scale.fill_(float(exact.x.std()))
    with torch.no_grad():
        sae.b_dec.copy_(exact.x.mean(0) / sae.in_scale)
    divergence = Divergence(exact_model, HOOK)

    def loss():
        return divergence(exact, sae(exact.x))

    loss().backward()
    for weights in (sae.W_dec, sae.b_enc, sae.W_enc):
        place = weights.grad.abs().argmax()
        values = []
        with torch.no_grad():
            for step in (1e-2, -1e-2):
                weights.view(-1)[place] += step
                values.append(float(loss()))
                weights.view(-1)[place] -= step
        slope = (values[0] - values[1]) / 2e-2
        assert abs(slope) > 1e-3
        assert slope == pytest.approx(float(weights.grad.view(-1)[place]), rel=0.02)
    assert all(p.grad is None for p in exact_model.module.parameters())


# The objective.


def test_the_objective_adds_divergence_and_weighted_reconstruction(embedded_model, batch):
    torch.manual_seed(2)
    sae = SAE(128, 67, ENCODERS["topk"](k=5))
    divergence, aux = Divergence(embedded_model, HOOK), AuxSettings(0.0, 3)
    for weight in (0.0, 0.7):
        loss, terms = Objective(sae, torch.tensor(11.0), aux, divergence, LossWeights(weight, 1.0))(batch, usage(67))
        fvu = (sae(batch.x) - batch.x).pow(2).sum(-1).mean() / 11
        torch.testing.assert_close(terms.named["kl"], divergence(batch, sae(batch.x)).detach())
        torch.testing.assert_close(terms.named["fvu"], fvu.detach())
        torch.testing.assert_close(loss, terms.named["kl"] + weight * fvu)
    assert "kl" not in Objective(sae, torch.tensor(11.0), aux)(batch, usage(67))[1].named


def test_every_prefix_is_judged_by_the_model(embedded_model, batch):
    torch.manual_seed(2)
    sae = SAE(128, 67, ENCODERS["matryoshka"](k=5, shares=[0.5, 1.0]))
    divergence = Divergence(embedded_model, HOOK)
    loss, _ = Objective(sae, torch.tensor(11.0), AuxSettings(0.0, 3), divergence, LossWeights(0.0, 1.0))(batch, usage(67))
    dense = sae.encode(batch.x).to_dense(67)
    kls = [divergence(batch, dense[:, :width] @ sae.W_dec[:width] + sae.b_dec) for width in (34, 67)]
    torch.testing.assert_close(loss, sum(kls) / 2)
    assert float(kls[0].detach()) != pytest.approx(float(kls[1].detach()), rel=1e-3)


def test_aux_zipf_is_part_of_the_objective():
    sae, x = SAE(7, 23, ENCODERS["topk"](k=2)), torch.randn(31, 7)
    density = torch.linspace(0.5, 0.1, 23).double()
    density[5] = 1e-5
    named = {}
    for tau in (0.0, 0.5):
        objective = Objective(sae, torch.tensor(7.0), AuxSettings(0.25, 3, tau))
        loss, terms = objective(ActivationBatch(x), LatentUsage(torch.zeros(23, dtype=torch.bool), density))
        named[tau] = float(terms.named["aux"])
        torch.testing.assert_close(loss.detach(), terms.named["fvu"] + terms.named["aux"])
    assert named[0.0] == 0.0
    assert named[0.5] > 0.0


def test_terms_of_pieces_are_averaged_and_firings_added():
    pieces = [Terms({"fvu": torch.tensor(float(i))}, torch.tensor([i, 1])) for i in (1, 2)]
    both = combine(pieces)
    assert float(both.named["fvu"]) == 1.5
    assert both.firings.tolist() == [3, 2]


# Whole runs.


@pytest.fixture
def end_to_end(recipe_values):
    recipe_values["harvest"] |= {"store": None, "tokens": None, "live_buffer_tokens": 900}
    recipe_values |= {"objective": "kl", "tokens": BATCH * 10, "log_every": 1, "lr": 3e-3, "lr_warmup_steps": 0}
    return recipe_values


def metrics(directory):
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def assert_equal_files(first, second, name="state.safetensors"):
    a, b = load_file(Path(first) / name), load_file(Path(second) / name)
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


def test_an_end_to_end_run_lowers_the_kl_and_resumes_bit_equal(end_to_end, tmp_path, stopped_after):
    whole = train_recipe(resolve_recipe(check_recipe(end_to_end | {"out_dir": str(tmp_path / "whole")}, "recipe")))
    lines = metrics(whole)
    kl = [line["kl"] for line in lines]
    assert sum(kl[-3:]) < 0.8 * sum(kl[:3])
    # The reconstruction is told, but has no part in the loss.
    assert lines[0]["loss"] == pytest.approx(kl[0] + lines[0]["aux"], rel=1e-5)
    assert lines[0]["fvu"] > 0
    recipe = check_recipe(end_to_end | {"out_dir": str(tmp_path / "parts")}, "recipe")
    with stopped_after(5):
        train_recipe(resolve_recipe(recipe))
    assert_equal_files(whole, train_recipe(resolve_recipe(recipe)))
    assert load_dictionary(whole).n_latents == 67


def test_a_phase_switches_the_objective_and_keeps_the_encoder(end_to_end, tmp_path, stopped_after):
    later = [{"start": 0.5, "objective": "kl"}, {"start": 0.8, "reconstruction_weight": 0.5, "lr_factor": 0.1}]
    end_to_end |= {"objective": "reconstruction", "phases": later}
    whole = train_recipe(resolve_recipe(check_recipe(end_to_end | {"out_dir": str(tmp_path / "whole")}, "recipe")))
    lines = metrics(whole)
    assert ["kl" in line for line in lines] == [False] * 5 + [True] * 5
    for number, line in enumerate(lines):
        wanted = line["fvu"] if number < 5 else line["kl"] + (0.5 * line["fvu"] if number >= 8 else 0.0)
        assert line["loss"] == pytest.approx(wanted + line["aux"], rel=1e-5)
    recipe = check_recipe(end_to_end | {"out_dir": str(tmp_path / "parts")}, "recipe")
    with stopped_after(6):
        train_recipe(resolve_recipe(recipe))
    assert_equal_files(whole, train_recipe(resolve_recipe(recipe)))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "harvest",
            {"store": "somewhere", "tokens": 6000},
            "harvest.store: expected null with objective kl, which runs the model at every step, got 'somewhere'.",
        ),
        ("harvest", {"gradients": True}, "harvest.gradients: expected false with objective kl"),
        (None, {"batch_tokens": 100, "accumulate": 4}, "accumulate: expected 1 with objective kl, got 4. Lower batch_tokens"),
        (None, {"objective": "kll"}, "objective: expected 'reconstruction' or 'kl', got 'kll'."),
        (None, {"reconstruction_weight": -1.0}, "reconstruction_weight: expected greater than or equal to 0"),
        (
            None,
            {"phases": [{"start": 0.5}]},
            "phases.0: expected an encoder, an objective or a reconstruction_weight, got none.",
        ),
        (
            None,
            {"phases": [{"start": 0.5, "objective": "reconstruction", "blend": 0.1}]},
            "phases.0.blend: expected 0 without an encoder, got 0.1.",
        ),
    ],
)
def test_what_end_to_end_training_cannot_do_is_refused(end_to_end, section, changes, message):
    if section is None:
        end_to_end |= changes
    else:
        end_to_end[section] |= changes
    with pytest.raises(ValueError, match="recipe: ") as caught:
        check_recipe(end_to_end, "recipe")
    assert message in str(caught.value)


def test_end_to_end_training_on_bare_tensors_is_refused(end_to_end):
    with pytest.raises(ValueError, match=r"activations: .*objective kl"):
        train_recipe(resolve_recipe(check_recipe(end_to_end, "recipe")), [torch.randn(500, 19)])
    assert not Path(end_to_end["out_dir"]).exists()


# Gradient SAEs.


@pytest.fixture(scope="module")
def gradient_store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stores") / "gradients")


@pytest.fixture
def gradient_values(recipe_values, gradient_store):
    """Ten steps over a store of 1,500 tokens with gradients."""
    recipe_values["harvest"] |= {"store": gradient_store, "gradients": True, "tokens": 1500, "shard_tokens": 700}
    recipe_values["dictionary"]["encoder"] = {"name": "gradient_topk", "k": 5, "beta": 20.0}
    return recipe_values | {"tokens": BATCH * 10, "log_every": 1, "lr": 4e-3}


def test_a_gradient_sae_is_trained_from_a_store_with_gradients(gradient_values, tmp_path):
    schedule = {"schedules": {"beta": [[0.0, 0.0], [0.5, 20.0]]}}
    directory = train_recipe(resolve_recipe(check_recipe(gradient_values | schedule, "recipe")))
    lines = metrics(directory)
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert json.loads((directory / "dictionary.json").read_text())["dictionary"]["encoder"] == {
        "name": "gradient_topk",
        "k": 5,
        "beta": 20.0,
        "normalize": "token",
    }
    stream = StoreStream(
        run_harvest(resolve_recipe(check_recipe(gradient_values, "recipe"))), (HOOK,), BATCH, seed=0, gradients=True
    )
    batch = next(stream)
    stream.release()
    assert batch.grad.shape == batch.x.shape
    sae = load_dictionary(directory)
    plain, oracle = sae.encode(batch.x), sae.encode(batch.x, batch.grad)
    assert (plain.l0() == 5).all()
    shared = (plain.to_dense(67) > 0) & (oracle.to_dense(67) > 0)
    assert 0 < int(shared.sum()) < 5 * BATCH
    # Nothing of it is left at beta 0: that run is TopK's, to the bit.
    none = {"name": "gradient_topk", "k": 5, "beta": 0.0}
    topk = {"name": "topk", "k": 5}
    runs = []
    for number, encoder in enumerate((none, topk)):
        values = gradient_values | {"out_dir": str(tmp_path / f"{number}")}
        values["dictionary"] = values["dictionary"] | {"encoder": encoder}
        runs.append(load_file(train_recipe(resolve_recipe(check_recipe(values, "recipe"))) / "state.safetensors"))
    assert torch.equal(runs[0]["dictionary/W_dec"], runs[1]["dictionary/W_dec"])
    assert not torch.equal(runs[0]["dictionary/W_dec"], load_file(directory / "state.safetensors")["dictionary/W_dec"])


def test_a_gradient_sae_resumes_bit_equal(gradient_values, tmp_path, stopped_after):
    whole = train_recipe(resolve_recipe(check_recipe(gradient_values | {"out_dir": str(tmp_path / "whole")}, "recipe")))
    recipe = check_recipe(gradient_values | {"out_dir": str(tmp_path / "parts")}, "recipe")
    with stopped_after(4):
        train_recipe(resolve_recipe(recipe))
    assert_equal_files(whole, train_recipe(resolve_recipe(recipe)))


def test_a_store_without_gradients_is_not_one_with(gradient_values, tmp_path):
    """A store made before gradients were asked for is named, and what to do."""
    gradient_values["harvest"] = gradient_values["harvest"] | {"store": str(tmp_path / "plain"), "gradients": False}
    plain = gradient_values | {"dictionary": gradient_values["dictionary"] | {"encoder": {"name": "topk", "k": 5}}}
    store = run_harvest(resolve_recipe(check_recipe(plain, "recipe")))
    with pytest.raises(ValueError, match=r"harvest\.gradients: .* holds None.*sparsary harvest RECIPE"):
        StoreStream(store, (HOOK,), BATCH, seed=0, gradients=True)
    gradient_values["harvest"]["gradients"] = True
    with pytest.raises(ValueError, match=r"gradients: None in the store"):
        train_recipe(resolve_recipe(check_recipe(gradient_values, "recipe")))
