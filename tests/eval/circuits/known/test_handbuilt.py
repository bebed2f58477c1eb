"""Circuits written by hand: they do what they say, and exact patching finds them and nothing else."""

import pytest
import torch

from sparsary.eval.circuits.known import KNOWN
from sparsary.eval.circuits.known.handbuilt import LONGEST, and_gate_circuit, fraction, induction_circuit, reverse


@pytest.mark.parametrize("name", ["and_gate", "adder_gate", "induction", "induction_query"])
def test_exact_patching_finds_the_circuit(name, check_truth):
    check_truth(KNOWN[name](n_pairs=3), floor=1e-2)


@pytest.mark.parametrize("build", [fraction, reverse])
def test_exact_patching_finds_the_longer_circuits(build, check_truth):
    check_truth(build(n_pairs=3), floor=1e-2)


def test_exact_patching_finds_the_or_with_others_ablated(check_truth):
    check_truth(and_gate_circuit("or", n_pairs=3), floor=1e-2, redundant=True, n_contexts=40)


def test_an_or_does_not_show_its_parts_one_by_one(brute):
    known = and_gate_circuit("or", n_pairs=2)
    runs = brute(known, "resample", "nodes")
    alone = dict(zip(runs.names, runs.alone().tolist(), strict=True))
    assert alone["a0.h1"] < 1e-6
    assert alone["a0.h3"] < 1e-6
    assert alone["m0"] == 1.0
    both = torch.tensor([[name in ("a0.h1", "a0.h3") for name in runs.names]])
    assert (runs.measure(both) < 0).all()


def test_distractors_are_busy():
    # A distractor that wrote the same on both prompts would be no test of anything.
    for build in (and_gate_circuit("and"), induction_circuit(), fraction(), reverse()):
        hooks = tuple(f"h.{layer}.attn.o_proj:in" for layer in range(build.config.n_layers))
        clean, corrupted = (build.model.activations(ids, hooks) for ids in (build.pairs.clean, build.pairs.corrupted))
        apart = torch.stack([(clean[hook] - corrupted[hook]).abs().amax((0, 1)) for hook in hooks])
        heads = apart.view(len(hooks), build.config.n_heads, -1).amax(-1)
        lengths = {"reverse": ["a0.h1", "a1.h1"]}.get(build.name, [])
        for layer, row in enumerate(heads):
            for head, change in enumerate(row):
                assert (change > 0.1) == (f"a{layer}.h{head}" not in lengths)


def test_the_gates_are_gates():
    answers = {}
    for kind in ("and", "or", "adder"):
        known = and_gate_circuit(kind)
        prompts = torch.tensor([[2, left, right, 0, 1, 3] for left in (0, 1) for right in (0, 1)])
        answers[kind] = known.model.logits(prompts)[:, -1, 1] + 0.5
    torch.testing.assert_close(answers["and"], torch.tensor([0.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(answers["or"], torch.tensor([0.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(answers["adder"], torch.tensor([0.0, 1.0, 1.0, 2.0]))


def test_induction_finds_what_followed():
    known = induction_circuit(n_pairs=40)
    said = known.model.logits(known.pairs.clean)[:, -1].argmax(-1)
    for prompt, token in zip(known.pairs.clean.tolist(), said.tolist(), strict=True):
        assert token == prompt[prompt.index(prompt[-1]) + 1]


def test_the_fraction_is_of_x_so_far():
    known = fraction(n_pairs=40)
    is_x = (known.pairs.clean[:, 1:] == 2).float()
    so_far = is_x.cumsum(1) / torch.arange(1, 6)
    torch.testing.assert_close(known.model.logits(known.pairs.clean)[:, 1:, 0], so_far, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", range(1, LONGEST))
def test_reverse_reverses_and_padding_changes_nothing(length):
    known = reverse(length=length)
    letters = known.pairs.clean[:, 1:] - 1
    padded = torch.nn.functional.pad(known.pairs.clean, (0, LONGEST - length), value=4)
    for prompts in (known.pairs.clean, padded):
        assert torch.equal(known.model.logits(prompts)[:, 1 : length + 1].argmax(-1), letters.flip(1))
        # What the second head is told: position p of n looks at n + 1 - p.
        stream = known.model.activations(prompts, ("h.1:out",))["h.1:out"][:, 1 : length + 1]
        source = torch.stack([stream @ known.directions[f"source:{index}"] for index in range(1, length + 1)], -1)
        torch.testing.assert_close(source, torch.eye(length).flip(0).expand_as(source), rtol=0, atol=1e-5)


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match=r"kind: expected one of and, or, adder, got 'xor'"):
        and_gate_circuit("xor")
    with pytest.raises(ValueError, match=r"corruption: expected other prompt or other query, got 'both'"):
        induction_circuit(corruption="both")
    with pytest.raises(ValueError, match=r"length: expected 1 to 4, got 5"):
        reverse(length=5)
