"""Checkpoints on the Hugging Face hub: only the files of a dictionary travel, and nothing in them is executed."""

import glob
from pathlib import Path

from .checkpoint import read_config
from .dictionary import CONFIG_FILE, WEIGHTS_FILE
from .formats import SourceFiles, dictionary_places
from .formats.base import ReadOptions
from .formats.files import recording
from .training_usage import USAGE_FILE


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
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE, USAGE_FILE]))
    except Exception as error:  # noqa: BLE001
        # Offline, unknown, private: whatever the client raises, the user needs to know what was looked for.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path_or_id}: no such directory, and the hub repository of that name could not be had ({reason})."
        ) from None


def push_to_hub(directory: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a checkpoint, a folder of them, or a dictionary in another library's format; return the repository's address.

    Only files that are read when it is loaded are uploaded, whatever else lies there.

    Raises:
        ValueError: If the directory holds no dictionary, or a damaged one; or the hub does not take it from here.
    """
    from huggingface_hub import HfApi

    files = files_of(Path(directory))
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(directory),
            allow_patterns=[glob.escape(name) for name in files],
            commit_message="Upload a sparsary dictionary",
        )
    except Exception as error:
        # Whatever the client raises: no login, no rights, a name that it does not take, no connection, HF_HUB_OFFLINE.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{repo_id}: could not be uploaded to ({type(error).__name__}: {reason}). Log in with `hf auth login` or HF_TOKEN, "
            "as somebody who may write there, check the name (OWNER/NAME) and the connection, and call it again."
        ) from error
    return commit.repo_url if isinstance(commit.repo_url, str) else str(commit.repo_url)


def files_of(directory: Path) -> list[str]:
    """The files that make up the dictionaries of a directory, by their paths in it.

    Raises:
        ValueError: If it holds none, or damaged ones.
    """
    folders = [""] if (directory / CONFIG_FILE).exists() else sorted(p.parent.name for p in directory.glob(f"*/{CONFIG_FILE}"))
    if folders or not directory.is_dir():
        for folder in folders or [""]:
            read_config(directory / folder)
        names = [f"{folder}/{name}".lstrip("/") for folder in folders for name in (WEIGHTS_FILE, CONFIG_FILE, USAGE_FILE)]
        return [name for name in names if not name.endswith(USAGE_FILE) or (directory / name).exists()]
    try:
        found = dictionary_places(SourceFiles(directory))
        with recording() as opened:
            for place, known, _ in found:
                known.read(place, ReadOptions())
    except ValueError as error:
        raise ValueError(f"{directory}: expected {CONFIG_FILE}, or another library's dictionary: {error}") from None
    base = directory.absolute()
    return sorted({path.absolute().relative_to(base).as_posix() for path in opened if path.absolute().is_relative_to(base)})
