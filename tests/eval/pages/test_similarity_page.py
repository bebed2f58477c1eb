"""The page of the similarity of dictionaries: matrix, histograms, stitching, what is missing and why."""

import copy
import json
import shutil
import subprocess

import pytest

from sparsary.eval.pages.render import render_file
from sparsary.eval.pages.similarity import MOST_HISTOGRAMS, render_similarity

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pair(a, b, cosine=0.8125, novel: float | None = 0.125):
    row = {"a": a, "b": b, "latents_a": 10, "latents_b": 12, "matched_cosine": cosine, "random_cosine": 0.3125}
    row |= {"matched_share": 0.6, "nearest_cosine_a": 0.85, "nearest_cosine_b": 0.75, "nearest_share_a": 0.7}
    row |= {"nearest_share_b": 0.5, "matched_counts": [0] * 30 + [1] * 10, "random_counts": [0] * 26 + [10] + [0] * 13}
    row |= {"stitched": f"{b} into {a}", "active": 12, "novel_share": novel, "cosine_auroc": 0.9, "reasons": {}}
    row |= {"reconstruction_share": None if novel is None else 1 - novel, "fvu_small": 0.2, "fvu_large": 0.1}
    if novel is None:
        row |= dict.fromkeys(("stitched", "active", "cosine_auroc", "fvu_small", "fvu_large"))
        row["reasons"] = {"novel_share": "stitching needs two dictionaries of the same hooks"}
    return row


@pytest.fixture
def found():
    rows = [pair("one", "two"), pair("one", "<three>", 0.4375, None), pair("two", "<three>", 0.1875, None)]
    checkpoints = ["runs/one", "runs/two", "runs/<three>"]
    return {"similarity_version": 1, "checkpoints": checkpoints, "tokens": 500, "seed": 0, "same": 0.7, "rows": rows}


def test_the_page_has_a_matrix_histograms_and_shares(found):
    html = render_similarity(found)
    assert render_similarity(copy.deepcopy(found)) == html
    # Every cosine is on both sides of the diagonal, and in the table; the shares of novel latents are on one.
    cells = html.partition('class="matrix"')[2].partition("</table>")[0]
    assert [cells.count(f">{value}\n") + cells.count(f">{value}<") for value in ("0.812", "0.438", "0.188")] == [2, 2, 2]
    assert html.count("floor 0.31") == 6
    assert "Novel latents of the row" in html
    # A plot of stitching, and a histogram of each pair.
    assert html.count("<svg") == html.count("</svg>") == 4
    assert "two into one: 0.125 novel" in html
    assert "1 from 0.95" in html
    assert "stitching: stitching needs two dictionaries of the same hooks (2 of 3 pairs)." in html
    assert "&lt;three&gt;" in html
    assert "<three>" not in html


def test_a_chain_of_layers_has_a_table_and_no_matrix(found):
    found["rows"] = [pair(f"layer {n}", f"layer {n + 1}") for n in range(MOST_HISTOGRAMS + 3)]
    html = render_similarity(found)
    assert 'class="matrix"' not in html
    assert html.count("<svg") == MOST_HISTOGRAMS + 1
    assert "3 more pairs are in the table only." in html


def test_files_without_histograms_have_a_page(found, tmp_path):
    for row in found["rows"]:
        del row["matched_counts"], row["random_counts"]
    found["rows"][0] |= dict.fromkeys(("matched_cosine", "random_cosine", "matched_share"))
    found["rows"][0]["reasons"] = {"matched_cosine": "too many latents to match one to one: nearest ones only"}
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "report.html").write_text("")
    found["checkpoints"][0] = str(tmp_path / "one")
    path = tmp_path / "other.json"
    path.write_text(json.dumps(found | {"seed": 3}))
    html = render_file(path).read_text(encoding="utf-8")
    assert f"similarity {tmp_path / 'one'} runs/two 'runs/&lt;three&gt;' --tokens 500 --seed 3".replace("'", "&#39;") in html
    assert 'href="one/report.html"' in html
    assert html.count("<svg") == 1
    assert "matched cosines: too many latents" in html


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_draws_the_page_without_complaint(found, tmp_path):
    file = tmp_path / "similarity.html"
    file.write_text(render_similarity(found), encoding="utf-8")
    assert CHROMIUM is not None
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --enable-logging=stderr"
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The script ran: it sorts by what the URL says, and counts nothing here.
    assert done.stdout.count("<svg") == 4
