"""HTML documents from templates, with inline styles and scripts and a content security policy that allows nothing else."""

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
    """Render a template of this package as a complete page. Equal input gives equal bytes.

    The content security policy names the hash of the joined ``scripts``; the page runs no others.

    Args:
        template: File of ``templates/``; it extends ``base.html``.
        title: The page's title, shown by the browser.
        styles: Style sheets of ``templates/``, added after ``base.css``.
        scripts: Scripts of ``templates/``, in order.
        palette: Colors by the name of their CSS variable.
        values: Template variables; text is escaped unless it is ``Markup``.
    """
    script = "".join(map(_source, scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ENVIRONMENT.get_template(template).render(
        title=title,
        # Both are files of this package and cannot close their element.
        style=Markup("".join(map(_source, ("base.css", *styles)))),
        script=Markup(script),
        digest=digest,
        palette=palette,
        **values,
    )


def encoder_parts(text: Any) -> tuple[str, str]:
    """Return the name and arguments of an encoder from a report's JSON text; any other text is returned as the name."""
    try:
        entries = dict(json.loads(text or "{}"))
    except (ValueError, TypeError):
        return str(text), ""
    name = str(entries.pop("name", ""))
    return name, ", ".join(f"{key} = {value}" for key, value in entries.items())


def encoder_label(text: Any) -> str:
    """Describe an encoder on pages, from a report's JSON text: ``topk, k = 16``."""
    return ", ".join(filter(None, encoder_parts(text)))


def kind_label(kind: Any) -> str:
    """Return the name of a dictionary's kind in prose: ``SAE`` for ``sae``; "dictionary" if it is not known."""
    return {"sae": "SAE", "cross_layer_transcoder": "cross-layer transcoder"}.get(kind, str(kind or "dictionary"))


def encoder_words(text: Any) -> str:
    """Describe an encoder for the terminal, from a report's JSON text: ``topk, k 16``."""
    return encoder_label(text).replace(" = ", " ")


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    """Build the template environment: text is escaped, and undefined names raise."""
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
