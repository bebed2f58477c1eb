"""The worked examples of docs/scale.md print what the page shows, and the Slurm script on the page is the file."""

import logging
import re
import shlex
import sys
from pathlib import Path

import pytest

import sparsary

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "scale.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
EXAMPLES = re.findall(r"```console\n\$ (sparsary .*?)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[command.split(" --memory")[0] for command, _ in EXAMPLES])
def test_a_worked_example_prints_what_the_page_shows(monkeypatch, tmp_path, capfd, command, shown):
    for name, text in RECIPES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    with pytest.raises(SystemExit) as ended:
        sparsary.main()
    out, err = capfd.readouterr()
    lines = [*out.splitlines(), *(line for line in err.splitlines() if line.startswith("sparsary: "))]
    assert [line.rstrip() for line in lines] == shown.splitlines()
    assert (ended.value.code == 0) == ("best" in shown)


def test_every_size_of_the_issue_has_an_example():
    assert len(EXAMPLES) >= 3
    assert {"8b.yaml", "2b.yaml", "9b.yaml"} == RECIPES.keys()


def test_the_slurm_script_on_the_page_is_the_file():
    page = (DOCS / "how_to" / "several_gpus.md").read_text(encoding="utf-8")
    assert (DOCS / "scripts" / "slurm.sh").read_text(encoding="utf-8") in page
