"""What a path holds: a checkpoint or an activation store, with its checksums verified."""

from pathlib import Path

from sae.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_dictionary, read_config
from sae.files import sha256

from .activations.shards import MANIFEST_FILE, Store


def describe(path: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of a name and a value for people to read, and one line for every damage found.

    Raises:
        ValueError: If the path holds neither a checkpoint nor a store, or its description is damaged.
    """
    directory = Path(path)
    if (directory / MANIFEST_FILE).exists():
        return _describe_store(Store.open(directory))
    if (directory / CONFIG_FILE).exists() or (directory / WEIGHTS_FILE).exists():
        return _describe_checkpoint(directory)
    raise ValueError(f"{path}: expected a checkpoint ({CONFIG_FILE}) or an activation store ({MANIFEST_FILE}), found neither.")


def _describe_store(store: Store) -> tuple[list[tuple[str, str]], list[str]]:
    manifest = store.manifest
    lines = [
        (
            "activation store",
            f"{store.directory}  {'complete' if manifest['complete'] else 'interrupted: harvest again to go on'}",
        ),
        ("model", f"{manifest['model']['id']}  {manifest['model']['dtype']}"),
        ("text", f"{manifest['text']['source']}, contexts of {manifest['text']['context_length']} tokens"),
        ("tokens", f"{store.tokens('train'):,} training, {store.tokens('heldout'):,} held-out, stored as {manifest['dtype']}"),
        ("excluded", f"special tokens: {manifest['exclude']['special']}, leading positions: {manifest['exclude']['leading']}"),
    ]
    for hook, entry in manifest["hooks"].items():
        variance = store.moments(hook).variance() / entry["width"]
        lines.append(
            (
                hook,
                f"width {entry['width']}, variance per dimension {variance:.4g}, lost to rounding {entry['rounding_fvu']:.2g}",
            )
        )
    problems = store.problems()
    lines.append(("checksums", f"{len(manifest['shards'])} shards, {len(problems)} damaged"))
    return lines, problems


def _describe_checkpoint(directory: Path) -> tuple[list[tuple[str, str]], list[str]]:
    config = read_config(directory)
    dictionary = load_dictionary(directory)
    source = config["provenance"]
    arguments = ", ".join(f"{key} {value}" for key, value in config["dictionary"]["encoder"].items())
    matches = sha256(directory / WEIGHTS_FILE) == config.get("weights_sha256")
    lines = [
        ("dictionary", f"{config['dictionary']['kind']} {dictionary.d_in} -> {dictionary.n_latents}, {arguments}"),
        ("model", str((source.get("model") or {}).get("id", "unknown"))),
        ("hook", str(source.get("hook", "unknown"))),
        ("input scale", f"{float(dictionary.in_scale):.6g}"),
        ("trained on", f"{source.get('training_tokens', 0):,} tokens"),
        ("made by", f"sparsary {source.get('sparsary_version')}, commit {source.get('git_commit')}"),
        ("checksum", "matches" if matches else "differs"),
    ]
    damage = (
        f"{directory / WEIGHTS_FILE}: contents differ from the checksum in {CONFIG_FILE}: damaged, or a save was interrupted."
    )
    return lines, [] if matches else [damage]
