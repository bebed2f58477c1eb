"""HTML documents from templates: style and script stand in the page, and its policy lets nothing else in."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .numbers import UNMEASURED, show
from .plots import PALETTE, Palette

TEMPLATES = Path(__file__).parent / "templates"


def document(
    template: str,
    title: str,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    palette: Palette = PALETTE,
    **values: Any,
) -> str:
    """Render a template of this package as a whole page. Equal input gives equal bytes.

    The page runs the named ``scripts``, joined, and no other: its policy names their hash.

    Args:
        template: File of ``templates/``; it extends ``base.html``.
        title: The page's title, shown by the browser.
        styles: Style sheets of ``templates/``, after ``base.css``.
        scripts: Scripts of ``templates/``, in order.
        palette: Colours by the name of their CSS variable.
        values: What the template shows; text is escaped, markup only where it is ``Markup``.
    """
    script = "".join(map(_source, scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ENVIRONMENT.get_template(template).render(
        title=title,
        # Both are files of this package: nothing in them ends their element.
        style=Markup("".join(map(_source, ("base.css", *styles)))),
        script=Markup(script),
        digest=digest,
        palette=palette,
        **values,
    )


def encoder_parts(text: Any) -> tuple[str, str]:
    """Name and arguments, from the JSON text that a report holds; any other text is taken as the name."""
    try:
        entries = dict(json.loads(text or "{}"))
    except (ValueError, TypeError):
        return str(text), ""
    name = str(entries.pop("name", ""))
    return name, ", ".join(f"{key} = {value}" for key, value in entries.items())


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    """Text is escaped, and a name that a template misspells is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["show"] = show
    found.globals["UNMEASURED"] = UNMEASURED
    found.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return found


ENVIRONMENT = _environment()
