"""EleutherAI's sparsify and its predecessor sae: ``cfg.json`` and ``sae.safetensors`` in a folder named after the module.

Only the folder name gives the module, as a path within the base transformer, such as ``layers.3.mlp``; with several seeds it
contains the folders ``seed0``, ... SAEs are trained on the module's output; transcoders map its input to its output. Source:
the code of eai-sparsify 1.3.3, and that of ``sae`` before it.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..files import write_json, write_tensors
from .base import Read, ReadOptions, SetFormat, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles
from .folding import fold_all, fold_b_in, fold_b_out_in, fold_equal_norms, fold_norms
from .hooks import ARCHITECTURES, architecture_of
from .origin import config_above, hooks_from_files, model_of, originated, public_model

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
# A configuration has at least one of these fields.
MARKS = ("expansion_factor", "num_latents", "transcode", "normalize_decoder")
# Native names -> sparsify's names, the current one first.
NAMES = {
    "W_enc": ("encoder.weight", "W_enc"),
    "b_enc": ("encoder.bias", "b_enc"),
    "W_dec": ("W_dec", "decoder.weight"),
    "b_dec": ("b_dec", "decoder.bias"),
    "W_skip": ("W_skip",),
}
# Names of earlier versions that leave the orientation open, so that it is taken from the shape.
UNSURE = ("W_enc", "decoder.weight")
GATES = {"topk": "topk", "groupmax": "group_max"}
SEED = r"seed\d+"


class Sparsify(SetFormat):
    name = "sparsify"
    title = "sparsify"

    def detect(self, source: SourceFiles) -> str | None:
        if not (source.has(CONFIG) and source.has(WEIGHTS)):
            return None
        cfg = source.json(CONFIG)
        found = [key for key in MARKS if isinstance(cfg, dict) and key in cfg]
        return f"{CONFIG} with {', '.join(found)} and {WEIGHTS}" if found else None

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        cfg, where = source.config(CONFIG), source.path(WEIGHTS)
        run = config_above(source, RUN, 2)
        n = _dictionary(where, cfg, run, source.tensors(WEIGHTS), options)
        name, model = hookpoint(source), options.model or run.get("model")
        model = model if isinstance(model, str) else None
        module = module_path(name, model)
        sides = (
            (module and f"{module}:in", module and f"{module}:out") if n.kind == "transcoder" else (module and f"{module}:out",)
        )
        length = run.get("ctx_len")
        return originated(
            n,
            self.name,
            cfg,
            options,
            hook=sides[0] or name,
            hook_out=sides[-1] if n.kind == "transcoder" else None,
            model=model,
            text={"context_length": length} if isinstance(length, int) else None,
        )

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        if isinstance(n, CanonicalCrossLayer):
            raise ValueError("sparsify: the format has no cross-layer transcoders that it can load. Use --to circuit_tracer.")
        self.write_set({"": n}, directory)

    def write_set(self, members: Mapping[str, CanonicalSAE], directory: Path) -> None:
        # sparsify loads a folder whose direct subfolders are named after modules.
        folders: dict[str, CanonicalSAE] = {}
        for hook, n in members.items():
            name = _folder(n) or re.sub(r"[^\w.-]+", "-", hook)
            if name in folders:
                raise ValueError(
                    f"sparsify: expected one dictionary for each module, got two for {name}. Write them one by one."
                )
            folders[name] = _prepared(n)
        alone = len(folders) == 1 and next(iter(folders)) in ("", directory.name)
        cfg: dict[str, Any] = {}
        for name, n in folders.items():
            cfg = _write(n, directory if alone else directory / name)
        first = next(iter(folders.values()))
        about = {"model": public_model(model_of(first)), "ctx_len": (first.provenance.get("text") or {}).get("context_length")}
        if not alone and any(about.values()):
            write_json(directory / RUN, {"sae": cfg} | {key: value for key, value in about.items() if value is not None})


def _folder(n: CanonicalSAE) -> str:
    """Return the folder name of a dictionary, or an empty string if its hooks are unknown.

    Raises:
        ValueError: For an SAE on a module's input, since the library trains SAEs on module outputs.
    """
    reads, writes = hooks_from_files(n)
    if reads is None or writes is None:
        return ""
    if n.kind == "sae" and writes.endswith(":in"):
        earlier = re.fullmatch(r"(.*\.)(\d+):in", writes)
        if earlier is None or earlier.group(2) == "0":
            raise ValueError(
                f"sparsify: {writes}: expected the output of a module, which the format names folders after, got an input. Use "
                "--to saelens or dictionary_learning."
            )
        # A block's input is the previous block's output.
        writes = f"{earlier.group(1)}{int(earlier.group(2)) - 1}:out"
    return folder_name(writes)


def _write(n: CanonicalSAE, folder: Path) -> dict[str, Any]:
    """Write a prepared dictionary and return its configuration."""
    assert n.W_enc is not None
    assert n.b_enc is not None
    tensors = {"encoder.weight": n.W_enc, "encoder.bias": n.b_enc, "W_dec": n.W_dec, "b_dec": n.b_out}
    tensors |= {} if n.W_skip is None else {"W_skip": n.W_skip}
    cfg = {
        "activation": "topk" if n.gate.name == "topk" else "groupmax",
        "expansion_factor": max(n.n_latents // n.d_in, 1),
        "normalize_decoder": False,
        "num_latents": n.n_latents,
        "k": n.gate.k,
        "multi_topk": False,
        "skip_connection": n.W_skip is not None,
        "transcode": n.kind == "transcoder",
        "d_in": n.d_in,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The library loads all tensors in the dtype of the first one.
    write_tensors(folder / WEIGHTS, {name: tensor.to(n.W_dec.dtype) for name, tensor in tensors.items()}, {})
    write_json(folder / CONFIG, cfg)
    return cfg


def hookpoint(source: SourceFiles) -> str:
    """Return the module path given by the folder name, ignoring seed subfolders."""
    parts = PurePosixPath(source.inside).parts if source.inside else Path(source.root).absolute().parts
    parts = parts if not source.inside or source.remote else (*Path(source.root).absolute().parts, *parts)
    names = [part for part in parts if not re.fullmatch(SEED, part)]
    return names[-1] if names else source.name


def module_path(name: str, model: str | None) -> str | None:
    """Return the path within the full model of a path within the base transformer; ``None`` if the architecture is unknown."""
    found = re.fullmatch(r"(h|layers)\.\d+((?:\.\w+)*)", name)
    if found is None:
        return name if re.fullmatch(r"(model|transformer|gpt_neox)\.(h|layers)\.\d+(\.\w+)*", name) else None
    architecture = ARCHITECTURES.get(architecture_of(model) or "")
    if architecture is not None:
        base, _, blocks = architecture.blocks.rpartition(".")
        return f"{base}.{name}" if blocks == found.group(1) else None
    if found.group(1) == "h":
        return f"transformer.{name}"
    if found.group(2).startswith((".attention", ".mlp.dense_")):
        return f"gpt_neox.{name}"
    # layers.3 alone exists in several architectures.
    return f"model.{name}" if re.match(r"\.(self_attn|mlp\.(gate|up|down)_proj)", found.group(2)) else None


def folder_name(hook: str) -> str:
    """Return a hook's module as a path within the base transformer."""
    module = hook.rsplit(":", 1)[0]
    bases = {architecture.blocks.rpartition(".")[0] for architecture in ARCHITECTURES.values()}
    base, _, rest = module.partition(".")
    return rest if base in bases else module


