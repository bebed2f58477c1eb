"""Examples in docs/ run as they are printed."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# Heading above the example, by document.
EXAMPLES = (
    ("circuits.md", "Known circuits"),
    ("circuits.md", "Other methods"),
    ("dark_matter.md", "From Python"),
    ("probing.md", "Planted data"),
    ("transcoders.md", "What latents are made of"),
)


@pytest.mark.parametrize(("document", "heading"), EXAMPLES)
def test_an_example_runs_as_printed(document, heading, capsys):
    text = (DOCS / document).read_text(encoding="utf-8")
    section = re.split(rf"^#+ {heading}$", text, flags=re.MULTILINE)[1]
    code = section.split("```python\n")[1].split("```")[0]
    exec(compile(code, f"{document}: {heading}", "exec"), {})
    assert capsys.readouterr().out
