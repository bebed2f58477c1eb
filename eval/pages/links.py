"""Links between the pages of a run, and the command that makes each of them.

A run is a checkpoint's directory; its pages lie in it and in the folders that the commands write by default. Pages are found on
disk, next to the result and at the checkpoint that the result names. A new page is entered in those that exist already.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ...sae.files import read_json, write_text
from .document import ENVIRONMENT
from .probing import TASKS

# Page -> places of its HTML file within a run, the default first.
PLACES = {
    "report": ("report.html",),
    "features": ("features/features.html", "features.html"),
    "circuits": ("circuits/circuits.html", "circuits.html"),
    "circuit comparison": ("circuits/circuit_comparison.html", "circuit_comparison.html"),
    "graph": ("graph/graph.html", "graph.html"),
    "probing": ("probing/probing.html", "probing.html"),
    "diff": ("diff/diff.html", "diff.html"),
    "names": ("names/names.html", "names.html"),
    "select": ("select/select.html", "select.html"),
    "steer": ("steer/steer.html", "steer.html"),
}
# Page -> command that makes it of one checkpoint.
COMMANDS = {"report": "eval", "features": "features", "probing": "probe", "diff": "diff", "names": "name", "steer": "steer"}
# Options of `sparsary select` that are named where they differ.
SELECT_DEFAULTS = {"keep": 0.05, "by": "latents", "pooling": "max", "top": 256, "column": "text", "truth": None}
FOLDERS = {Path(places[0]).parent.name for places in PLACES.values()} - {""}
COMPARISON, SIMILARITY, RECIPE = "comparison", "similarity", "recipe.yaml"
# A comparison of recipes lies this many folders above its runs at most: OUT/RECIPE/seed-0.
ABOVE = 3
NAVIGATION = re.compile(r'<nav class="pages".*?</nav>', re.DOTALL)


class PageLink(NamedTuple):
    """A page of a run: its label and its relative address, empty for the page itself."""

    label: str
    href: str


def address(target: Path, page: Path) -> str:
    """Return the relative URL from ``page`` to the file ``target``."""
    return quote(Path(os.path.relpath(target.absolute(), page.absolute().parent)).as_posix())


def found_page(directory: str, label: str, page: Path) -> str | None:
    """Return the URL of a run's page as seen from ``page``, or ``None`` if there is no such file.

    A relative ``directory`` is tried from the working directory and from the folders above ``page``, since results may have
    been moved together.
    """
    for root in (Path(), *page.absolute().parents):
        for place in PLACES[label]:
            if (target := root / directory / place).is_file():
                return address(target, page)
    return None


def run_directories(page: Path, result: Mapping[str, Any]) -> list[Path]:
    """Return the directories that may hold the pages of a result's run, the nearest first."""
    own = page.absolute().parent
    named = [result.get("checkpoint"), result.get("transcoders"), *(result.get("checkpoints") or ())[:1]]
    places = [own.parent if own.name in FOLDERS else own, *(Path(str(name)) for name in named if name)]
    return list({place.resolve(): place for place in places if place.is_dir()}.values())


def page_links(label: str, page: Path, result: Mapping[str, Any]) -> list[PageLink]:
    """Return the links to the existing pages of a result's run, in a fixed order; ``label`` is that of the page itself."""
    if label == SIMILARITY:
        # It is of several runs alike, and names their reports itself.
        return [PageLink(label, "")]
    directories = run_directories(page, result)
    links = []
    for name in (*PLACES, COMPARISON):
        if name == label:
            links.append(PageLink(name, ""))
        elif target := next(_pages(name, directories), None):
            links.append(PageLink(name, address(target, page)))
    if label != COMPARISON:
        recipes = (directory / RECIPE for directory in directories)
        links += [PageLink("recipe", address(recipe, page)) for recipe in recipes if recipe.is_file()][:1]
    return links


def with_links(html: str, label: str, page: Path, result: Mapping[str, Any]) -> str:
    """Return a page with its navigation filled in: the links, and the command that made it."""
    links = page_links(label, page, result)
    text = ENVIRONMENT.get_template("navigation.html").render(links=links, command=command(label, result))
    return NAVIGATION.sub(lambda _: text.strip(), html, count=1)


def enter_in_others(label: str, page: Path, result: Mapping[str, Any]) -> None:
    """Enter a new page in the navigation of the run's other pages, which were made before it.

    A comparison is entered in the pages of every run that it compares.
    """
    if label == SIMILARITY:
        return
    directories = _compared(result) if label == COMPARISON else run_directories(page, result)
    for other in PLACES if directories else ():
        for target in dict.fromkeys(_pages(other, directories)):
            data = target.with_name(f"{target.stem}-page.json") if other == "graph" else target.with_suffix(".json")
            if other == label or not data.is_file():
                continue
            html = target.read_text(encoding="utf-8")
            changed = with_links(html, other, target, read_json(data))
            if changed != html:
                write_text(target, changed)


