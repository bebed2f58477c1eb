"""The report's page: whole, self-contained, safe, and drawn by a real browser where there is one."""

import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from markupsafe import escape
from matplotlib.image import imread

from sparsary.eval.metrics.glossary import report_markdown
from sparsary.eval.pages.report import EXPLANATIONS, KEY_FIGURES, PLOTS, render_report

N_LATENTS, TOKENS = 1021, 20_011
L0_COUNTS = [0] * 11 + [round(900 * math.exp(-(((l0 - 37) / 13) ** 2))) for l0 in range(11, 83)]
REPORT = {
    "report_version": 1,
    "checkpoint": "runs/quickstart",
    "kind": "sae",
    "encoder": '{"name": "mutual_choice", "budget": 37}',
    "selection": "per token",
    "d_in": 127,
    "d_out": 127,
    "n_latents": N_LATENTS,
    "hook": "transformer.h.2:out",
    "model": "embedded",
    "text": "embedded",
    "training_tokens": 3_000_320,
    "git_commit": "301f96c4d2aa5b6c7d8e9f001122334455667788",
    "documents": 373,
    "tokens": TOKENS,
    "fvu": 0.18524672,
    "cosine": 0.91654627,
    "l2_ratio": 0.96216153,
    "relative_reconstruction_bias": 1.05973514,
    "l0_mean": 37.02,
    "l0_p10": 25.0,
    "l0_median": 37.0,
    "l0_p90": 49.0,
    "l0_histogram_counts": L0_COUNTS,
    "l0_histogram_edges": list(range(len(L0_COUNTS) + 1)),
    "dead_fraction": 41 / N_LATENTS,
    "dead_window_tokens": TOKENS,
    "dense_fraction": 3 / N_LATENTS,
    "density_histogram_log10_edges": [-7 + quarter / 4 for quarter in range(29)],
    "density_histogram_counts": [0] * 14 + [1, 2, 14, 28, 102, 205, 307, 250, 66, 2, 2, 0, 1, 0],
    "downstream_tokens": 19_433,
    "ce_clean": 1.64143892,
    "ce_spliced": 1.72089622,
    "ce_zero": 8.67740454,
    "ce_mean": 7.93749395,
    "kl_spliced": 0.07671850,
    "kl_zero": 7.06896413,
    "kl_mean": 6.30459943,
    "ce_increase": 0.07945729,
    "top1_agreement": 0.84737050,
    "ce_recovered_zero": 0.98870698,
    "kl_recovered_zero": 0.98914713,
    "ce_recovered_mean": 0.98737982,
    "kl_recovered_mean": 0.98783134,
    "fvu_total": 0.18524672,
    "fvu_nonlinear": 0.14043773,
    "linear_error_share": 0.24188817,
    "fvu_rescaled": 0.18184928,
    "err_vec_r2_mean_dim": 0.23689281,
    "err_norm_r2": 0.66576689,
    "dark_matter_noise_floor": -0.00621447,
    "dark_matter_fit_tokens": 20_758,
    "dark_matter_score_tokens": TOKENS,
    "dark_matter_enough_tokens": True,
}
CURVE = [
    {"step": step, "tokens": step * 2048, "fvu": 0.17 + 60 * math.exp(-step / 11), "dead": 0.04 * math.exp(-step / 300)}
    for step in range(10, 1470, 10)
]
SCALARS = [key for key, value in REPORT.items() if not isinstance(value, list)]
FROM_MODEL = ("ce_", "kl_", "downstream_", "top1_")
WITHOUT_MODEL = {
    key: value for key, value in REPORT.items() if not key.startswith(FROM_MODEL) and key not in ("documents", "model", "text")
}
UNDEFINED = dict.fromkeys(REPORT)


