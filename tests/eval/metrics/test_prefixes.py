"""FVU and l0 of Matryoshka's nested dictionaries."""

import pytest
import torch

from sparsary.eval.metrics.base import DictionaryOutputs, Setting
from sparsary.eval.metrics.prefixes import Prefixes
from sparsary.eval.pages.report import render_report
from sparsary.eval.undefined import settled
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.metrics import fvu
from sparsary.transcoders import Transcoder

CPU = torch.device("cpu")


def scored(dictionary, x, y, pieces=(40, 61)):
    """Return the entries of a dictionary on rows that arrive in batches."""
    setting = Setting(dictionary.eval(), CPU)
    group = Prefixes(setting)
    for rows, targets in zip(x.split(pieces), y.split(pieces), strict=True):
        group.score(DictionaryOutputs(setting, None, (rows, targets)))
    return group.report()


@pytest.mark.parametrize("kind", ["sae", "skip transcoder"])
def test_every_prefix_equals_the_dictionary_without_its_later_latents(kind):
    torch.manual_seed(0)
    encoder = ENCODERS["matryoshka"](k=5, shares=[0.1, 0.5, 1.0])
    d = SAE(7, 30, encoder) if kind == "sae" else Transcoder(7, 6, 30, encoder, skip=True)
    x = torch.randn(101, 7)
    y = x if kind == "sae" else torch.randn(101, 6)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.normal_()
        d.out_scale.fill_(1.7)
        d.train()
        d.encode(x)
        d.eval().calibrate([x])
        entries = scored(d, x, y)
        dense = d.encode(x).to_dense(30)
        expected = []
        for width in (3, 15, 30):
            kept = dense * (torch.arange(30) < width)
            expected.append((float(fvu(y, d.decode(kept, x))), float((kept > 0).sum(1).float().mean())))
    assert entries["prefix_latents"] == [3, 15, 30]
    assert entries["prefix_fvu"] == pytest.approx([each for each, _ in expected], rel=1e-5)
    assert entries["prefix_l0"] == pytest.approx([each for _, each in expected])
    assert len(set(entries["prefix_l0"])) == 3
    page = render_report(entries, [])
    assert "Nested dictionaries of Matryoshka" in page
    assert "3, 15, 30" in page


def test_other_dictionaries_have_no_such_entries():
    assert scored(SAE(7, 30, ENCODERS["topk"](k=5)), torch.randn(101, 7), torch.randn(101, 7)) == {}


def test_without_variance_the_errors_are_undefined():
    d, rows = SAE(7, 30, ENCODERS["matryoshka"](k=5)), torch.ones(101, 7)
    d.encode(rows)
    values, reasons = settled(scored(d, rows, rows))
    assert values["prefix_fvu"] is None
    assert "no variance" in reasons["prefix_fvu"]
