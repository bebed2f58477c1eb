"""Addition on a clock: right everywhere, by the frequencies it says, and exact patching finds their heads."""

import math

import pytest
import torch

from sparsary.eval.circuits.known import load_toy
from sparsary.eval.circuits.known.modular import STEP, clock, wave


def spectrum(values):
    """Share of each frequency, from 0 to p // 2, in the sum of squares of what depends on a number modulo p."""
    power = torch.fft.rfft(values.double(), dim=0).abs().pow(2).sum(1)
    # All but the constant (and, for even p, the fastest) stand for two.
    power[1 : (len(values) + 1) // 2] *= 2
    return power / power.sum()


def sums(p):
    numbers = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    return numbers, torch.cat([numbers, torch.full((p * p, 1), p)], 1)


@pytest.mark.parametrize(("p", "frequencies"), [(13, (1, 5)), (11, (2, 4)), (17, (1, 4, 6))])
def test_every_sum_is_right_and_logits_are_cosines(p, frequencies):
    known = clock(p=p, frequencies=frequencies, unused=(3, 5) if 5 not in frequencies else (2,))
    numbers, prompts = sums(p)
    logits = known.model.logits(prompts)[:, -1]
    assert torch.equal(logits.argmax(-1), numbers.sum(1) % p)
    apart = (numbers.sum(1)[:, None] - torch.arange(p)) * (2 * math.pi / p)
    expected = sum((k * apart).cos() for k in frequencies)
    # Each of four squares is up to STEP ** 2 / 4 too large, two of them with a minus sign; so for cosine and for sine.
    assert (logits - expected).abs().max() <= len(frequencies) * math.sqrt(2) * STEP**2 / 8 + 1e-5


def test_exact_patching_finds_the_heads_of_the_frequencies(check_truth):
    check_truth(clock(n_pairs=4), floor=1e-2)


def test_unused_frequencies_are_computed_and_not_read():
    known = clock()
    numbers, prompts = sums(13)
    stream = known.model.activations(prompts, ("h.0:out",))["h.0:out"][:, -1]
    totals = torch.stack([stream @ known.directions[f"total:{axis}"] for axis in range(8)], 1)
    # Frequencies are 2, 1, 3, 5 in this order; the second and the fourth are used.
    for index, frequency in enumerate((2, 1, 3, 5)):
        expected = wave(13, frequency)[numbers.sum(1) % 13]
        assert (totals[:, 2 * index : 2 * index + 2] - expected).abs().max() < STEP**2 / 4
    assert {name for name in known.nodes["resample"] if name.startswith("a")} == {"a0.h2", "a0.h3", "a0.h6", "a0.h7"}
    assert spectrum(known.module.wte.weight[:13]).topk(4).indices.sort().values.tolist() == [1, 2, 3, 5]
    assert spectrum(known.module.lm_head.weight).topk(2).indices.sort().values.tolist() == [1, 5]


def test_a_spectrum_adds_up_to_one_and_names_the_frequency():
    shares = spectrum(torch.cat([wave(13, 3), 0.5 * wave(13, 4), torch.ones(13, 1)], 1))
    torch.testing.assert_close(shares[[0, 3, 4]], torch.tensor([1.0, 1.0, 0.25]).double() / 2.25)
    assert shares.sum() == pytest.approx(1.0)


def test_the_trained_model_s_frequencies(shared_data):
    module = load_toy(shared_data / "models" / "toy" / "modadd59_clock_B").requires_grad_(False)
    numbers, _ = sums(59)
    logits = module(numbers).logits[:, -1]
    # The mean logit by c - a - b.
    turned = torch.stack([row.roll(-shift) for row, shift in zip(logits, numbers.sum(1).tolist(), strict=True)])
    read = spectrum(turned.mean(0)[:, None] - turned.mean())
    assert read.topk(3).indices.sort().values.tolist() == [13, 16, 21]
    assert read.topk(3).values.sum() > 0.999
    held = spectrum(module.wte.weight - module.wte.weight.mean(0))
    assert held.topk(4).indices.sort().values.tolist() == [13, 16, 17, 21]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="p: expected an odd prime, got 15"):
        clock(p=15)
    with pytest.raises(ValueError, match=r"from 1 to 6 \(half of p\), got \[2, 1, 3, 7\]"):
        clock(frequencies=(1, 7))
