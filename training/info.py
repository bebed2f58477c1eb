"""Description of a checkpoint, a stack of checkpoints or an activation store, with verified checksums."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..sae.checkpoint import load_dictionary
from ..sae.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE, read_config
from ..sae.files import sha256
from ..sae.training_usage import TrainingUsage
from ..transcoders.load import NO_OPTIONS, CheckpointOptions, doubts_of_files, find
from ..transcoders.stack import hooks_of_provenance, is_stack, stack_folders
from .activations.shards import MANIFEST_FILE, ActivationStore


def describe_files(path: str, options: CheckpointOptions = NO_OPTIONS) -> tuple[list[tuple[str, str]], list[str]]:
    """Return a path's description as pairs of a name and a value, and one line for each damage found.

    Third-party dictionaries are checked when they are read: shapes, finite values, orientation, activation function.

    Raises:
        ValueError: If the path holds neither dictionaries nor a store, or its metadata or a third-party file is damaged.
    """
    if options.format is not None or options.subfolder is not None:
        return _describe_foreign(path, options), []
    directory = Path(path)
    if (directory / MANIFEST_FILE).exists():
        return _describe_store(ActivationStore.open(directory))
    if (directory / CONFIG_FILE).exists() or (directory / WEIGHTS_FILE).exists():
        return _describe_checkpoint(directory)
    if is_stack(directory):
        return _describe_members(directory)
    if directory.is_absolute() and not directory.exists():
        raise ValueError(f"{path}: expected a checkpoint, an activation store or another library's dictionary, found none.")
    try:
        return _describe_foreign(path, options), []
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a checkpoint ({CONFIG_FILE}), an activation store ({MANIFEST_FILE}) or another library's "
            f"dictionary, found none: {error}"
        ) from None


def _describe_foreign(path: str, options: CheckpointOptions) -> list[tuple[str, str]]:
    found = find(path, options)
    lines: list[tuple[str, str]] = []
    for name, dictionary in found.dictionaries.items():
        source, arguments = found.provenances[name], dictionary.arguments()
        encoder = _encoder(arguments["encoder"])
        text = source.get("text") or {}
        lines += [
            ("dictionary", f"{_sizes(arguments)}, {encoder}"),
            ("model", str((source.get("model") or {}).get("id", "unknown"))),
            *_hooks(source),
            *((key.replace("_", " "), str(value)) for key, value in text.items()),
            ("input scale", _span(dictionary.in_scale)),
        ]
    lines += [("read as", found.evidence), *(("folded or renamed", word) for word in found.notes)]
    return [*lines, *(("doubt", word) for word in found.warnings), ("self-check", "passed")]


def _describe_members(directory: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Return a line for each member of a stack or grid, and all damage found."""
    lines, problems = [], []
    for path in stack_folders(directory):
        own, damage = _describe_checkpoint(path)
        shown = dict(own)
        hooks = " -> ".join(shown[key] for key in ("hook", "reads", "predicts") if key in shown)
        lines.append((path.name, f"{shown['dictionary']}  {hooks}  checksum {shown['checksum']}"))
        problems += damage
    return [("checkpoints", f"{len(lines)} in {directory}"), *lines], problems


