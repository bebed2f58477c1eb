"""Names of a checkpoint's latents, as ``sparsary name`` wrote them."""

from pathlib import Path

from ...sae.files import read_json

NAMES_FOLDER, NAMES_FILE = "names", "names.json"


def recorded_names(checkpoint: Path) -> dict[int, str]:
    """Return the names that are above the floor, by latent; empty if the checkpoint has none."""
    path = checkpoint / NAMES_FOLDER / NAMES_FILE
    if not path.is_file():
        return {}
    return {row["latent"]: row["name"] for row in read_json(path)["latents"] if row["above_floor"]}
