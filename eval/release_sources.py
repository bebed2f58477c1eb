"""Sources of the directory of published dictionaries: SAELens's registry file, and sets that it does not list."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..sae.formats.hooks import hub_model
from ..transcoders.releases import PublishedDictionary, Release, refreshed_file, write_releases

REGISTRY = "https://raw.githubusercontent.com/decoderesearch/SAELens/main/sae_lens/pretrained_saes.yaml"
# Far above the registry's size (1.5 MB); whatever answers with more is not it.
REGISTRY_BYTES = 1 << 26
SECONDS = 60
# More dictionaries than this are listed by release.
ROWS = 60
# Whole repositories: cross-layer transcoders and sets of one transcoder per layer. Source: the table of circuit-tracer 0.5.0's
# description, and the description of sparsify 1.3.3.
REPOSITORIES = {
    "mntss/gemma-scope-transcoders": "google/gemma-2-2b",
    "mntss/clt-gemma-2-2b-426k": "google/gemma-2-2b",
    "mntss/clt-gemma-2-2b-2.5M": "google/gemma-2-2b",
    "mntss/transcoder-Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "mntss/clt-llama-3.2-1b-524k": "meta-llama/Llama-3.2-1B",
    "mntss/clt-131k": "openai/gpt-oss-20b",
    "EleutherAI/sae-llama-3-8b-32x": "meta-llama/Meta-Llama-3-8B",
    "EleutherAI/sae-pythia-160m-32x": "EleutherAI/pythia-160m",
}
SOURCES = ("SAELens's pretrained_saes.yaml", "the descriptions of circuit-tracer 0.5.0 and sparsify 1.3.3")


def refresh_releases(registry: str | Path = REGISTRY, out: Path | None = None) -> Path:
    """Write the directory of releases anew, from SAELens's registry; return the file written.

    Args:
        registry: File or address (https) of the registry.
        out: File to write; by default that in the user's cache.

    Raises:
        ValueError: If the registry cannot be read, or is of another layout.
    """
    releases = [*releases_of(_read(str(registry)), str(registry)), *whole_repositories()]
    path = out or refreshed_file()
    write_releases(path, releases, SOURCES, datetime.datetime.now(datetime.UTC).date().isoformat())
    return path


def table_of_releases(found: Sequence[PublishedDictionary]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table: a row for each dictionary or, of more than ``ROWS``, for each release."""
    if len(found) <= ROWS:
        return ["name", "Neuronpedia", "model", "l0"], [
            [d.name, d.neuronpedia or "", d.model or "", "" if d.l0 is None else f"{d.l0:g}"] for d in found
        ]
    by_release: dict[str, list[PublishedDictionary]] = {}
    for d in found:
        by_release.setdefault(d.release, []).append(d)
    rows = []
    for name, members in by_release.items():
        known = [d.l0 for d in members if d.l0 is not None]
        low, high = (min(known), max(known)) if known else (None, None)
        span = "" if low is None else f"{low:g}" if low == high else f"{low:g} to {high:g}"
        rows.append([name, members[0].repository, members[0].model or "", f"{len(members):,}", span])
    return ["release", "repository", "model", "dictionaries", "l0"], rows


def whole_repositories() -> Iterator[Release]:
    """Yield the releases that are one hub repository, loaded whole; their name is its id."""
    for name, model in REPOSITORIES.items():
        yield Release(name, name, model, (PublishedDictionary(name, name, name, "", model),))


def releases_of(registry: Any, where: str) -> Iterator[Release]:
    """Yield the releases of a registry: a mapping from names to repository, model and dictionaries.

    Raises:
        ValueError: If it has another layout.
    """
    if not isinstance(registry, Mapping) or not registry:
        raise ValueError(f"{where}: expected a mapping of releases, got {type(registry).__name__}.")
    for name, entry in registry.items():
        try:
            model = hub_model(entry["model"])
            # A layer of a cross-layer transcoder, addressed by its number, is no dictionary of its own here.
            own = [member for member in entry["saes"] if isinstance(member.get("path"), str)]
            rows = [
                PublishedDictionary(
                    f"{name}/{member['id']}",
                    str(name),
                    str(entry["repo_id"]),
                    member["path"],
                    model,
                    None if member.get("l0") is None else float(member["l0"]),
                    member.get("neuronpedia"),
                )
                for member in own
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{where}: {name}: expected repo_id, model and saes with id and path, got something else ({error})."
            ) from None
        if rows:
            yield Release(str(name), str(entry["repo_id"]), model, tuple(rows))


def _read(registry: str) -> Any:
    # Imported lazily: only refreshing needs it.
    import yaml

    text = _fetched(registry) if registry.startswith("https://") else _local(registry)
    try:
        # In C where that is installed, which takes seconds for the file's 45,000 lines.
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{registry}: expected YAML, got invalid YAML ({' '.join(str(error).split())}).") from None


def _local(registry: str) -> bytes:
    path = Path(registry)
    if not path.is_file():
        raise ValueError(f"{registry}: expected a file, or an address that begins with https://, found none.")
    return path.read_bytes()


def _fetched(address: str) -> bytes:
    # Imported lazily: a file needs no client.
    import httpx

    try:
        with httpx.stream("GET", address, timeout=SECONDS, follow_redirects=True) as answer:
            answer.raise_for_status()
            text = b""
            for part in answer.iter_bytes():
                text += part
                if len(text) > REGISTRY_BYTES:
                    raise ValueError(f"{address}: expected at most {REGISTRY_BYTES:,} bytes, got more.")
    except httpx.HTTPError as error:
        raise ValueError(
            f"{address}: could not be downloaded ({error}). Without a connection: sparsary list --refresh --registry FILE."
        ) from None
    return text
