"""All latents as one self-contained page: a list to search and sort, and what is known of the latent one looks at.

Nothing is fetched and the page opens from a file. What is said of latents lies in the page, some latents to a chunk,
compressed; a chunk is read when one of its latents is looked at, so that 10^4 of them open as fast as ten.
"""

import base64
import gzip
import json
from collections.abc import Iterable
from html import escape
from typing import Any

from ..features.records import FeatureRecord
from .document import document, encoder_parts
from .features_script import SCRIPT
from .numbers import UNRECORDED, show

CHUNK_LATENTS = 64
# Shades are told apart no finer, and the page is a third smaller.
SHADES = 1000
INDEX_TOKENS = 5
SCORES = {
    "predicate_f1": "F1 of the simple predicate that describes best where the latent fires, on documents it was not chosen on; "
    "beside it the F1 of a latent that fires as often but anywhere.",
    "example_embedding": "AUROC of telling contexts it fires in from others by their words (TF-IDF). 0.5 is chance.",
    "logit_lens": "AUROC of its direct effect on the logit of the token that comes next: where it fires against where it does "
    "not. 0.5 is chance.",
}


def render_features(about: dict[str, Any], records: Iterable[FeatureRecord]) -> str:
    """One page of all ``records``, which are read once. Equal input gives equal bytes."""
    words = _Words()
    index: dict[str, list[Any]] = {
        key: [] for key in ("density", "max", "predicate", "top", "promoted", "explanation", *SCORES)
    }
    chunks: list[str] = []
    pending: list[Any] = []
    for record in records:
        _enter(index, record, words)
        pending.append(_compact(record, words))
        if len(pending) == CHUNK_LATENTS:
            chunks.append(_packed(pending))
            pending = []
    if pending:
        chunks.append(_packed(pending))
    data = {"index": _packed(index), "words": _packed(list(words.numbers))} | {
        f"chunk-{number}": chunk for number, chunk in enumerate(chunks)
    }
    name, arguments = encoder_parts(about.get("encoder"))
    hooks = " → ".join(dict.fromkeys([", ".join(about.get("hooks_in") or ()), ", ".join(about.get("hooks_out") or ())]))
    facts = {
        "model": about.get("model"),
        "hook": hooks or None,
        "text": about.get("text"),
        "read": f"{show(about.get('tokens'))} held-out tokens of {show(about.get('documents'))} documents",
        "encoder": f"{name} {arguments}".strip(),
        "checkpoint": about.get("checkpoint"),
    }
    body = BODY.format(
        heading=escape(f"{show(about.get('n_latents'))} latents"),
        facts="".join(f"<div><dt>{key}</dt><dd>{escape(show(value, UNRECORDED))}</dd></div>" for key, value in facts.items()),
        sorts="".join(f'<option value="{key}">{key.replace("_", " ")}</option>' for key in SCORES),
        notes="".join(f"<p><b>{key.replace('_', ' ')}</b>: {escape(note)}</p>" for key, note in SCORES.items()),
        gapped="" if words.spaced else " gapped",
        chunk=CHUNK_LATENTS,
        data="\n".join(f'<script type="text/plain" id="{key}">{value}</script>' for key, value in data.items()),
    )
    return document(f"sparsary features · {about.get('checkpoint') or 'dictionary'}", body, CSS, script=SCRIPT)


class _Words:
    """Token texts by number, in the order in which they came."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, word: str) -> int:
        return self.numbers.setdefault(word, len(self.numbers))

    @property
    def spaced(self) -> bool:
        """Whether tokens bring their spaces along."""
        return any(word[:1].isspace() for word in self.numbers)


def _enter(index: dict[str, list[Any]], record: FeatureRecord, words: _Words) -> None:
    index["density"].append(record["density"])
    index["max"].append(record["max_activation"])
    index["predicate"].append((record["details"].get("predicate_f1") or {}).get("predicate"))
    index["top"].append([words(entry["token"]) for entry in record["top_tokens"][:INDEX_TOKENS]])
    promoted = record["logits"]["promoted"] if record["logits"] else []
    index["promoted"].append([words(entry["token"]) for entry in promoted[:INDEX_TOKENS]])
    index["explanation"].append((record["explanation"] or {}).get("text"))
    for name in SCORES:
        index[name].append(record["scores"][name])


def _compact(record: FeatureRecord, words: _Words) -> dict[str, Any]:
    """What only the latent's own view needs, token texts as numbers and activations in thousandths of the maximum."""
    top = record["max_activation"] or 1.0

    def context(example: dict[str, Any]) -> list[Any]:
        shades: list[int] = []
        for place, value in enumerate(example["activations"]):
            if value > 0:
                shades += [place, max(1, round(SHADES * min(1.0, value / top)))]
        return [[words(token) for token in example["tokens"]], shades, example["peak"], example["document"]]

    logits = record["logits"]
    return {
        "firings": record["firings"],
        "mean": record["mean_activation"],
        "histogram": record["histogram"] and [record["histogram"]["edges"], record["histogram"]["counts"]],
        "top": [context(example) for example in record["top"]],
        "quantiles": [[q["low"], q["high"], [context(example) for example in q["contexts"]]] for q in record["quantiles"]],
        "tokens": [[words(entry["token"]), entry["share"]] for entry in record["top_tokens"]],
        "logits": logits and [[[words(e["token"]), e["effect"]] for e in logits[side]] for side in ("promoted", "suppressed")],
        "near": {
            title: [[entry["latent"], entry[measure]] for entry in record[key]]
            for title, key, measure in (
                ("fire together (Jaccard)", "co_firing", "jaccard"),
                ("fire together (lift)", "lifted", "lift"),
                ("correlated", "correlated", "correlation"),
                ("atoms alike (cosine)", "nearest", "cosine"),
            )
        },
        "details": record["details"],
        "explanation": record["explanation"],
        "reasons": record["reasons"],
    }


