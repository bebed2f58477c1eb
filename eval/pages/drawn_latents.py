"""Top tokens of the latents that a circuit page draws, read from the files of features of its checkpoints."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .examples import FeaturesFiles, feature_address, features_files, records_of, top_tokens

LATENT_UNIT = re.compile(r"^(?P<hook>.+)/(?P<latent>\d+)(@\d+)?$")


class DrawnLatent(NamedTuple):
    """What is known of a latent: its tokens, the strongest first, and its address on a features page."""

    tokens: list[str]
    href: str


def drawn_latents(page: Path, found: dict[str, Any]) -> dict[tuple[str, str], DrawnLatent]:
    """Return what is known of the units of the drawn circuits, by family and unit name.

    A checkpoint of several hooks is a folder of checkpoints, each with its own file of features.
    """
    known: dict[tuple[str, str], DrawnLatent] = {}
    for checkpoint in found["checkpoints"]:
        own = [entry for entry in found["circuits"] if entry["family"].startswith(f"{checkpoint}: errors")]
        named = {
            (entry["family"], unit["name"]): unit_name
            for entry in own
            for unit in entry["units"]
            if (unit_name := LATENT_UNIT.match(unit["name"]))
        }
        for files in _files(checkpoint, page) if named else ():
            hooks = set(files.about["hooks_in"]) | set(files.about["hooks_out"])
            here = {key: int(match["latent"]) for key, match in named.items() if match["hook"] in hooks}
            records = records_of(files.records, set(here.values())) if here else {}
            for key, latent in here.items():
                if latent in records:
                    known[key] = DrawnLatent(top_tokens(records[latent]), feature_address(files, latent, page))
    return known


def _files(checkpoint: str, page: Path) -> Iterator[FeaturesFiles]:
    """Yield the files of features of a checkpoint and of the checkpoints in it."""
    for root in (Path(), *page.absolute().parents):
        directory = root / checkpoint
        if directory.is_dir():
            members = sorted(member for member in directory.iterdir() if member.is_dir() and member.name != "features")
            found = [files for each in (directory, *members) if (files := features_files([each]))]
            if found:
                yield from found
                return
