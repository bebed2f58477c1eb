"""Checkpoints on the Hugging Face hub: only the files of a dictionary travel, and nothing in them is executed."""

from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config

if TYPE_CHECKING:
    from .formats import Source


def local_directory(path_or_id: str, revision: str | None = None) -> Path:
    """The directory itself if it exists, else the downloaded (or cached) repository of that id.

    Raises:
        ValueError: If there is neither.
    """
    path = Path(path_or_id)
    if path.exists() or path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        return path
    # Imported here: loading from disk must not need the hub's client.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except Exception as error:  # noqa: BLE001
        # Offline, unknown, private: whatever the client raises, the user needs to know what was looked for.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path_or_id}: no such directory, and the hub repository of that name could not be had ({reason})."
        ) from None


def push(directory: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a checkpoint, or a dictionary in another library's format; returns the repository's address.

    Raises:
        ValueError: If the directory holds no dictionary.
    """
    from huggingface_hub import HfApi

    files = [WEIGHTS_FILE, CONFIG_FILE]
    if not (Path(directory) / CONFIG_FILE).exists() and Path(directory).is_dir():
        # Imported here: formats build on everything else.
        from .formats import Source, places

        try:
            found = places(Source(directory))
        except ValueError as error:
            raise ValueError(f"{directory}: expected {CONFIG_FILE}, or another library's dictionary: {error}") from None
        files = [name for place, _, _ in found for name in _inside(place)]
    else:
        read_config(directory)
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(directory),
        allow_patterns=files,
        commit_message="Upload a sparsary dictionary",
    )
    return commit.repo_url if isinstance(commit.repo_url, str) else str(commit.repo_url)


def _inside(place: "Source") -> list[str]:
    """A dictionary's files, by their paths in the directory that is uploaded."""
    return [f"{place.inside}/{name}" if place.inside else name for name in place.files]
