"""``manifest.json`` of a store: written with a checksum and checked when it is read, so that damage is found early."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...sae.files import CHECKSUM, json_checksum, read_unsealed_json, write_json

FORMAT = "sparsary-store"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class _Entry(BaseModel):
    """Entry of which only some keys are checked; others belong to other versions or to the store's identity."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Hook(_Entry):
    width: Annotated[int, Field(gt=0)]
    count: Count
    # Of the training tokens counted so far.
    mean: list[Number] = []
    deviation: list[Number] = []
    rounding_fvu: Number = 0.0


class _Shard(_Entry):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,200}$")]
    split: Literal["train", "heldout"]
    unit: Count
    tokens: Count
    bytes: Count
    sha256: str


class _Manifest(_Entry):
    hooks: dict[str, _Hook]
    shards: list[_Shard]
    block: Annotated[int, Field(gt=0)]
    cursor: Annotated[list[Count], Field(min_length=2)]
    complete: bool
    model: dict[str, Any]
    skipped: dict[str, Count] = {}


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Replace a store's manifest.

    Raises:
        WriteError: If it could not be written; the previous one is unchanged.
    """
    write_json(directory / MANIFEST_FILE, manifest, sealed=True)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return a store's manifest, without its checksum.

    Raises:
        ValueError: If there is none, or it is damaged or of another version.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(
            f"{directory}: expected an activation store, found no {MANIFEST_FILE}. Make one with `sparsary harvest`."
        )
    manifest = read_unsealed_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: expected an activation store, with format {FORMAT!r}, got other JSON.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {str(manifest.get('format_version'))[:40]}. Harvest again."
        )
    # Stores of earlier versions have none.
    checksum = manifest.pop(CHECKSUM, None)
    if problem := _problem(manifest) or ("" if checksum in (None, json_checksum(manifest)) else "differs from its checksum"):
        raise ValueError(f"{path}: {problem}: the file is damaged. Restore it, or delete the store and harvest again.")
    return manifest


def _problem(manifest: dict[str, Any]) -> str:
    """Return what keeps a manifest from being used; empty if nothing does."""
    try:
        found = _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg']}"
    for name, hook in found.hooks.items():
        if hook.count and not len(hook.mean) == len(hook.deviation) == hook.width:
            counts = f"{len(hook.mean)} and {len(hook.deviation)}"
            return f"hooks.{name[:200]}: expected {hook.width} means and deviations, got {counts}"
    return ""
