"""The page of latents in a real browser: what it shows, how it is searched, that 10^4 latents stay quick."""

import base64
import gzip
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from sparsary.eval.pages.features import CHUNK_LATENTS, render_features

EVIL = "</script><img src=x onerror=alert(1)>"
WORDS = [f" w{i}" for i in range(5000)]
ABOUT = {
    "checkpoint": "runs/<b>",
    "n_latents": 131,
    "model": "embedded",
    "hooks_in": ["transformer.h.2:out"],
    "hooks_out": ["transformer.h.2:out"],
    "text": "embedded",
    "tokens": 20_011,
    "documents": 373,
    "encoder": '{"name": "topk", "k": 5}',
}


def record(latent, rng, contexts=3, width=7):
    """A latent as ``eval.features.records`` writes it; every thirteenth is dead."""
    if latent % 13 == 12:
        nothing = dict.fromkeys(("max_activation", "mean_activation", "histogram", "logits", "explanation"))
        empty = {key: [] for key in ("top", "quantiles", "top_tokens", "co_firing", "lifted", "correlated", "nearest")}
        scores = dict.fromkeys(("predicate_f1", "example_embedding", "logit_lens"))
        reasons = {"logits": "no way to the stream", "histogram": "never fired", "scores.logit_lens": "never fired"}
        facts = {"latent": latent, "firings": 0, "density": 0.0, "dead": True}
        return facts | nothing | empty | {"scores": scores, "details": {}, "reasons": reasons}

    def word():
        return WORDS[rng.integers(len(WORDS))]

    def context():
        activations = np.where(rng.random(width) < 0.3, rng.random(width), 0)
        activations[width // 2] = 1.5
        tokens = [WORDS[i] for i in rng.integers(0, len(WORDS), width)]
        return {"tokens": tokens, "activations": activations.tolist(), "peak": width // 2, "document": 3}

    near = [{"latent": (latent + step) % 12, "jaccard": 0.5, "lift": 2.0, "correlation": 0.3, "cosine": 0.2} for step in (1, 2)]
    effects = [{"token": word(), "effect": 0.5 - i} for i in range(3)]
    return {
        "latent": latent,
        "firings": 100 + latent,
        "density": (100 + latent) / 20_011,
        "dead": False,
        "max_activation": 1.5,
        "mean_activation": 0.7,
        "histogram": {"edges": [0.5, 0.7, 1.0, 1.4, 2.0], "counts": [5, 0, 30, 9]},
        "top": [context() for _ in range(contexts)],
        "quantiles": [{"low": 1.5, "high": 1.5, "contexts": [context() for _ in range(contexts)]}],
        "top_tokens": [{"token": f" own{latent}", "share": 0.6}, {"token": EVIL, "share": 0.2}],
        **dict.fromkeys(("co_firing", "lifted", "correlated", "nearest"), near),
        "logits": {"promoted": effects, "suppressed": effects[::-1]},
        "scores": {"predicate_f1": (latent * 37 % 131) / 131, "example_embedding": 0.7, "logit_lens": None},
        "details": {"predicate_f1": {"predicate": f"token ' own{latent}'", "chance": 0.1, "threshold": 0.25}},
        "explanation": None,
        "reasons": {"explanation": "no explainer was asked", "scores.logit_lens": "too few"},
    }


def records(count, **sizes):
    rng = np.random.default_rng(9)
    return (record(latent, rng, **sizes) for latent in range(count))


@pytest.fixture(scope="module")
def html():
    return render_features(ABOUT, records(131))


def unpacked(html, key):
    text = re.search(rf'id="{key}">([^<]*)</script>', html).group(1)
    return json.loads(gzip.decompress(base64.b64decode(json.loads(text))))


def test_every_latent_is_in_its_chunk(html):
    words, index = unpacked(html, "words"), unpacked(html, "index")
    assert len(index["density"]) == 131
    assert words[index["top"][79][0]] == " own79"
    chunks = [unpacked(html, f"chunk-{number}") for number in range(3)]
    assert [len(chunk) for chunk in chunks] == [CHUNK_LATENTS, CHUNK_LATENTS, 131 - 2 * CHUNK_LATENTS]
    original = [*records(131)][70]
    ids, shades, peak, document = chunks[1][70 - CHUNK_LATENTS]["top"][2]
    assert [words[i] for i in ids] == original["top"][2]["tokens"]
    assert (peak, document) == (3, 3)
    shown = dict(zip(shades[::2], shades[1::2], strict=True))
    for place, value in enumerate(original["top"][2]["activations"]):
        assert shown.get(place, 0) == pytest.approx(1000 * value / 1.5, abs=1)


def test_nothing_is_fetched_and_no_token_becomes_html(html):
    assert EVIL not in html
    assert "runs/<b>" not in html
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert render_features(ABOUT, records(131)) == html


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def browse(directory, html, *arguments, fragment="", steps=""):
    """The document after ``steps`` of JavaScript, and what the browser's console said."""
    command = command_for(directory, html, "--virtual-time-budget=4000", *arguments, fragment=fragment, steps=steps)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def command_for(directory, html, *arguments, fragment, steps):
    """Write the page, with ``steps`` to be taken once it is ready, and how a browser is started on it."""
    if steps:
        # A second script, which the page's own policy would not let run.
        html = re.sub(r"<meta http-equiv.*?>", "", html)
        html = html.replace("</body>", f"<script>{WAIT}(async () => {{ await ready(); {steps} }})();</script></body>")
    file = directory / "features.html"
    file.write_text(html, encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
    profile = f"--user-data-dir={directory / 'profile'}"
    return [CHROMIUM, *quiet.split(), *more.split(), profile, *arguments, file.as_uri() + fragment]


WAIT = """
const until = async test => { while (!test()) await new Promise(done => setTimeout(done, 5)); };
const ready = () => until(() => document.body.dataset.ready);
const shown = i => until(() => document.body.dataset.shown === String(i));
const say = text => { document.title = text; document.body.dataset.said = 'yes'; };
"""


def said(dom):
    return json.loads(re.search(r"<title>(.*?)</title>", dom).group(1).replace("&lt;", "<").replace("&gt;", ">"))


@needs_browser
def test_the_browser_shows_the_latent_of_the_address(tmp_path, html):
    dom, console = browse(tmp_path, html, "--dump-dom", fragment="#70")
    assert console == []
    assert 'data-shown="70"' in dom
    assert "latent 70" in dom
    assert dom.count('<tr data-latent="') == 40
    assert "121 of 131 latents" in dom
    assert "chance 0.1" in dom
    assert "too few" in dom
    # Tokens are text: nothing that one holds has become an element.
    assert "<img" not in dom
    assert dom.count('class="bar"') == 4
    assert dom.count('class="peak"') == 6


@needs_browser
def test_roles_of_a_chat_and_tokens_outside_the_mask_are_seen(tmp_path):
    one = record(0, np.random.default_rng(9))
    one["quantiles"] = []
    for context in one["top"]:
        context |= {"left_out": [0, 1, 2], "roles": [["user", 2], ["template", 1], ["assistant", 4]]}
    about = ABOUT | {"n_latents": 1, "left_out": "roles other than assistant", "chat_template": "{{ messages }}"}
    dom, console = browse(tmp_path, render_features(about, [one]), "--dump-dom", fragment="#0")
    assert console == []
    # What is grey is told at the top, and below the contexts.
    assert "<dt>left out</dt><dd>roles other than assistant</dd>" in dom
    assert "leave them out (roles other than assistant)" in dom
    for line in re.findall(r'<p title="document 3">(.*?)</p>', dom):
        spans = re.findall(r"<span([^>]*)>([^<]*)</span>", line)
        assert [(text, place) for place, (kind, text) in enumerate(spans) if 'class="role"' in kind] == [
            ("user", 0),
            ("assistant", 4),
        ]
        tokens = [kind for kind, _ in spans if 'class="role"' not in kind]
        assert [i for i, kind in enumerate(tokens) if "outside" in kind] == [0, 1, 2]
        assert all('title="user \u00b7 ' in kind and "left out of training" in kind for kind in tokens[:2])
        assert 'title="template \u00b7 ' in tokens[2]
        assert all('title="assistant' in kind and "left out" not in kind for kind in tokens[3:])
    assert dom.count('class="role"') == 6


@needs_browser
def test_searching_sorting_and_turning_pages(tmp_path, html):
    steps = """
    const rows = () => [...document.querySelectorAll('#rows tr')].map(row => +row.dataset.latent);
    const found = {};
    const type = async text => { $('search').value = text; $('search').oninput(); await new Promise(d => setTimeout(d, 90)); };
    $('on').click(); found.second = rows()[0];
    await type('own79'); found.word = rows();
    await type('66'); found.number = rows().includes(66);
    await type('nowhere'); found.nothing = rows();
    await type('f1>0.99 token'); found.limit = rows();
    await type(''); $('sort').value = '-predicate_f1'; $('sort').onchange(); found.best = rows().slice(0, 3);
    $('sort').value = 'density'; $('sort').onchange(); found.rare = rows().slice(0, 3);
    $('dead').checked = true; $('dead').onchange(); found.dead = rows().slice(0, 2);
    $('sort').value = '-predicate_f1'; $('sort').onchange(); found.nulls = rows().slice(0, 3);
    $('sort').value = 'density'; $('sort').onchange();
    document.querySelectorAll('#rows tr')[0].click(); await shown(12);
    found.clicked = $('detail').textContent.includes('It never fired.');
    location.hash = '#3'; await shown(3); found.followed = $('detail').textContent.includes('latent 3');
    say(JSON.stringify(found));
    """
    dom, console = browse(tmp_path, html, "--dump-dom", steps=steps)
    assert console == []
    alive = [i for i in range(131) if i % 13 != 12]
    best = sorted(alive, key=lambda i: -(i * 37 % 131))[:3]
    assert said(dom) == {
        "second": alive[40],
        "word": [79],
        "number": True,
        "nothing": [],
        "limit": [i for i in alive if i * 37 % 131 > 0.99 * 131],
        "best": best,
        "rare": [0, 1, 2],
        "dead": [12, 25],
        "nulls": best,
        "clicked": True,
        "followed": True,
    }


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(tmp_path, html, scheme):
    steps = "say(JSON.stringify([innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).color]))"
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    dom, _ = browse(tmp_path, html, "--dump-dom", "--window-size=420,900", preferred, steps=steps)
    window, needed, ink = said(dom)
    assert needed <= window <= 500
    assert ink == {"light": "rgb(31, 41, 55)", "dark": "rgb(229, 231, 235)"}[scheme]


@needs_browser
def test_opening_a_latent_unpacks_its_chunk_alone(tmp_path):
    """So that ten thousand latents open as fast as ten: what is not looked at stays compressed."""
    html = render_features(ABOUT | {"n_latents": 1216}, records(1216, contexts=1))
    steps = """
    const sizes = [cache.size];
    for (const i of [1215, 1214, 700]) { location.hash = '#' + i; await shown(i); sizes.push(cache.size); }
    for (let i = 0; i < 1216; i += 64) { location.hash = '#' + i; await shown(i); }
    say(JSON.stringify([...sizes, cache.size <= CACHED + 1]));
    """
    dom, console = browse(tmp_path, html, "--dump-dom", steps=steps)
    assert console == []
    assert said(dom) == [1, 2, 2, 3, True]
    assert len(html) < 2000 * 1216