class Page(HTMLParser):
    """What the tests look at: tables as rows of cells, tiles, plots with their words, and all attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.tiles: dict[str, str] = {}
        self.plots: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.tile, self.target = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag == "svg":
            assert values["role"] == "img"
            self.plots.append(values["aria-label"])
        self.tile = values.get("data-key", self.tile)
        self.target = "cell" if tag in ("th", "td", "code") else "tile" if values.get("class", "").startswith("value") else ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.target == "cell":
            self.rows[-1][-1] += data
        elif self.target == "tile":
            self.tiles[self.tile] = self.tiles.get(self.tile, "") + data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "div"):
            self.target = ""

    def entry(self, key: str) -> list[str]:
        (row,) = [row for row in self.rows if row[0] == key]
        return row


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(REPORT, CURVE)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.mark.parametrize("key", SCALARS)
def test_every_scalar_has_a_row_with_value_and_explanation(page: Page, key: str):
    _, value, explanation = page.entry(key)
    shown = REPORT[key]
    if isinstance(shown, float):
        assert float(value) == pytest.approx(shown, rel=1e-5)
    elif not isinstance(shown, bool) and isinstance(shown, int):
        assert int(value.replace(",", "")) == shown
    elif key == "encoder":
        assert value == "mutual_choice, budget = 37"
    else:
        assert value == ("yes" if shown is True else shown)
    assert explanation in [text for entries in EXPLANATIONS.values() for text in entries.values()]


def test_every_key_of_the_report_is_explained():
    # The report above is an older one, of fewer groups; what a new one holds is seen in test_suite.
    assert set(REPORT) <= {key for entries in EXPLANATIONS.values() for key in entries}


def test_the_documented_schema_is_that_of_the_page():
    # If not: python -c "from sparsary.eval.metrics.glossary import report_markdown as m; print(m(), end='')" > docs/report.md
    assert (Path(__file__).parents[3] / "docs" / "report.md").read_text(encoding="utf-8") == report_markdown()


def test_a_transcoder_s_report_names_both_hooks_and_the_affine_floor():
    hook = "transformer.h.2.mlp:in -> transformer.h.2.mlp:out"
    page = Page(render_report(REPORT | {"kind": "transcoder", "d_out": 131, "hook": hook, "fvu_affine": 0.31724}, CURVE))
    assert page.entry("fvu_affine")[1] == "0.31724"
    assert "No explanation" not in page.text
    assert "0.3172 for an affine map" in page.text
    assert hook in page.text
    assert "127 \u2192 1,021 latents \u2192 131" in page.text


def test_header_names_the_run(page: Page):
    for words in (
        "mutual_choice SAE",
        "127 \u2192 1,021 latents",
        "budget = 37",
        "301f96c4d2aa",
        "20,011 tokens, 373 documents",
    ):
        assert words in page.text


def test_key_figures(page: Page):
    expected = {key: f"{REPORT[key]:.4g}" for _, key, _ in KEY_FIGURES}
    assert page.tiles == expected
    assert page.tiles["fvu"] == "0.1852"


def test_plots_say_their_figures_in_words(page: Page):
    curve, dead, error, density, l0, downstream = page.plots
    assert "Held-out: 0.1852" in curve
    assert "at 20,480 tokens" in dead
    assert "explained 0.8148, linear error 0.04481, nonlinear error 0.1404" in error
    assert "980 latents fire" in density
    assert "dead: 41" in density
    assert "tokens: 3." in density
    assert "median 37, 10\u201390%: 25\u201349" in l0
    assert "clean 1.641, spliced 1.721, mean-ablated 7.937, zero-ablated 8.677" in downstream


def test_unknown_entries_are_shown_and_lists_are_not():
    page = Page(render_report({"novel_figure": 0.5, "novel_list": [1, 2]}, []))
    assert page.entry("novel_figure")[1] == "0.5"
    assert "novel_list" not in page.text


def test_nothing_external_is_referenced(html: str, page: Page):
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith("#"), f"{tag} {name}={value}"
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)\)", html))
    assert not re.search(r"@import|@font-face|<script|<link|<iframe|<img", html)
    assert len(html.encode()) < 400_000


def test_ids_are_unique_and_every_reference_meets_one(html: str, page: Page):
    assert len(set(page.ids)) == len(page.ids)
    references = re.findall(r"url\(#([^)]*)\)", html) + re.findall(r'href="#([^"]*)"', html)
    assert references
    assert set(references) <= set(page.ids)


def test_colours_follow_the_colour_scheme(html: str):
    # Whatever colour stayed in a plot would be drawn the same on a dark page.
    plots = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--accent)" in plots
    assert not re.findall(r"(?:fill|stroke): #\w+", plots)


def test_report_without_model_reads_not_measured():
    page = Page(render_report(WITHOUT_MODEL, []))
    assert page.tiles["kl_spliced"] == page.tiles["ce_recovered_mean"] == "not measured"
    assert page.tiles["fvu"] == "0.1852"
    assert len(page.plots) == len(PLOTS) - 3
    assert ["not measured"] in page.rows


def test_none_reads_undefined_and_missing_provenance_not_recorded():
    page = Page(render_report(UNDEFINED, [{"tokens": None, "fvu": None, "dead": None}]))
    assert set(page.tiles.values()) == {"undefined"}
    assert page.entry("ce_recovered_zero")[1] == "undefined"
    assert page.entry("git_commit")[1] == "not recorded"
    assert page.plots == []


@pytest.mark.parametrize(
    ("keys", "lost"),
    [
        ("n_latents l0_mean ce_clean fvu", 0),
        ("dead_fraction l0_mean l0_median l0_p10 l0_p90 ce_clean ce_zero ce_mean", 0),
        ("density_histogram_log10_edges l0_histogram_counts fvu_nonlinear", 3),
    ],
)
def test_some_entries_may_be_none(keys: str, lost: int):
    page = Page(render_report(REPORT | dict.fromkeys(keys.split()), CURVE[:3]))
    assert len(page.plots) == len(PLOTS) - lost
    assert "None" not in page.text + "".join(page.plots)


@pytest.mark.parametrize(
    ("title", "changes", "words"),
    [
        (
            "Latents per token",
            {"l0_histogram_counts": [0] * 16 + [TOKENS]},
            "Exactly 16 latents fire on every one of 20,011 tokens.",
        ),
        ("Latents per token", {"l0_histogram_counts": [TOKENS]}, "Exactly 0 latents"),
        ("Latents per token", {"l0_histogram_counts": [5, *[0] * 3000, 2]}, "at most 3001."),
        ("Firing density", {"density_histogram_counts": [0] * 28, "dead_fraction": 1.0}, "0 latents fire; dead: 1,021"),
        ("Where the variance goes", {"fvu_total": 1.7, "fvu_nonlinear": 1.9}, "linear error -0.2"),
        ("Where the variance goes", {"dark_matter_enough_tokens": False}, "too few tokens"),
        ("Where the variance goes", {"fvu_total": 0.0, "fvu_nonlinear": 0.0, "linear_error_share": None}, "error: undefined"),
        ("Cost to the model", {"ce_zero": math.inf}, "mean-ablated 7.937."),
        ("Cost to the model", {"ce_clean": 0.0, "ce_spliced": 0.0, "ce_mean": 0.0, "ce_zero": 0.0}, "zero-ablated 0."),
    ],
)
def test_unusual_reports_are_drawn(monkeypatch: pytest.MonkeyPatch, title: str, changes: dict, words: str):
    monkeypatch.setattr("sparsary.eval.pages.report.PLOTS", [plot for plot in PLOTS if plot[0] == title])
    (plot,) = Page(render_report(REPORT | changes, [])).plots
    assert words in plot


@pytest.mark.parametrize(
    "rows", [[], [{}], [{"tokens": 0, "fvu": 1.0, "dead": 0.0}], [{"tokens": 7, "fvu": math.nan, "dead": 1.0}]]
)
def test_short_and_broken_curves_are_drawn(monkeypatch: pytest.MonkeyPatch, rows: list[dict]):
    monkeypatch.setattr("sparsary.eval.pages.report.PLOTS", PLOTS[:2])
    drawn = [row for row in rows for key in ("fvu", "dead") if math.isfinite(row.get(key, math.nan))]
    assert len(Page(render_report(REPORT, rows)).plots) == len(drawn)


def test_long_curve_makes_no_large_page(html: str):
    rows = [{"tokens": step * 4096, "fvu": 0.1 + (step % 7) / 100, "dead": 0.1} for step in range(30_000)]
    assert len(render_report({}, rows)) < 100_000


def test_text_is_escaped():
    attack = '<script>alert(1)</script>"onload="x'
    texts = dict.fromkeys(("kind", "encoder", "hook", "model", "text", "git_commit", "checkpoint"), attack)
    html = render_report(REPORT | texts | {attack: attack}, [])
    assert "<script" not in html
    assert '"onload=' not in html
    assert str(escape(attack)) in html
    assert "onload" not in {name for _, name, _ in Page(html).attributes}


def test_braces_and_at_signs_in_text_survive():
    assert Page(render_report({"hook": '{facts} "@" \\1'}, [])).entry("hook")[1] == '{facts} "@" \\1'


def test_equal_input_gives_equal_bytes_whatever_matplotlib_is_set_to(html: str):
    with matplotlib.rc_context({"svg.fonttype": "path", "axes.grid": True, "figure.dpi": 31, "lines.color": "red"}):
        assert render_report(REPORT, CURVE) == html


def test_matplotlib_is_left_as_it_was():
    def state() -> dict:
        # Reading the backend would choose one, and import pyplot.
        settings = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
        return settings | {"pyplot": "matplotlib.pyplot" in sys.modules}

    with matplotlib.rc_context({"lines.linewidth": 7.5}):
        before = state()
        render_report({"l0_histogram_counts": [1, 2]}, [])
        assert state() == before


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def browse(directory: Path, html: str, *arguments: str) -> tuple[str, list[str]]:
    """The document as the browser understood it, and what its console said."""
    file = directory / "report.html"
    file.write_text(html, encoding="utf-8")
    assert CHROMIUM is not None
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=2000"
    command = [CHROMIUM, *quiet.split(), *more.split(), f"--user-data-dir={directory / 'profile'}", *arguments, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_browser_understands_the_page(tmp_path: Path, html: str, page: Page):
    dom, console = browse(tmp_path, html, "--dump-dom")
    assert console == []
    seen = Page(dom)
    assert seen.tiles == page.tiles
    assert seen.plots == page.plots
    assert seen.rows == page.rows
    assert dom.count("<svg") == dom.count("</svg>") == len(PLOTS)


@needs_browser
def test_browser_blocks_what_a_page_must_not_fetch(tmp_path: Path, html: str):
    _, console = browse(tmp_path, html.replace("<header>", '<header><img src="other.png">'), "--dump-dom")
    assert any("Content Security Policy" in line for line in console)


@needs_browser
def test_phone_needs_no_sideways_scrolling(tmp_path: Path, html: str):
    measure = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join()</script></body>"
    probe = re.sub(r"<meta http-equiv.*?>", "", html).replace("</body>", measure)
    dom, _ = browse(tmp_path, probe, "--dump-dom", "--window-size=420,900")
    title = re.search(r"<title>(\d+),(\d+)</title>", dom)
    assert title is not None
    window, needed = map(int, title.groups())
    assert window <= 500
    assert needed <= window


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_screenshot_shows_plots_on_the_scheme_s_background(tmp_path: Path, html: str, width: int, scheme: str):
    picture = tmp_path / "page.png"
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    browse(tmp_path, html, preferred, f"--window-size={width},1400", f"--screenshot={picture}")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width
    assert (pixels[0, 0].mean() > 0.5) == (scheme == "light")
    # The blue of curve and bars: (47, 111, 222) in light mode, (110, 163, 247) in dark mode.
    blue = np.array([47, 111, 222] if scheme == "light" else [110, 163, 247]) / 255
    assert (np.abs(pixels - blue).max(axis=-1) < 0.02).sum() > 500
    assert pixels.std() > 0.05
