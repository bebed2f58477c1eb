"""Tutorials as pages: outputs of an executed notebook are on its page, and one that was not executed says so."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIAL = "# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nn = 6 * 7\nn\n"
PIXEL = base64.b64encode(b"png of one pixel").decode()


@pytest.fixture(scope="module")
def notebooks():
    for name in ("mkdocs", "jupytext", "nbconvert", "nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"needs {name}, which `make docs` installs")
    spec = importlib.util.spec_from_file_location("docs_notebooks", ROOT / "docs" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tutorial(tmp_path):
    path = tmp_path / "01_title.py"
    path.write_text(TUTORIAL)
    return path


def output(data, kind="execute_result"):
    return {"output_type": kind, "data": data, "metadata": {}} | ({"execution_count": 1} if kind == "execute_result" else {})


def executed(notebooks, path, *outputs):
    """Return the notebook of a tutorial with outputs of its last cell, made up."""
    notebook = notebooks.jupytext.read(path)
    notebook.cells[-1].outputs = [notebooks.nbformat.from_dict(each) for each in outputs]
    notebook.metadata["sparsary"] = {"digest": notebooks.digest(path), "seconds": 12}
    return notebook


def test_outputs_are_on_the_page(notebooks, tutorial):
    stream = {"output_type": "stream", "name": "stdout", "text": "\x1b[1mharvest\x1b[0m: 5 tokens\n"}
    table = "<table><tr><td>\n\n7</td></tr></table>"
    plot = output({"image/png": PIXEL, "text/plain": "<Figure>"}, "display_data")
    both = output({"text/html": table, "text/plain": "7"})
    text, images = notebooks.page_of(tutorial, executed(notebooks, tutorial, stream, both, plot, output({"text/plain": "42"})))
    assert text.startswith("# Title\n\n[Download the notebook](01_title.ipynb) \u00b7 ran in 12 s")
    assert "```python\nn = 6 * 7\nn\n```" in text
    assert "harvest: 5 tokens\n```" in text
    assert f'<div class="notebook-output">\n{table}\n</div>' in text
    assert "{ .text .notebook-output }\n42\n```" in text
    assert [*images.values()] == [b"png of one pixel"]
    assert f"]({next(iter(images))})" in text
    assert notebooks.MISSING not in text
    assert text.index("Words.") < text.index("```python")


def test_a_page_without_outputs_says_so(notebooks, tutorial):
    text, images = notebooks.page_of(tutorial, None)
    assert notebooks.MISSING in text
    assert "n = 6 * 7" in text
    assert images == {}


def test_outputs_belong_to_one_text(notebooks, tutorial, tmp_path):
    assert notebooks.stored(tutorial, tmp_path) is None
    notebooks.nbformat.write(executed(notebooks, tutorial), tmp_path / "01_title.ipynb")
    assert notebooks.stored(tutorial, tmp_path).metadata["sparsary"]["seconds"] == 12
    tutorial.write_text(TUTORIAL.replace("7", "8"))
    assert notebooks.stored(tutorial, tmp_path) is None


def test_a_tutorial_is_executed_in_an_empty_folder(notebooks, tutorial, tmp_path):
    pytest.importorskip("ipykernel")
    tutorial.write_text(TUTORIAL + "\n# %%\nfrom pathlib import Path\n\nlen([*Path().iterdir()])\n")
    notebook = notebooks.execute(tutorial, tmp_path / "out")
    shown = [cell.outputs[0]["data"]["text/plain"] for cell in notebook.cells if cell.cell_type == "code"]
    assert shown == ["42", "0"]
    assert json.loads((tmp_path / "out" / "01_title.ipynb").read_text())["metadata"]["sparsary"]["seconds"] >= 0
    assert notebooks.stored(tutorial, tmp_path / "out") is not None


def test_links_to_scripts_lead_to_pages(notebooks):
    text = "[a](tutorials/01_one.py) [b](02_two.py#x) [c](../tutorials/03_three.py) [d](studies/x.py) `01_one.py`"
    assert notebooks.on_page_markdown(text, None, None, None) == (
        "[a](tutorials/01_one.md) [b](02_two.md#x) [c](../tutorials/03_three.md) [d](studies/x.py) `01_one.py`"
    )