def _describe_store(store: ActivationStore) -> tuple[list[tuple[str, str]], list[str]]:
    manifest = store.manifest
    lines = [
        (
            "activation store",
            f"{store.directory}  {'complete' if manifest['complete'] else 'interrupted: harvest again to continue'}",
        ),
        ("model", f"{manifest['model']['id']}  {manifest['model']['dtype']}"),
        *_tuned(manifest["model"]),
        ("text", f"{manifest['text']['source']}, contexts of {manifest['text']['context_length']} tokens"),
        ("tokens", f"{store.tokens('train'):,} training, {store.tokens('heldout'):,} held-out, stored as {manifest['dtype']}"),
        ("excluded", _excluded(manifest["exclude"]["special"], manifest["exclude"]["leading"])),
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


def _tuned(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a line about the second of two models."""
    tuned = model.get("tuned")
    return [("tuned model", f"{tuned['id']}  {tuned['dtype']}")] if tuned else []


# Kinds that reconstruct what they read, on one scale.
ONE_SIDED = ("sae", "crosscoder")


def _describe_checkpoint(directory: Path) -> tuple[list[tuple[str, str]], list[str]]:
    config = read_config(directory)
    dictionary = load_dictionary(directory)
    source = config["provenance"]
    arguments = _encoder(config["dictionary"]["encoder"])
    matches = sha256(directory / WEIGHTS_FILE) == config.get("weights_sha256")
    lines = [
        ("dictionary", f"{_sizes(config['dictionary'])}, {arguments}"),
        ("parameters", f"{sum(p.numel() for p in dictionary.parameters()):,}"),
        ("model", str((source.get("model") or {}).get("id", "unknown"))),
        *_tuned(source.get("model") or {}),
        *_hooks(source),
        ("input scale", _span(dictionary.in_scale)),
        *([("output scale", _span(dictionary.out_scale))] if config["dictionary"]["kind"] not in ONE_SIDED else []),
        *_origin(source),
        *_usage(dictionary.training_usage),
        ("checksum", "matches" if matches else "differs"),
    ]
    damage = (
        f"{directory / WEIGHTS_FILE}: contents differ from the checksum in {CONFIG_FILE}: damaged, or a save was interrupted."
    )
    return lines, [] if matches else [damage]


def _encoder(arguments: Mapping[str, Any]) -> str:
    """Describe an encoder: ``topk, k 16``."""
    return ", ".join([str(arguments["name"]), *(f"{key} {value}" for key, value in arguments.items() if key != "name")])


def _excluded(special: bool, leading: int) -> str:
    parts = ["special tokens"] * bool(special) + [f"the first {leading} positions of every context"] * bool(leading)
    return " and ".join(parts) or "nothing"


def _origin(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how a dictionary was trained, or what it was converted from and how."""
    converted = provenance.get("converted")
    if converted is None:
        made = f"sparsary {provenance.get('sparsary_version')}, commit {str(provenance.get('git_commit') or 'unknown')[:12]}"
        doubts = [("doubt", word) for word in doubts_of_files(provenance)]
        return [("trained on", f"{provenance.get('training_tokens', 0):,} tokens"), ("made by", made), *doubts]
    lines = [("read as", converted["evidence"]), *(("folded or renamed", word) for word in converted["done"])]
    return [*lines, *(("doubt", word) for word in converted["warnings"])]


def _usage(usage: TrainingUsage | None) -> list[tuple[str, str]]:
    if usage is None:
        return []
    return [("dead in training", f"{usage.dead_fraction:.2%}, silent for {usage.window_tokens:,} tokens or more at its end")]


def _sizes(arguments: dict[str, Any]) -> str:
    """Return kind and widths, from the arguments in ``dictionary.json``."""
    if arguments["kind"] == "crosscoder":
        widths = list(map(str, arguments["widths"]))
        each = f"{len(widths)} x {widths[0]}" if len(set(widths)) == 1 else " + ".join(widths)
        return f"crosscoder {each} -> {arguments['n_latents']}"
    words = f"{arguments['kind']} {arguments['d_in']} -> {arguments['n_latents']}"
    if "d_out" in arguments:
        words += f" -> {arguments['d_out']}"
    if "n_layers" in arguments:
        words += f" over {arguments['n_layers']} layers{', joint' if arguments.get('joint') else ''}"
    return words + (", with skip" if arguments.get("skip") else "")


def _hooks(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        reads, writes = hooks_of_provenance(provenance)
    except ValueError:
        return [("hook", "unknown")]
    if reads == writes:
        return [("hooks" if len(reads) > 1 else "hook", ", ".join(reads))]
    return [("reads", ", ".join(reads)), ("predicts", ", ".join(writes))]


def _span(scale: Tensor) -> str:
    """Return one number, or the smallest and the largest of several layers."""
    low, high = float(scale.min()), float(scale.max())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
