"""The version of pyproject.toml is the one that README, CITATION.cff, and CHANGELOG name."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
PLACES = {
    "README.md": [r"sparsary-([\d.]+)-py3-none-any\.whl", r"version = \{([\d.]+)\}"],
    "CITATION.cff": [r"(?m)^version: ([\d.]+)$"],
    # The newest version comes first.
    "CHANGELOG.md": [r"(?m)^## ([\d.]+)$"],
}


@pytest.mark.parametrize("name", PLACES)
def test_the_version_is_that_of_the_package(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = {pattern: re.search(pattern, text) for pattern in PLACES[name]}
    assert {pattern: match and match.group(1) for pattern, match in found.items()} == dict.fromkeys(PLACES[name], VERSION)
