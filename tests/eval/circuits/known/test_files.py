"""Toy models from files do what their config.json measured."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.eval.circuits.known import load_toy


@pytest.fixture(scope="module")
def toy(shared_data):
    """Loads a toy model and what was measured of it: ``toy(name)``."""

    def load(name):
        directory = shared_data / "models" / "toy" / name
        return load_toy(directory).eval().requires_grad_(False), json.loads((directory / "config.json").read_text())["measured"]

    return load


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(5)


def test_addition_is_all_right(toy):
    module, measured = toy("modadd59_clock_B")
    pairs = torch.cartesian_prod(torch.arange(59), torch.arange(59))
    said = module(pairs).logits[:, -1].argmax(-1)
    assert measured["accuracy"] == 1.0
    assert torch.equal(said, pairs.sum(1) % 59)


def test_lists_are_copied_as_often_as_measured(toy):
    module, measured = toy("list_comp_2l")
    digits = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    prompts = torch.cat([digits, torch.tensor([101, 100, 100]).expand(len(digits), -1)], 1)
    right = (module(prompts).logits[:, 3:].argmax(-1) == digits).all(1)
    assert float(right.float().mean()) == pytest.approx(measured["accuracy_both"], abs=1e-4)


def test_copying_repeats_is_as_good_as_measured(toy, draw):
    module, measured = toy("induction_2l_attn_only")
    sequence, starts = torch.randint(0, 128, (100, 85), generator=draw), torch.tensor([5, 30, 60])
    repeat = torch.randint(0, 128, (100, 16), generator=draw)
    for start in starts:
        sequence[:, start : start + 16] = repeat
    said = module(sequence).logits.argmax(-1)
    later = torch.cat([torch.arange(start + 1, start + 16) for start in starts[1:]])
    # Where the repeats were put was not recorded: close, not equal. Chance is 0.008.
    assert float((said[:, later - 1] == sequence[:, later]).float().mean()) == pytest.approx(
        measured["accuracy_on_repeats"], abs=0.2
    )


def balanced(text):
    depths = torch.tensor([1 if letter == "(" else -1 for letter in text]).cumsum(0)
    return bool((depths >= 0).all() and depths[-1] == 0)


def test_brackets_are_told_apart(toy, draw):
    module, measured = toy("arena_brackets")
    texts = []
    for _ in range(400):
        half = int(torch.randint(1, 21, (), generator=draw))
        text = list("()" * half)
        while len(text) == 2 * half and not (balanced(text) and torch.rand((), generator=draw) < 0.6):
            text = [text[index] for index in torch.randperm(2 * half, generator=draw)]
            if torch.rand((), generator=draw) < 0.3:
                break
        texts.append("".join(text))
    ids = [[0, *(3 if letter == "(" else 4 for letter in text), 2] for text in texts]
    prompts = torch.tensor([row + [1] * (42 - len(row)) for row in ids])
    said = module(prompts).logits[:, 0].argmax(-1).bool()
    truth = torch.tensor([balanced(text) for text in texts])
    assert 0.2 < truth.float().mean() < 0.8
    assert float((said == truth).float().mean()) >= measured["accuracy"] - 0.005


def reversed_letters(letters):
    return letters[::-1]


def counts(letters):
    return [Counter(letters)[letter] for letter in letters]


def pattern_ends(letters):
    return [int(letters[: end + 1][-3:] == list("abc")) for end in range(len(letters))]


@pytest.mark.parametrize(
    ("name", "vocabulary", "task"),
    [
        ("tracr_reverse", "abc", reversed_letters),
        ("tracr_hist", "abcd", counts),
        ("tracr_detect_abc", "abcd", pattern_ends),
    ],
)
def test_compiled_programs_compute_their_program(name, vocabulary, task, toy, draw):
    module, measured = toy(name)
    ids = {"a": 1, "b": 2, "c": 3, "d": 5}
    longest = module.config.n_ctx - 1
    for index in range(80):
        length = int(torch.randint(3, longest + 1, (), generator=draw))
        letters = [vocabulary[letter] for letter in torch.randint(0, len(vocabulary), (length,), generator=draw)]
        if name == "tracr_detect_abc" and index % 2:
            letters[:3] = "abc"
        outputs = module(torch.tensor([[0, *(ids[letter] for letter in letters)]])).logits[0, 1:].argmax(-1).tolist()
        expected = task(letters)
        assert outputs == ([vocabulary.index(letter) for letter in expected] if name == "tracr_reverse" else expected)
    assert measured["agreement_with_compiler"] == 1.0


def test_the_compiled_fraction_is_the_fraction(toy, draw):
    module, _ = toy("tracr_frac_prevs")
    prompts = torch.randint(2, 6, (50, 6), generator=draw)
    prompts[:, 0] = 0
    so_far = (prompts[:, 1:] == 3).float().cumsum(1) / torch.arange(1, 6)
    torch.testing.assert_close(module(prompts[:, :]).logits[:, 1:, 0], so_far, rtol=0, atol=1e-5)


def test_other_files_are_refused(tmp_path, shared_data):
    with pytest.raises(ValueError, match=r"expected a directory with config\.json and model\.safetensors"):
        load_toy(tmp_path)
    with pytest.raises(ValueError, match=r"layout: transformer_lens, got None"):
        load_toy(shared_data / "models" / "toy" / "gpt_nano_sort")
    source = shared_data / "models" / "toy" / "tracr_frac_prevs"
    values = json.loads((source / "config.json").read_text())
    save_file(load_file(source / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values | {"attention_dir": "sideways"}))
    with pytest.raises(ValueError, match=r"attention_dir: expected one of causal, bidirectional, got 'sideways'"):
        load_toy(tmp_path)
