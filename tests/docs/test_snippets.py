"""Every snippet of README, CONTRIBUTING and docs: Python runs as printed, commands are understood, recipes are valid."""

import ast
import inspect
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

import sparsary
from sparsary.sae import ENCODERS, SAE
from sparsary.training.embedded import MODEL_DIR
from sparsary.training.recipe import override, parse_yaml
from sparsary.training.recipe.grid import check_grid
from sparsary.transcoders import Transcoder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What needs a network or another library: names and arguments are checked, and nothing is run.
WORDS = r"(time )?(sparsary|python|make|pip) "
NOT_RUN = ("owner/repository", "gpt2-small-res-jb/", "SaeBenchAdapter", "to_pandas")


def blocks(kind):
    """Return the fenced blocks of a kind, each with its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match.group(1) == kind:
                line = text[: match.start()].count("\n") + 1
                found.append(pytest.param(match.group(2), id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A working directory with the runs that pages speak of, all of them tiny."""
    about = {"model": {"id": "embedded"}, "text": {"source": "embedded"}}
    for name in ("quickstart", "my-sae"):
        hook = {"hook": "transformer.h.2:out", "hooks_in": ["transformer.h.2:out"], "hooks_out": ["transformer.h.2:out"]}
        SAE(128, 150, ENCODERS["topk"](k=4)).save(tmp_path / "runs" / name, about | hook)
    for layer in range(4):
        hooks = {f"hooks_{side}": [f"transformer.h.{layer}.mlp:{side}"] for side in ("in", "out")}
        folder = tmp_path / "runs/transcoders/embedded/stack" / f"layer={layer}"
        Transcoder(128, 128, 150, ENCODERS["topk"](k=4)).save(folder, about | hooks)
    # The reader's own model.
    shutil.copytree(MODEL_DIR, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_printed(code, request, prepared):
    if any(word in code for word in NOT_RUN):
        check_names(ast.parse(code))
        return
    # Some go on from the snippet before them on their page.
    page, line = request.node.callspec.id.rsplit(":", 1)
    names = {}
    for earlier in blocks("python"):
        where, number = earlier.id.rsplit(":", 1)
        if where == page and int(number) < int(line) and "stack = " in earlier.values[0] and "stack" in code:
            exec(earlier.values[0], names)
    exec(compile(code, request.node.callspec.id, "exec"), names)


def check_names(tree):
    """Imports lead somewhere, and calls of what sparsary has fit its signature."""
    names = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "imports", "exec"), names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if called.partition(".")[0] in names:
            function = eval(called, names)
            inspect.signature(function).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


def commands():
    """Return every command line of the pages, in blocks and in backticks."""
    found = []
    for block in [*blocks(""), *blocks("bash")]:
        lines = block.values[0].replace("\\\n", " ").splitlines()
        found += [pytest.param(line, id=f"{block.id} {line[:40]}") for line in lines if re.match(WORDS, line)]
    for page in PAGES:
        for line in re.findall(r"`((?:sparsary|python -c|make) [^`]+)`", page.read_text(encoding="utf-8")):
            found.append(pytest.param(" ".join(line.split()), id=f"{page.name} {line[:40]}"))
    return found


@pytest.mark.parametrize("line", commands())
def test_a_command_is_understood(line, tmp_path):
    words = shlex.split(line.replace("[--to FORMAT]", "--to saelens").replace("...", ""), comments=True)
    words = words[words[:1] == ["time"] :]
    if words and words[0] == "sparsary":
        understood(words[1:])
    elif words[:2] == ["python", "-c"]:
        exec(compile(words[2], line, "exec"), {})
    elif words and words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:1] == ["python"] and words[1] != "-m":
        assert (ROOT / words[1]).is_file()


def understood(words):
    """Parse a command line as the command does, and run nothing."""
    command: Any = typer.main.get_command(sparsary.command_line())
    name = "sparsary"
    while words and hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    if hasattr(command, "commands"):
        return
    # Commands and options are also spoken of without their arguments.
    for more in range(3):
        try:
            command.make_context(name, [*words, *["x"] * more])
        except Exception as error:
            if more == 2 or "o such option" in str(error):
                raise
        else:
            return


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_recipe_is_valid(text, recipe_values):
    try:
        documents = [parse_yaml(text, "page")]
    except ValueError:
        # Several ways to say one thing, each on a line.
        documents = [parse_yaml(line, "page") for line in text.splitlines()]
    if "out_dir" in documents[0]:
        check_grid(documents[0], "page")
        return
    for part in documents:
        values = {**recipe_values, "harvest": {"store": None}, "batch_tokens": 101}
        for key, value in part.items():
            override(values, key, value)
        check_grid(values, "page")


def test_what_is_wrong_is_found():
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        understood(["eval", "x", "--no-such-option"])
    with pytest.raises(ImportError):
        check_names(ast.parse("from sparsary.training.activations.splice import Edit"))
    with pytest.raises(TypeError):
        check_names(ast.parse("import sparsary\nsparsary.convert(1, 2, tu=3)"))
