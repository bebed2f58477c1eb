"""MkDocs hook: pages of the documentation that are generated from the code, and the source that mkdocstrings reads.

Recipe keys come from ``training/recipe/schema.py``, encoders from ``ENCODERS``, commands from the command line itself, public
names from ``sparsary.__all__``. Nothing is written into the repository. ``mkdocs.yml`` loads this file; ``make docs`` runs it.
"""

import inspect
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import griffe
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import sparsary
from sparsary.sae import ENCODERS
from sparsary.training.recipe.schema import Recipe, Section

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("sae", "transcoders", "training", "eval")
# Public names by page. A test compares them with `sparsary.__all__`.
API = {
    "dictionaries": (
        "Dictionaries",
        "Load a dictionary, encode and decode activations with it, and ask what its latents do.",
        "load CheckpointOptions SparseDictionary SAE Transcoder CrossLayerTranscoder Crosscoder Stack SparseCode Encoder",
    ),
    "training": (
        "Models and training",
        "Read activations of a language model, or of any PyTorch model, and train on them.",
        "LanguageModel train harvest read_activations",
    ),
    "evaluation": (
        "Evaluation",
        "One function per command. Each writes the files that the command writes and returns their contents.",
        "evaluate evaluate_all InferenceMode features Explainer NeuronpediaExport probe ProbingResults circuits "
        "CircuitSettings compare_circuits mib_submission attribution_graph compare similarity diff "
        "name select SelectSettings steer Report Features",
    ),
    "sharing": (
        "Describing and sharing",
        "Describe and verify files, convert between formats, and upload.",
        "info CheckpointInfo published convert Converted push_to_hub render",
    ),
}
# Names that a reference to a page of its own, or to nothing, serves better.
NOT_IN_API = {"ENCODERS", "__version__", *LAYERS}


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Copy the package beside the site and point mkdocstrings to the copy, before it reads its settings.

    The repository's root is the package itself, and also holds tests and environments that must not be searched.
    """
    source = Path(config.site_dir).with_name("docs-source")
    shutil.rmtree(source, ignore_errors=True)
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, source / "sparsary" / layer, ignore=_not_python)
    shutil.copy(ROOT / "__init__.py", source / "sparsary")
    handler = config.plugins["mkdocstrings"].config.handlers["python"]
    handler["paths"] = [str(source)]
    handler["options"]["extensions"] = [str(ROOT / "docs" / "doctests.py")]
    return config


def _not_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__" or not (name.endswith(".py") or Path(folder, name).is_dir())]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links that GitHub resolves and a site does not: a folder's name stands for its page."""
    return markdown.replace("](results/)", "](results/index.md)")


