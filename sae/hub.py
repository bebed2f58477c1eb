"""Checkpoints on the Hugging Face Hub: only a dictionary's own files are transferred, and none of them is executed."""

import glob
from pathlib import Path

from .checkpoint_files import CONFIG_FILE, WEIGHTS_FILE, read_config
from .formats import SourceFiles, dictionary_places
from .formats.base import ReadOptions
from .formats.files import recording
from .training_usage import USAGE_FILE


def local_directory(path_or_id: str, revision: str | None = None) -> Path:
    """Return the path itself if it exists, otherwise the downloaded (or cached) hub repository with that id.

    Raises:
        ValueError: If the repository cannot be downloaded.
    """
    path = Path(path_or_id)
    if path.exists() or path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        return path
    # Imported lazily: loading from disk must not require the hub's client.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE, USAGE_FILE]))
    except Exception as error:  # noqa: BLE001
        # Offline, unknown, or private: for any client error, the message must name what was requested.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path_or_id}: expected a directory or a Hugging Face Hub repository, but the download failed ({reason}). "
            "Check the name and the connection."
        ) from None


def push_to_hub(directory: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a checkpoint, a folder of them, or a dictionary in another library's format; return the repository's URL.

    Only the files needed to load it are uploaded; other files in the folder are ignored.

    >>> import tempfile
    >>> from sparsary import ENCODERS, SAE, push_to_hub
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     SAE(5, 7, ENCODERS["topk"](k=2)).save(folder)
    ...     files_of(Path(folder))  # these would be uploaded
    ['dictionary.safetensors', 'dictionary.json']
    >>> push_to_hub("runs/my-sae", "owner/my-sae")  # doctest: +SKIP
    'https://huggingface.co/owner/my-sae'

    Raises:
        ValueError: If the directory holds no dictionary or a damaged one, or the hub rejects the upload.
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
        # Any client error: not logged in, no write access, invalid name, no connection, HF_HUB_OFFLINE.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{repo_id}: could not be uploaded to ({type(error).__name__}: {reason}). Log in with `hf auth login` or HF_TOKEN, "
            "with write access to it, check the name (OWNER/NAME) and the connection, and call it again."
        ) from error
    return commit.repo_url if isinstance(commit.repo_url, str) else str(commit.repo_url)


def files_of(directory: Path) -> list[str]:
    """Return the files that make up the dictionaries of a directory, as relative paths.

    Raises:
        ValueError: If it holds no dictionaries or damaged ones.
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
