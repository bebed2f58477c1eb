"""Convert dictionaries between formats: written atomically, then read back to compare outputs."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..sae.dictionary import SparseDictionary
from ..sae.formats import FORMATS, CanonicalSAE, known, write_dictionaries, write_dictionary
from ..sae.formats.canonical import ActivationFn
from ..sae.formats.conversion import from_dictionary
from ..sae.one_site import OneSiteDictionary
from .load import NO_OPTIONS, CheckpointOptions, FoundDictionaries, Provenance, find
from .stack import Stack, hooks_of_provenance

# Target format: sparsary checkpoint, or a directory of them.
OURS = "sparsary"
# Number and seed of the random inputs on which source and result are compared.
TOKENS, SEED = 64, 0


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: what was read, how its format was detected, and what was written.

    ``difference`` is the norm of the change in outputs over the norm of the outputs, on random inputs, after reading the result
    back; ``None`` if the format stores no names by which several dictionaries could be matched.

    >>> from pathlib import Path
    >>> result = Converted(Path("new"), "saelens", "dictionary.json of sparsary", ("h.0:out",), (), (), ("cfg.json",), 0.0)
    >>> result.lines()[-1]
    ('outputs changed by', '0 of their norm')
    """

    directory: Path
    format: str
    evidence: str
    hooks: tuple[str, ...]
    done: tuple[str, ...]
    warnings: tuple[str, ...]
    files: tuple[str, ...]
    difference: float | None

    def lines(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs for display."""
        named = [("hook", ", ".join(self.hooks)), ("read as", self.evidence)]
        words = [("folded or renamed", word) for word in self.done] + [("doubt", word) for word in self.warnings]
        change = "not compared" if self.difference is None else f"{self.difference:.2g} of their norm"
        return [*named, *words, ("written as", f"{self.format}: {', '.join(self.files)}"), ("outputs changed by", change)]


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = OURS,
    *,
    hook: str | None = None,
    format: str | None = None,  # noqa: A002
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    thresholds: Mapping[str, float] | None = None,
    options: CheckpointOptions = NO_OPTIONS,
) -> Converted:
    """Write a dictionary as a sparsary checkpoint or in another library's format; several, one per hook, as a folder.

    >>> import tempfile
    >>> from sparsary import ENCODERS, SAE, convert
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     SAE(5, 7, ENCODERS["topk"](k=2)).save(f"{folder}/ours", {"hook": "h.0:out", "model": {"id": "m"}})
    ...     convert(f"{folder}/ours", f"{folder}/theirs", "saelens").files
    ('cfg.json', 'sae_weights.safetensors')

    Args:
        source: Path or Hugging Face repository id.
        destination: New or empty folder.
        to: ``sparsary``, or a format of ``docs/formats.md``.
        hook: Overrides the same field of ``options``, as do ``format``, ``subfolder`` and ``revision``.
        dtype: Precision of the result; ``auto`` keeps that of the files. sparsary checkpoints are always float32.
        thresholds: Per written hook, a threshold that replaces top-k selection, for libraries without top-k;
            ``eval.checkpoint.thresholds_of`` measures it.
        options: Facts that the files do not record.

    Raises:
        ValueError: If the destination is not empty, the format is unknown, or it cannot represent the dictionary. The
            destination is then left as it was.
    """
    if to != OURS and to not in FORMATS:
        try:
            known(to)
        except ValueError as error:
            raise ValueError(f"--to: {str(error).replace('expected one of', f'expected one of {OURS},')}") from None
    if to == OURS and dtype not in ("float32", "auto"):
        raise ValueError(f"--dtype: expected float32, the dtype of sparsary checkpoints, got {dtype!r}.")
    dtype = "float32" if to == OURS else dtype
    target = Path(destination)
    require_empty(target)
    options = options.updated(hook=hook, format=format, subfolder=subfolder, revision=revision)
    found = find(source, options, dtype=dtype)
    with _whole(target) as temporary:
        done = _written(found, temporary, to, thresholds or {})
        files = tuple(sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()))
        difference = _difference(found, temporary, to)
    words = tuple(dict.fromkeys((*found.notes, *done)))
    return Converted(target, to, found.evidence, tuple(found.dictionaries), words, found.warnings, files, difference)


def _written(found: FoundDictionaries, directory: Path, to: str, thresholds: Mapping[str, float]) -> tuple[str, ...]:
    """Write the dictionaries to an empty folder and return the format's notes."""
    hook, dictionary = next(iter(found.dictionaries.items()))
    alone = len(found.dictionaries) == 1 and not found.stacked
    if to == OURS:
        if alone:
            dictionary.save(directory, found.provenances[hook])
        else:
            for about in found.provenances.values():
                hooks_of_provenance(about)
            Stack(found.dictionaries, found.provenances).save(directory)
        return ()
    chosen = {hook: _by_threshold(d, found.provenances[hook], thresholds.get(hook)) for hook, d in found.dictionaries.items()}
    if alone:
        return write_dictionary(chosen[hook], directory, to, found.provenances[hook]).done
    members = write_dictionaries(chosen, directory, to, found.provenances)
    return tuple(word for n in members.values() for word in n.done)


def _by_threshold(dictionary: SparseDictionary, provenance: Provenance, level: float | None) -> SparseDictionary | CanonicalSAE:
    """Return the dictionary with top-k replaced by a threshold, if it has a single site and top-k."""
    if level is None or not isinstance(dictionary, OneSiteDictionary):
        return dictionary
    n = from_dictionary(dictionary, provenance)
    if not isinstance(n, CanonicalSAE) or n.gate.name not in ("topk", "topk_raw"):
        return dictionary
    words = f"the {n.gate.k} largest latents of a token as those above {level:.4g}, which as many exceed on average"
    return n.noting(words, gate=ActivationFn("threshold", k=n.gate.k, threshold=torch.tensor(float(level))))


@torch.no_grad()
def _difference(found: FoundDictionaries, directory: Path, to: str) -> float | None:
    again = find(directory, CheckpointOptions(format=None if to == OURS else to), dtype="auto").dictionaries
    if len(again) == len(found.dictionaries) == 1:
        pairs = [(next(iter(found.dictionaries.values())), next(iter(again.values())))]
    elif again.keys() == found.dictionaries.keys():
        pairs = [(dictionary, again[hook]) for hook, dictionary in found.dictionaries.items()]
    else:
        return None
    return max(_change(before, after) for before, after in pairs)


def _change(before: SparseDictionary, after: SparseDictionary) -> float:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(TOKENS, before.d_in, generator=generator).to(before.in_scale.dtype) * before.in_scale
    y, again = (dictionary(x.to(dictionary.in_scale.dtype)).double() for dictionary in (before, after))
    return float((again - y).norm() / y.norm().clamp_min(1e-30))


def require_empty(target: Path) -> None:
    """Raise ``ValueError`` unless the path does not exist or is an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: expected no such folder, or an empty one, got one that holds files. Choose another.")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``target`` that replaces it on success and is removed on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent.resolve()))
    try:
        # mkdtemp creates a private folder; the result gets the default permissions.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