def pages() -> dict[str, str]:
    """Return the generated pages, by path within the site's source."""
    found = {
        "reference/recipe.md": recipe_page(),
        "reference/encoders.md": encoders_page(),
        "reference/cli.md": cli_page(),
        "results/index.md": results_page(),
        "contributing.md": _below_docs((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")),
        "changelog.md": _below_docs((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
    }
    return found | {f"reference/api/{name}.md": api_page(*texts) for name, texts in API.items()}


def _below_docs(markdown: str) -> str:
    """Return a page of the repository's root as a page of ``docs/``."""
    return markdown.replace("](docs/", "](")


def recipe_page() -> str:
    """Return the reference of all recipe keys."""
    lines = [
        "# Recipe keys",
        "",
        "A recipe is one YAML file. Unknown keys and wrong types are errors, and all errors of a recipe are reported at once. "
        "On the command line any key is overridden by its dotted name: `sparsary train my-sae.yaml dictionary.n_latents=4096`.",
        "",
        "Two more keys stand beside these. `base: other.yaml` merges the recipe over another one; `grid:` trains several "
        "recipes over one stream of activations (see [Choose the settings](../how_to/settings.md#sweep)).",
        "",
        "## Top level",
        "",
        *_table(Recipe),
    ]
    for path, section in _sections(Recipe):
        lines += ["", f"## `{path}`", "", inspect.getdoc(section) or "", "", *_table(section, path)]
    return "\n".join(lines) + "\n"


def _sections(section: type[Section], above: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield the sections of a recipe by name, each before those within it; those of a list have brackets behind their name."""
    for name, field in section.model_fields.items():
        for part in _nested(field.annotation):
            path = f"{above}{name}{'[]' if get_origin(field.annotation) is tuple else ''}"
            yield path, part
            yield from _sections(part, f"{path}.")


def _nested(annotation: Any) -> list[type[Section]]:
    return [part for part in _parts(annotation) if issubclass(part, Section)]


def _parts(annotation: Any) -> Iterator[type]:
    """Yield the classes that an annotation is made of."""
    if inspect.isclass(annotation) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _table(section: type[Section], path: str = "") -> list[str]:
    """Return a table of the keys of the section at a path; sections within it have a table of their own."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        parts = _nested(field.annotation)
        description = (field.description or "").strip()
        if parts:
            listed = get_origin(field.annotation) is tuple
            kind = "list of sections" if listed else "section"
            # The anchor of the heading, which has no dots.
            link = f"[`{name}`](#{path.replace('.', '')}{name})"
            text = description or (inspect.getdoc(parts[0]) or "").split("\n")[0]
            rows.append(_row(link, kind, _default(field), text))
        else:
            kind = type_words(field.annotation, field.metadata)
            rows.append(_row(f"`{name}`", kind, _default(field), description))
    return rows


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, Section) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value.encode("unicode_escape").decode() if value.strip() else f'"{value.encode("unicode_escape").decode()}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"


def type_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return a type in words: ``integer ≥ 1 or null`` for ``Annotated[int, Field(ge=1)] | None``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        # Every integer is a number.
        parts = [part for part in arguments if part is not int or float not in arguments]
        return " or ".join(dict.fromkeys(type_words(part) for part in parts))
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(type_words(part) for part in arguments)}]"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of names to {_plural(type_words(arguments[1]))}"
    if origin is not None:
        return f"list of {_plural(type_words(arguments[0]))}"
    words = {int: "integer", float: "number", bool: "`true` or `false`", str: "text", NoneType: "`null`"}
    return words[annotation] + _bounds(metadata)


def _plural(words: str) -> str:
    first, _, rest = words.partition(" ")
    plurals = {"integer": "integers", "number": "numbers", "text": "texts", "list": "lists"}
    return " ".join(filter(None, [plurals.get(first, first), rest]))


def _bounds(metadata: Iterable[Any]) -> str:
    found = {}
    for constraint in metadata:
        for each in (constraint, *getattr(constraint, "metadata", ())):
            found |= {name: getattr(each, name) for name in ("ge", "gt", "le", "lt") if getattr(each, name, None) is not None}
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return "".join(f"{' and' * (i > 0)} {signs[name]} {bound:g}" for i, (name, bound) in enumerate(found.items()))


def encoders_page() -> str:
    """Return the reference of all encoders and their arguments."""
    lines = [
        "# Encoders",
        "",
        "`dictionary.encoder` names the encoder, i.e. how active latents are selected, and sets its arguments: "
        "`encoder: {name: topk, k: 32}`. Every encoder works in SAEs and crosscoders, and all but `lista` in transcoders; "
        "cross-layer transcoders take `topk`, "
        "`jumprelu` and `relu`. In Python they are `sparsary.ENCODERS`. How they compare on small models: "
        "[Encoders compared](../families.md).",
    ]
    for name, encoder in ENCODERS.items():
        text, described = documented(encoder)
        lines += ["", f"## `{name}`", "", text, "", "| argument | type | default | meaning |", "|---|---|---|---|"]
        for argument, parameter in encoder.parameters_of().items():
            required = parameter.default is parameter.empty
            default = "required" if required else f"`{_yaml(parameter.default)}`"
            lines.append(_row(f"`{argument}`", type_words(parameter.annotation), default, described.get(argument, "")))
    return "\n".join(lines) + "\n"


def documented(documented_class: type) -> tuple[str, dict[str, str]]:
    """Return the text of a docstring without its arguments, and the descriptions of these, in Markdown."""
    text, arguments = [], {}
    parsed = griffe.Docstring(inspect.getdoc(documented_class) or "").parse("google", warnings=False)
    for part in parsed:
        if part.kind is griffe.DocstringSectionKind.text:
            text.append(part.value)
        elif part.kind is griffe.DocstringSectionKind.parameters:
            arguments |= {each.name: each.description for each in part.value}
    return "\n\n".join(text), arguments


def cli_page() -> str:
    """Return the reference of all commands, as they describe themselves."""
    lines = [
        "# Commands",
        "",
        "Every command has `--help`, and `--debug` shows the traceback of an error. Exit status: 0 if all went well, 2 if the "
        "message says what to change, 1 for anything unexpected, 130 after Ctrl-C.",
    ]
    command: Any = typer.main.get_command(sparsary.command_line())
    for name, each in command.commands.items():
        if not hasattr(each, "commands"):
            lines += _command(f"sparsary {name}", each, 2)
            continue
        lines += ["", f"## `sparsary {name}`", "", each.help or ""]
        for below, one in each.commands.items():
            lines += _command(f"sparsary {name} {below}", one, 3)
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any, level: int) -> list[str]:
    context = command.context_class(command, info_name=name)
    shown = {kind: [each for each in command.params if each.param_type_name == kind] for kind in ("argument", "option")}
    usage = " ".join([name, *map(_argument, shown["argument"]), "[OPTIONS]" if shown["option"] else ""])
    lines = ["", f"{'#' * level} `{name}`", "", _sentences(command.help), "", "```text", usage.strip(), "```"]
    rows = [(_argument(each), each.help) for each in shown["argument"]]
    rows += [record for each in shown["option"] if (record := each.get_help_record(context)) is not None]
    if rows:
        lines += ["", "| argument or option | meaning |", "|---|---|"]
        lines += [_row(f"`{left}`", _sentences(text)) for left, text in rows]
    return lines


def _argument(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _sentences(text: str | None) -> str:
    """Return a help text in one paragraph, with what Markdown would take for links or emphasis escaped."""
    return re.sub(r"([\[\]*_<>])", r"\\\1", " ".join((text or "").split()))


def api_page(title: str, about: str, names: str) -> str:
    """Return a page for mkdocstrings, which fills in signatures and docstrings."""
    lines = [f"# {title}", "", about]
    for name in names.split():
        lines += ["", f"::: sparsary.{name}", "    options:", f'      heading: "sparsary.{name}"', f'      toc_label: "{name}"']
        # Their bases have no entry of their own; those of SAE and others do.
        lines += [f"      inherited_members: {str(name in ('SparseDictionary', 'LanguageModel')).lower()}"]
    return "\n".join(lines) + "\n"


def results_page() -> str:
    """Return a list of the result files beside the documentation."""
    files = sorted(path.name for path in (ROOT / "docs" / "results").glob("*.json"))
    return "\n".join(
        [
            "# Result files",
            "",
            "The figures behind the pages of this section, as JSON, one record per line. The scripts that made them are in "
            "`docs/studies/`; each begins with its command.",
            "",
            *(f"- [{name}]({name})" for name in files),
            "",
        ]
    )
