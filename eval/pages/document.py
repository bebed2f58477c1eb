"""The HTML document around every page."""

import base64
import hashlib
import json
from html import escape
from typing import Any

from .plots import PALETTE, Palette


def document(title: str, body: str, css: str = "", palette: Palette = PALETTE, script: str = "") -> str:
    """A whole page in this project's style. ``body`` is HTML; ``css`` comes after the common rules.

    The page runs ``script``, if any, and no other: the policy names its hash.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return DOCUMENT.format(
        title=escape(title),
        style=_variables(palette) + CSS + css,
        body=body,
        policy=f"; script-src 'sha256-{digest}'" if script else "",
        script=f"<script>{script}</script>\n" if script else "",
    )


def encoder_parts(text: Any) -> tuple[str, str]:
    """Name and arguments, from the JSON text that a report holds; any other text is taken as the name."""
    try:
        entries = dict(json.loads(text or "{}"))
    except (ValueError, TypeError):
        return str(text), ""
    name = str(entries.pop("name", ""))
    return name, ", ".join(f"{key} = {value}" for key, value in entries.items())


def _variables(palette: Palette) -> str:
    """The palette as CSS, once for each colour scheme."""
    light, dark = ("".join(f"--{name}:{colors[i]};" for name, colors in palette.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 16px 40px}
h1{font-size:27px;line-height:1.2;margin:0;overflow-wrap:anywhere} h2{font-size:15px;margin:0 0 6px}
.over{color:var(--muted);font-size:13px;letter-spacing:.04em;margin:0 0 4px}
.shape{font-size:17px;color:var(--muted);margin:4px 0 0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px 20px;margin:18px 0 22px}
dt,.label{color:var(--muted);font-size:12.5px} dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(8,1fr);gap:10px;margin-bottom:16px}
@media (max-width:1080px){.tiles{grid-template-columns:repeat(4,1fr)}}
.tile,figure,.entries{background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tile{padding:10px 12px} .value{font-size:24px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.note,figcaption,footer{color:var(--muted);font-size:12.5px;line-height:1.35}
.none{color:var(--muted);font-weight:400} .value.none{font-size:16px;line-height:31px} figure .none{margin:auto}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:16px}
figure{margin:0;padding:14px;display:flex;flex-direction:column} figcaption{margin-top:8px}
svg{display:block;width:100%;height:auto;max-width:520px;margin:auto} svg *{stroke-linejoin:round;stroke-linecap:butt}
.entries{margin-top:16px;padding:14px} table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-top:1px solid var(--rule);font-weight:400}
th+td{width:190px;overflow-wrap:anywhere;font-variant-numeric:tabular-nums} td:last-child{color:var(--muted);padding-right:0}
.group th{border-top:0;padding-top:18px;font-weight:600;font-size:14px} tbody:first-of-type .group th{padding-top:4px}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:18px;max-width:90ch} footer p{margin:0 0 6px}
@media (max-width:700px){main{padding:18px 12px} .tiles{grid-template-columns:1fr 1fr} dl{grid-template-columns:1fr 1fr}
tr{display:grid;grid-template-columns:1fr auto;border-top:1px solid var(--rule);padding:5px 0} th,td{border:0;padding:0}
th+td{width:auto;text-align:right;padding-left:12px} td:last-child,.group th{grid-column:1/-1} .group{border:0}}
"""

# The policy lets the page's own style in and nothing else, whatever text a report brings along.
DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
{script}</body>
</html>
"""