def _dictionary(
    where: object, cfg: Mapping[str, Any], run: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions
) -> CanonicalSAE:
    """Build the dictionary from a configuration and its tensors, without provenance."""
    found = named(where, tensors)
    d_in = cfg.get("d_in")
    if not isinstance(d_in, int) or d_in < 1:
        raise ValueError(f"{where}: d_in: expected a whole number in {CONFIG}, got {d_in!r}.")
    latents, factor = cfg.get("num_latents"), cfg.get("expansion_factor")
    if latents in (None, 0) and isinstance(factor, int):
        latents = d_in * factor
    if not isinstance(latents, int) or latents < 1:
        raise ValueError(f"{where}: num_latents: expected a whole number, or expansion_factor, got {cfg.get('num_latents')!r}.")
    W_enc, enc_note = rows(where, found, "W_enc", latents, d_in)
    W_dec, dec_note = rows(where, found, "W_dec", latents, d_in)
    zeros = [key for key in ("b_enc", "b_dec") if key not in found]
    b_enc = found["b_enc"][1] if "b_enc" in found else torch.zeros(latents, dtype=W_enc.dtype)
    b_dec = found["b_dec"][1] if "b_dec" in found else torch.zeros(d_in, dtype=W_dec.dtype)
    skip = found["W_skip"][1] if "W_skip" in found else None
    if skip is not None:
        require_shape(where, "W_skip", tuple(skip.shape), (d_in, d_in))
    if cfg.get("skip_connection", skip is not None) != (skip is not None):
        there = "no W_skip" if skip is None else "W_skip"
        raise ValueError(
            f"{where}: skip_connection: {cfg['skip_connection']} in {CONFIG} contradicts the file, which has {there}."
        )
    nested = run.get("sae")
    # Earlier versions set transcode for the whole run.
    whole = run.get("transcode", nested.get("transcode") if isinstance(nested, dict) else None)
    transcode = bool(cfg.get("transcode", whole))
    subtracts = not transcode if options.subtract_b_dec is None else options.subtract_b_dec
    old = "activation" not in cfg and transcode and options.subtract_b_dec is None
    notes = [note for note in (enc_note, dec_note) if note] + [f"{key} missing, zeros" for key in zeros]
    doubt = "a transcoder of an old version: before February 2025 b_dec was also subtracted from inputs, and no field says so"
    return CanonicalSAE(
        kind="transcoder" if transcode else "sae",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_out=b_dec,
        gate=_activation_fn(where, cfg, latents, options),
        b_in=b_dec if subtracts else None,
        W_skip=skip,
        done=tuple(notes),
        warnings=(f"{doubt}. If its fvu is poor, load it with subtract_b_dec=true",) if old else (),
    )