def _packed(value: Any) -> str:
    """JSON, compressed, as base64. Without a time in it, so that equal input gives equal bytes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


BODY = """<header>
<p class="over">sparsary features</p>
<h1>{heading}</h1>
<dl>{facts}</dl>
</header>
<div class="columns">
<section class="entries list" aria-label="Latents">
<div class="controls">
<input id="search" type="search" placeholder="token, predicate or latent" aria-label="Search">
<select id="sort" aria-label="Sort by">
<option value="latent">latent</option><option value="-density">density, high first</option>
<option value="density">density, low first</option><option value="max">max activation</option>{sorts}
</select>
<label><input id="dead" type="checkbox"> dead ones too</label>
</div>
<p class="note" id="count" role="status"></p>
<table><thead><tr><th scope="col">latent</th><th scope="col">fires on</th><th scope="col">density</th>
<th scope="col" title="predicate F1">F1</th></tr></thead><tbody id="rows"></tbody></table>
<div class="pager"><button id="back" type="button">← page</button><span id="page"></span>
<button id="on" type="button">page →</button></div>
</section>
<section class="detail{gapped}" id="detail" data-chunk="{chunk}" aria-label="One latent" aria-live="polite"></section>
</div>
<footer>
{notes}
<p>Contexts are shaded by activation, as a share of the latent's maximum; hover for the number. A latent's strongest contexts
flatter it: the slices below them are drawn from all contexts it fires in.</p>
</footer>
<noscript><p>This page needs JavaScript to unpack its contents; nothing is fetched.</p></noscript>
{data}
"""

CSS = """
main{max-width:1500px}
.columns{display:grid;grid-template-columns:minmax(0,430px) minmax(0,1fr);gap:16px;align-items:start}
.list{margin:0;position:sticky;top:12px;max-height:calc(100vh - 24px);overflow:auto}
.controls{display:flex;flex-wrap:wrap;gap:8px;align-items:center;font-size:13.5px} .controls input[type=search]{flex:1 1 150px}
input[type=search],select,button{font:inherit;font-size:13.5px;color:var(--ink);background:var(--page);
border:1px solid var(--rule);border-radius:6px;padding:5px 9px} button{cursor:pointer}
button:disabled{opacity:.4;cursor:default}
:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
#count{margin:8px 0 4px}
.list table{table-layout:fixed} .list th,.list td{padding:4px 8px 4px 0;color:var(--ink)}
.list th+td,.list td{width:auto} .list thead th{color:var(--muted);font-size:12.5px;border:0}
.list th:nth-child(1){width:58px} .list th:nth-child(3){width:74px} .list th:nth-child(4){width:56px}
.list th:nth-child(n+3),.list td:nth-child(n+3){text-align:right;font-variant-numeric:tabular-nums}
.list tbody tr{cursor:pointer} .list tbody tr:hover,.list tr[aria-current]{background:var(--soft)}
.list td a{color:inherit;text-decoration:none;font-weight:600} .list td .note{display:block;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap}
.pager{display:flex;justify-content:space-between;align-items:center;margin-top:10px;font-size:13.5px}
.detail{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr))}
.detail>*{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px;min-width:0}
.detail .head,.detail .wide{grid-column:1/-1} .head h2{font-size:22px;margin:0}
.head .row{display:flex;justify-content:space-between;
align-items:center;gap:8px} .head .figures{display:flex;flex-wrap:wrap;gap:6px 26px;margin:10px 0 0}
.head .figures div{min-width:90px} .head .figures b{font-size:18px;font-weight:600;font-variant-numeric:tabular-nums}
.head .said{margin:10px 0 0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:14px} .four{grid-template-columns:repeat(auto-fit,minmax(130px,1fr))}
.pair h3{font-size:12.5px;color:var(--muted);margin:0 0 4px;font-weight:400}
.detail ol{list-style:none;margin:0;padding:0;font-size:13.5px}
.detail ol li{display:flex;justify-content:space-between;gap:8px}
.detail ol li>:first-child{min-width:0}
.detail ol span:last-child{color:var(--muted);font-variant-numeric:tabular-nums} .detail ol a{color:var(--accent)}
.token{white-space:pre;max-width:100%;overflow:hidden;text-overflow:ellipsis;background:var(--page);border-radius:3px;
padding:0 3px}
.contexts p{margin:0;padding:6px 0;border-top:1px solid var(--rule);font-size:13.5px;line-height:1.6;overflow-wrap:break-word}
.contexts span{white-space:pre-wrap;border-radius:3px;padding:1px 0}
.contexts .peak{font-weight:600;text-decoration:underline;text-underline-offset:3px}
.contexts h3{font-size:12.5px;color:var(--muted);margin:14px 0 4px;font-weight:400} .contexts h2+h3{margin-top:0}
.bar{fill:var(--accent)} .axis{stroke:var(--muted)} .detail svg text{fill:var(--muted);font-size:11px}
@media (max-width:900px){.columns{grid-template-columns:minmax(0,1fr)} .list{position:static;max-height:60vh}}
@media (max-width:700px){.list tr{display:table-row;padding:0} .list table{display:table}
.list th+td{text-align:left;padding-left:0}
.list td:nth-child(3){text-align:right} .list td,.list th{padding:4px 8px 4px 0;border-top:1px solid var(--rule)}}
"""
