"""The self-check of what was read."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from sparsary.sae.formats import FORMATS, Format, SourceFiles, detect
from sparsary.sae.formats.canonical import ActivationFn, CanonicalSAE
from sparsary.sae.formats.validation import check

D, LATENTS = 8, 24


def neutral(gate=None, latents=LATENTS, **changes):
    """An autoencoder whose encoder is near its decoder, as trained ones are."""
    torch.manual_seed(1)
    W_dec = normalize(torch.randn(latents, D), dim=1)
    tensors = {"W_enc": W_dec + 0.1 * torch.randn(latents, D), "b_enc": torch.zeros(latents), "W_dec": W_dec}
    return CanonicalSAE("sae", gate=gate or ActivationFn("topk", k=3), **(tensors | {"b_out": torch.zeros(D)} | changes))


def test_what_is_sound_has_no_warnings():
    assert check(neutral(), "here") == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"W_dec": torch.randn(LATENTS)}, r"W_dec: expected a matrix of latents by width, got \(24,\)"),
        ({"W_dec": torch.randn(LATENTS, 0)}, r"expected a matrix"),
        ({"W_enc": torch.randn(D, LATENTS)}, r"W_enc, its latents first: expected shape \(24, any\), got \(8, 24\)"),
        ({"W_enc": torch.randn(LATENTS, 5)}, r"W_enc, its latents first: expected shape \(24, 8\), got \(24, 5\)"),
        ({"b_enc": torch.zeros(3)}, r"b_enc: expected shape \(24\), got \(3,\)"),
        ({"b_in": torch.zeros(3)}, r"b_in: expected shape \(8\), got \(3,\)"),
        ({"b_out": torch.zeros(3)}, r"b_out: expected shape \(8\), got \(3,\)"),
        ({"W_skip": torch.zeros(8, 3)}, r"W_skip, outputs first: expected shape \(8, 8\), got \(8, 3\)"),
        ({"b_enc": None}, "expected W_enc and b_enc for topk, found none"),
        ({"b_enc": torch.zeros(LATENTS, dtype=torch.long)}, "b_enc: expected floating-point numbers, got torch.int64"),
        ({"gate": ActivationFn("topk")}, "k: expected the number of latents per token, found none. Give it: k=NUMBER"),
        ({"gate": ActivationFn("topk", k=0)}, "k: expected a whole number from 1, got 0"),
        ({"gate": ActivationFn("topk", k=2.5)}, "k: expected a whole number from 1, got 2.5"),
        ({"gate": ActivationFn("abs_topk", k=25)}, "k: expected at most the 24 latents there are, got 25"),
        ({"gate": ActivationFn("threshold")}, "threshold: expected one, found none. Give it as threshold=NUMBER"),
        ({"gate": ActivationFn("threshold", threshold=torch.ones(5))}, r"threshold: expected shape \(24\), got \(5,\)"),
        (
            {"gate": ActivationFn("threshold", threshold=torch.tensor(torch.nan))},
            r"threshold: expected finite numbers, got nan at \[\]",
        ),
        ({"scale_in": 0.0}, "scale_in: expected a number above 0, got 0.0"),
        ({"scale_out": float("nan")}, "scale_out: expected a number above 0, got nan"),
        ({"W_dec": torch.zeros(LATENTS, D)}, "W_dec: expected nonzero decoder directions, got only zeros"),
    ],
)
def test_what_cannot_be_used_is_named(changes, says):
    with pytest.raises(ValueError, match=f"^here: .*{says}"):
        check(neutral(**changes), "here")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["W_dec", "W_enc", "b_enc", "b_out", "b_in", "W_skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none_are_found_wherever_they_are(name, bad, dtype):
    given = neutral(b_in=torch.zeros(D), W_skip=torch.zeros(D, D))
    damaged = getattr(given, name).clone().to(dtype)
    # Transposed, as the file has it.
    damaged = damaged.T.contiguous().T if damaged.ndim == 2 else damaged
    place = (5, 2) if damaged.ndim == 2 else (3,)
    damaged[place] = bad
    with pytest.raises(
        ValueError, match=rf"{name}: expected finite numbers, got -?(nan|inf) at \[{', '.join(map(str, place))}\]"
    ):
        check(replace(given, **{name: damaged}), "here")


def test_large_numbers_are_numbers():
    assert check(neutral(W_enc=torch.full((LATENTS, D), 3e38)), "here") == []


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_a_square_matrix_the_wrong_way_is_found(name):
    given = neutral(latents=D)
    assert check(given, "here") == []
    swapped = replace(given, **{name: getattr(given, name).T.contiguous()})
    with pytest.raises(ValueError, match=r"swapped orientation: .* if one of them is transposed"):
        check(swapped, "here")
    # Of a transcoder the same says nothing.
    assert check(replace(swapped, kind="transcoder"), "here") == []


def test_odd_things_are_warnings():
    given = neutral()
    given.W_dec[:2] = 0
    assert check(given, "here") == ["2 of 24 atoms are zero: these latents write nothing"]
    mixed = neutral(W_enc=neutral().W_enc.bfloat16())
    assert check(mixed, "here") == ["encoder in bfloat16, decoder in float32"]
    assert check(neutral(warnings=("odd",)), "here") == ["odd"]


class Other(Format):
    name, title = "other", "Another"

    def detect(self, source):
        return "it likes everything"

    def read(self, source, options):
        raise NotImplementedError

    def write(self, n, directory):
        raise NotImplementedError


def test_files_that_may_be_of_two_formats_are_an_error_that_lists_both(monkeypatch, tmp_path):
    (tmp_path / "cfg.json").write_text(
        '{"architecture": "topk", "d_in": 1, "d_sae": 1, "metadata": {"sae_lens_version": "6.1"}}'
    )
    monkeypatch.setitem(FORMATS, "other", Other())
    with pytest.raises(
        ValueError, match=r"several formats: saelens \(cfg.json with .*\); other \(it likes everything\)\. Choose one"
    ):
        detect(SourceFiles(tmp_path))
    chosen = detect(SourceFiles(tmp_path), "saelens")
    assert chosen is not None
    assert chosen[0].name == "saelens"