def named(where: object, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Return the original name and tensor for each native name.

    Raises:
        ValueError: If a matrix is missing, or a tensor is unknown or present under two names.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for ours, names in NAMES.items():
        present = [name for name in names if name in tensors]
        if len(present) > 1:
            raise ValueError(f"{where}: expected one of {', '.join(names)}, got {' and '.join(present)}.")
        if present:
            found[ours] = (present[0], tensors[present[0]])
    for ours in ("W_enc", "W_dec"):
        if ours not in found:
            require_keys(where, tensors, (NAMES[ours][0],))
    unknown = sorted(set(tensors) - {theirs for theirs, _ in found.values()})
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(n[0] for n in NAMES.values())}, got also {', '.join(unknown)}.")
    return found


def rows(
    where: object, found: Mapping[str, tuple[str, Tensor]], ours: str, latents: int, width: int
) -> tuple[Tensor, str | None]:
    """Return a matrix with latents first, and a note if it was renamed or transposed.

    Raises:
        ValueError: If the shape contradicts the name, or the name leaves the orientation open and the matrix is square.
    """
    name, tensor = found[ours]
    if name not in UNSURE:
        require_shape(where, name, tuple(tensor.shape), (latents, width))
        return tensor, None
    if latents == width:
        raise ValueError(
            f"{where}: {name}: expected {NAMES[ours][0]}, because the orientation of a square {name} is ambiguous. "
            f"Rename it to {NAMES[ours][0]} in the file, with latents as rows."
        )
    if tuple(tensor.shape) == (width, latents):
        return tensor.T, f"{name} transposed to {ours}"
    require_shape(where, name, tuple(tensor.shape), (latents, width))
    return tensor, f"{name} renamed {ours}"


def _activation_fn(where: object, cfg: Mapping[str, Any], latents: int, options: ReadOptions) -> ActivationFn:
    k = cfg.get("k") if options.k is None else options.k
    activation = cfg.get("activation", "topk")
    if not isinstance(activation, str) or activation not in GATES:
        raise ValueError(f"{where}: activation: expected one of {', '.join(GATES)}, got {activation!r}.")
    if activation == "groupmax" and (not isinstance(k, int) or k < 1 or latents % k):
        raise ValueError(f"{where}: k: expected a divisor of the {latents} latents for groupmax, got {k!r}.")
    if cfg.get("signed"):
        return ActivationFn("abs_topk", k=k)
    return ActivationFn(GATES[activation], k=k)


def _prepared(n: CanonicalSAE) -> CanonicalSAE:
    """Return an equivalent form that sparsify supports.

    Raises:
        ValueError: If there is none.
    """
    reasons = {
        "relu": "it keeps the same number of latents for every token",
        "threshold": "it keeps the same number of latents for every token",
        "gated": "it has no gated encoder",
        "topk_raw": "its topk applies relu",
        "abs_topk": "it no longer has signed latents",
        "pursuit": "it has no matching pursuit",
    }
    if n.gate.name in reasons:
        instead = "dictionary_learning or saelens" if n.kind == "sae" else "circuit_tracer"
        raise ValueError(f"sparsify: cannot represent {n.gate.name}: {reasons[n.gate.name]}. Use --to {instead}.")
    if n.row_norm is not None:
        raise ValueError(f"sparsify: row_norm: expected null, as the library has none, got {n.row_norm}. Use --to saelens.")
    if n.d_in != n.d_out:
        raise ValueError(f"sparsify: expected d_out = d_in = {n.d_in}, as the format has one width, got d_out = {n.d_out}.")
    n = fold_all(n)
    n = fold_norms(n) if n.gate.by_norm else fold_equal_norms(n)
    return fold_b_out_in(n) if n.kind == "sae" else fold_b_in(n)
