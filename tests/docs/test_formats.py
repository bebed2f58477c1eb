"""docs/formats.md says what the code does: which formats there are, and what becomes of every family in each."""

import re
from pathlib import Path

import pytest
import torch

from sparsary.sae import ENCODERS, SAE
from sparsary.sae.formats import FORMATS, read_dictionary, write_dictionaries, write_dictionary
from sparsary.transcoders import Transcoder

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
WRITTEN = ("saelens", "sparsify", "dictionary_learning", "circuit_tracer")
# What has a threshold in eval mode in place of the rest of its batch.
BATCH_WIDE = ("mutual_choice", "feature_choice", "batch_topk", "matryoshka")


def table(heading):
    """The rows of the first table below a heading, by their first cell."""
    text = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_page_has_every_format():
    rows = table("Formats")
    assert rows.keys() == FORMATS.keys()
    for name, row in rows.items():
        assert row[0] in ("read", "read, written"), name
        assert (row[0] == "read, written") == (name in WRITTEN)
        assert row[1].startswith(FORMATS[name].title.removeprefix("the ")[:6]) or FORMATS[name].title in row[1], name


def made(family, arguments, kind):
    encoder = ENCODERS[family](**arguments)
    d = SAE(7, 18, encoder) if kind == "sae" else Transcoder(7, 7, 18, encoder)
    for _ in range(3):
        d.encode(torch.randn(13, 7), torch.randn(13, 7))
    if hasattr(encoder, "started"):
        encoder.started.fill_(1)
    return d.eval()


def outcome(family, arguments, name, folder):
    """What writing does: a word as the page has it."""
    kind = "transcoder" if name == "circuit_tracer" else "sae"
    if kind == "transcoder" and ENCODERS[family].for_saes:
        return "refused"
    d = made(family, arguments, kind)
    hook = ("transformer.h.0.mlp:in", "transformer.h.0.mlp:out") if kind == "transcoder" else ("transformer.h.0:out",) * 2
    about = {"model": {"id": "openai-community/gpt2"}, "hooks_in": [hook[0]], "hooks_out": [hook[1]]}
    about |= {"hook": hook[0]} if kind == "sae" else {}
    try:
        if kind == "sae":
            write_dictionary(d, folder, name, about)
        else:
            write_dictionaries({hook[1]: d}, folder, name, {hook[1]: about})
    except ValueError:
        return "refused"
    x = torch.randn(11, 7)
    found = read_dictionary(folder, name)
    torch.testing.assert_close(next(iter(found.dictionaries.values()))(x), d(x), rtol=1e-4, atol=1e-5)
    return "threshold" if family in BATCH_WIDE else "exact"


@pytest.mark.parametrize("family", ENCODERS)
def test_the_page_says_what_becomes_of_every_family(family, encoder_arguments, tmp_path):
    said = dict(zip(WRITTEN, table("What is written")[family], strict=True))
    found = {name: outcome(family, encoder_arguments[family], name, tmp_path / name) for name in WRITTEN}
    assert {name: re.split(r"[ ,:]", word)[0] for name, word in said.items()} == found