def command(label: str, result: Mapping[str, Any]) -> str:
    """Return the command line that the settings in a result stand for; empty if they do not determine one."""
    words: list[Any] = ["sparsary"]
    checkpoint = result.get("checkpoint")
    if label in COMMANDS and checkpoint:
        words += [COMMANDS[label], checkpoint]
        tokens = result.get("tokens_asked")
        words += ["--tokens", tokens] if tokens else []
        words += ["--labels", result["labels"]] if result.get("labels") else []
        words += ["--vectors", result["vectors"]] + ["--center"] * result["center"] if result.get("vectors") else []
        words += ["--difference-sae"] if result.get("difference_sae_asked") else []
        words += _probing_options(result) if label == "probing" else []
        words += _steer_options(result) if label == "steer" else []
    elif label == "select" and checkpoint:
        words += ["select", checkpoint, "--pool", result["pool"], "--like", result["like"]]
        words += [
            word for key, default in SELECT_DEFAULTS.items() if result[key] != default for word in (f"--{key}", result[key])
        ]
        words += ["--diverse"] if result["diverse"] else []
    elif label in ("circuits", "circuit comparison") and (result.get("checkpoints") or result.get("models")):
        words += ["circuits", *result["checkpoints"]]
        words += [word for model in _named_models(result) for word in ("--model", model)]
        words += [word for task in result["tasks"] for word in ("--task", task)]
        words += [word for method in result.get("methods") or () for word in ("--method", method)]
        words += [word for key in ("ablation", "corruption", "pairs") if result.get(key) for word in (f"--{key}", result[key])]
        words += ["--edges"] if result.get("edges") else []
        words += ["--random-circuits", result["random_circuits"]] if result.get("random_circuits") else []
        words += ["--compare"] if label == "circuit comparison" else []
        words += ["--out", result["out"]] if result.get("out") else []
        words += [word for two in result.get("repairs_asked") or () for word in ("--repair", *two)]
    elif label == "graph" and result.get("transcoders"):
        words += ["circuits", result["transcoders"], "--prompt", result["prompt"]]
    elif label == COMPARISON and result.get("runs"):
        words += ["compare", *(run["directory"] for run in result["runs"])]
    elif label == SIMILARITY and result.get("checkpoints"):
        words += [SIMILARITY, *result["checkpoints"], "--tokens", result["tokens"]]
    else:
        return ""
    seeded = ("circuits", "circuit comparison", "probing", "diff", "names", "select", "steer", SIMILARITY)
    words += ["--seed", result["seed"]] if label in seeded and result.get("seed") else []
    return shlex.join(map(str, words))


def _probing_options(result: Mapping[str, Any]) -> list[Any]:
    # Without names, every task is tried, and those that could not run are in the result, too.
    tried = [task for task in TASKS if f"{task}_done" in result]
    words = [word for task in tried for word in ("--task", task)] if len(tried) < len(TASKS) else []
    return [*words, "--factors", result["factor_file"]] if result.get("factor_file") else words


def _steer_options(result: Mapping[str, Any]) -> list[Any]:
    words = ["--towards", result["towards"], "--from", result["from"]]
    words += ["--neutral", result["neutral"]] if result.get("neutral") else []
    words += ["--tokens", ",".join(result["tokens_given"])] if result.get("tokens_given") else []
    words += [word for prompt in result.get("prompts_given") or () for word in ("--prompt", prompt)]
    words += ["--strengths", ",".join(f"{each:g}" for each in result["strengths"])] if result.get("strengths") else []
    words += ["--latents", result["latents_asked"], "--most-kl", result["most_kl"]]
    if result.get("documents_asked"):
        words += [
            "--documents",
            result["documents_asked"],
            "--pooling",
            result["pooling"],
            "--piece",
            result["lengths"]["piece"],
        ]
    return words


def _named_models(result: Mapping[str, Any]) -> list[str]:
    """Return the models that a comparison of circuits was given; those of dictionaries need no mention."""
    models = result.get("models") or []
    return models if len(models) > 1 or not result.get("checkpoints") else []


def _pages(label: str, directories: list[Path]) -> Iterator[Path]:
    """Yield the existing pages of a run with this label."""
    for directory in directories:
        if label != COMPARISON:
            yield from (target for place in PLACES[label] if (target := directory / place).is_file())
            continue
        for above in list(directory.absolute().parents)[:ABOVE]:
            for target in (above / "comparison.html", *sorted(above.glob("*/comparison.html"))):
                if target.is_file() and _compares(target.with_suffix(".json"), directory):
                    yield target


def _compares(comparison: Path, run: Path) -> bool:
    """Return True if the file is a comparison that includes the run."""
    found = read_json(comparison) if comparison.is_file() else {}
    return run.resolve() in {directory.resolve() for directory in _compared(found)}


def _compared(comparison: Mapping[str, Any]) -> list[Path]:
    """Return the directories of the runs that a comparison includes."""
    named = [entry["directory"] for entry in comparison.get("runs") or ()]
    named += [name for family in comparison.get("families") or () for name in family.get("directories") or ()]
    return [Path(name) for name in named]
