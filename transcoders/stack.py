"""Stack: dictionaries of one model, indexed by the hook they read or write."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..sae.checkpoint import load_dictionary
from ..sae.checkpoint_files import CONFIG_FILE, read_config
from ..sae.dictionary import SparseDictionary
from ..sae.files import natural_order
from ..sae.inspection import hooks_of_provenance


class Stack(Mapping[str, SparseDictionary]):
    """Mapping of dictionaries of one model by the hook they write; ``stack[hook]`` also accepts the hook they read.

    On disk a stack is a directory of checkpoints, such as a grid over layers writes.

    >>> from sparsary import ENCODERS, SAE, Stack
    >>> saes = {hook: SAE(8, 16, ENCODERS["topk"](k=2)) for hook in ("h.0:out", "h.1:out")}
    >>> stack = Stack(saes, {hook: {"hook": hook} for hook in saes})
    >>> list(stack), stack["h.1:out"].n_latents
    (['h.0:out', 'h.1:out'], 16)
    """

    def __init__(self, dictionaries: Mapping[str, SparseDictionary], provenances: Mapping[str, dict[str, Any]]):
        self.dictionaries, self.provenances = dict(dictionaries), dict(provenances)
        for hook, dictionary in self.dictionaries.items():
            dictionary.provenance = self.provenances[hook]
        self._reads = {hooks_of_provenance(p)[0][0]: hook for hook, p in self.provenances.items()}

    def __getitem__(self, hook: str) -> SparseDictionary:
        key = hook if hook in self.dictionaries else self._reads.get(hook)
        if key is None:
            raise KeyError(f"{hook}: expected one of {', '.join(self.dictionaries)}.")
        return self.dictionaries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.dictionaries)

    def __len__(self) -> int:
        return len(self.dictionaries)

    def __repr__(self) -> str:
        members = "".join(f"\n  {hook}: {dictionary!r}" for hook, dictionary in self.dictionaries.items())
        return f"Stack of {len(self)}:{members}"

    def save(self, directory: str | Path) -> None:
        """Write every dictionary to a subfolder named after its hook."""
        for hook, dictionary in self.dictionaries.items():
            name = re.sub(r"[^\w.-]+", "-", hook)
            dictionary.save(Path(directory) / name, self.provenances[hook])


def is_stack(directory: str | Path) -> bool:
    """Return True if a directory is not itself a checkpoint but contains checkpoints."""
    return not (Path(directory) / CONFIG_FILE).exists() and bool(stack_folders(directory))


def load_stack(directory: str | Path, device: str | torch.device = "cpu") -> Stack:
    """Load all checkpoints in a directory as a ``Stack``, in the order of their layers.

    >>> import tempfile
    >>> from sparsary import ENCODERS, SAE
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for hook in ("h.0:out", "h.1:out"):
    ...         SAE(8, 16, ENCODERS["topk"](k=2)).save(f"{folder}/{hook[:3]}", {"hook": hook})
    ...     list(load_stack(folder))
    ['h.0:out', 'h.1:out']

    Raises:
        ValueError: If there are no checkpoints, two have the same hook, one reads several hooks, or their models differ.
    """
    paths = stack_folders(directory)
    if not paths:
        raise ValueError(f"{directory}: expected folders with {CONFIG_FILE} below it, found none. Train a grid over layers.")
    dictionaries: dict[str, SparseDictionary] = {}
    provenances: dict[str, dict[str, Any]] = {}
    found: dict[str, Path] = {}
    for path in paths:
        provenance = read_config(path)["provenance"]
        try:
            reads, writes = hooks_of_provenance(provenance)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if len(reads) > 1:
            raise ValueError(f"{path}: expected a dictionary of one hook in a stack, got one of {len(reads)}. Load it alone.")
        if writes[0] in found:
            raise ValueError(
                f"{directory}: expected one dictionary for each hook, got {found[writes[0]].name} and {path.name} for "
                f"{writes[0]}, as a grid leaves them. Name one of them: {path}"
            )
        found[writes[0]] = path
        dictionaries[writes[0]], provenances[writes[0]] = load_dictionary(path, device), provenance
    models = {str((provenance.get("model") or {}).get("id")) for provenance in provenances.values()}
    if len(models) > 1:
        raise ValueError(f"{directory}: expected dictionaries of one model, got {', '.join(sorted(models))}.")
    order = sorted(dictionaries, key=lambda hook: [int(number) for number in re.findall(r"\d+", hook)])
    return Stack({hook: dictionaries[hook] for hook in order}, {hook: provenances[hook] for hook in order})


def stack_folders(directory: str | Path) -> list[Path]:
    """Return the checkpoint folders directly inside a directory, layer 10 after layer 9."""
    found = (path.parent for path in Path(directory).glob(f"*/{CONFIG_FILE}"))
    return sorted(found, key=lambda path: natural_order(path.name))
