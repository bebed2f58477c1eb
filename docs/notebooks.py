"""MkDocs hook and script: the tutorials as notebooks, executed when their text changes, and as pages with their outputs.

A tutorial is a script in docs/tutorials/ whose cells begin with ``# %%`` (jupytext's percent format). Run by itself (``make
tutorials``), this file executes every tutorial that has changed, in an empty folder, and stores the notebooks with outputs in
``build/tutorials``. As a hook it makes a page and a notebook to download from each; one that was not executed says so.
"""

import hashlib
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
EXECUTED = ROOT / "build" / "tutorials"
TEMPLATE = ROOT / "docs" / "notebook.md.j2"
# For hangs alone: a tutorial takes about a minute.
TIMEOUT_SECONDS = 900
# The address in a link to a tutorial.
SCRIPT = re.compile(r"(\]\((?:[\w.]+/)*\d\d_\w+)\.py(?=[)#])")
# Key of our entries in a notebook's metadata.
ABOUT = "sparsary"
MISSING = '!!! note "Without outputs"\n    This page was built before `make tutorials` had run this notebook.'

log = logging.getLogger("mkdocs.notebooks")


def sources() -> list[Path]:
    """Return the tutorials, in the order of their numbers."""
    return sorted(TUTORIALS.glob("[0-9]*.py"))


def digest(path: Path) -> str:
    """Return the digest of a tutorial's text, by which its outputs are known to be its own."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stored(path: Path, folder: Path = EXECUTED) -> NotebookNode | None:
    """Return the executed notebook of a tutorial; ``None`` if there is none of its present text."""
    file = folder / f"{path.stem}.ipynb"
    if not file.is_file():
        return None
    notebook = nbformat.read(file, as_version=4)
    return notebook if notebook.metadata.get(ABOUT, {}).get("digest") == digest(path) else None


def execute(path: Path, folder: Path = EXECUTED) -> NotebookNode:
    """Run a tutorial in a kernel of its own, in an empty working directory, and store the notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    # Imported lazily: building the site alone starts no kernels.
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    begun = time.perf_counter()
    # tqdm asks for widgets, which a page cannot show.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    with tempfile.TemporaryDirectory() as directory:
        resources = {"metadata": {"path": directory}}
        NotebookClient(notebook, timeout=TIMEOUT_SECONDS, kernel_name="python3", resources=resources).execute()
    notebook.metadata[ABOUT] = {"digest": digest(path), "seconds": round(time.perf_counter() - begun)}
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{path.stem}.ipynb")
    return notebook


def page_of(path: Path, notebook: NotebookNode | None) -> tuple[str, dict[str, bytes]]:
    """Return a tutorial as Markdown, and the images of its outputs by their names beside the page."""
    exporter = MarkdownExporter(template_file=str(TEMPLATE))
    about = notebook.metadata[ABOUT] if notebook is not None else {}
    resources: dict[str, Any] = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    text, made = exporter.from_notebook_node(notebook or jupytext.read(path), resources)
    title, _, rest = text.strip().partition("\n")
    said = f"[Download the notebook]({path.stem}.ipynb)"
    said += f" \u00b7 ran in {about['seconds']} s when this page was made" if about else ""
    parts = [title, f"{said}\n{{ .notebook-about }}", *([] if about else [MISSING]), rest.strip()]
    return "\n\n".join(parts) + "\n", made["outputs"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page and a notebook for every tutorial."""
    for path in sources():
        notebook = stored(path)
        if notebook is None:
            log.info("%s: without outputs; `make tutorials` runs it.", path.name)
        text, images = page_of(path, notebook)
        content = nbformat.writes(notebook or jupytext.read(path))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        files.append(File.generated(config, f"tutorials/{path.stem}.ipynb", content=content))
        for name, image in images.items():
            files.append(File.generated(config, f"tutorials/{name}", content=image))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to the scripts, which the repository has, by links to the pages made from them."""
    return SCRIPT.sub(r"\1.md", markdown)


def main() -> None:
    """Execute the tutorials that have changed."""
    # As the command line does: idle threads that spin slow down everything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for path in sources():
        if stored(path) is not None:
            sys.stdout.write(f"{path.name}: unchanged\n")
            continue
        sys.stdout.write(f"{path.name}: running\n")
        sys.stdout.flush()
        notebook = execute(path)
        sys.stdout.write(f"{path.name}: {notebook.metadata[ABOUT]['seconds']} s\n")


if __name__ == "__main__":
    main()
