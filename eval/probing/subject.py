"""Inputs of the probing tasks: a dictionary, its language model, and its sparse codes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ...sae import SparseCode, SparseDictionary
from ...training.activations.model import LanguageModel
from ...training.recipe import HarvestSection, TextSection
from ...transcoders.stack import hooks_of_provenance
from ..checkpoint import LoadedCheckpoint
from ..sanity import ROWS_AT_ONCE


@dataclass(frozen=True)
class ProbeTarget:
    """A dictionary with its language model, the hook it reads, and the settings of its training text."""

    dictionary: SparseDictionary
    model: LanguageModel
    hook: str
    text: TextSection
    section: HarvestSection
    provenance: dict[str, Any]

    @property
    def embedded(self) -> bool:
        """True on the embedded model and corpus, where the factors behind every token are known."""
        return factors_known(self.provenance)

    @property
    def in_place(self) -> bool:
        """True if the dictionary reconstructs its own input, so that its output can be spliced in at the hook."""
        hooks = (self.provenance.get("hooks_in"), self.provenance.get("hooks_out"))
        return self.dictionary.d_in == self.dictionary.d_out and hooks[0] == hooks[1]

    def encode(self, x: Tensor) -> SparseCode:
        return self.dictionary.encode(x.to(self.dictionary.device))

    def require_in_place(self, task: str) -> None:
        """Raise ``ValueError`` if the reconstruction cannot be spliced in at the hook."""
        if not self.in_place:
            raise ValueError(
                f"--task {task}: expected a dictionary that maps the activation at {self.hook} to itself (an SAE), got one "
                f"that writes elsewhere. Leave the task out, or try: --task factors --task sparse_probing."
            )


def probe_source(opened: LoadedCheckpoint) -> tuple[SparseDictionary, dict[str, Any]]:
    """Return the dictionary of a checkpoint, and its provenance with all that is needed to run the model.

    Raises:
        ValueError: If the model or hook is unknown, or there are several hooks.
    """
    # The embedded corpus is the only training text that probing reads: others need not be there, nor be compared.
    embedded = (opened.members[0].provenance.get("text") or {}).get("source") == "embedded"
    opened = opened.completed(text=embedded or bool(opened.options.text))
    if opened.in_place_together:
        raise ValueError(f"{opened.name}: expected a dictionary of one hook, got one of several. Name one: --hook HOOK.")
    return opened.members[0].dictionary, opened.members[0].provenance


def factors_known(source: dict[str, Any]) -> bool:
    """Return True for the provenance of a dictionary of the embedded model and corpus, whose factors are known."""
    return TextSection.model_validate(source["text"]).source == "embedded" and source["model"]["id"] == "embedded"


def probe_target(dictionary: SparseDictionary, model: LanguageModel, source: dict[str, Any]) -> ProbeTarget:
    """Build a probe target from a loaded dictionary and model; ``source`` is the checkpoint's provenance.

    Raises:
        ValueError: If the dictionary has several sites, or its width differs from the hook's.
    """
    if len(dictionary.sites) != 1:
        raise ValueError(f"checkpoint: expected a dictionary of one hook, got one of {len(dictionary.sites)}.")
    hook = hooks_of_provenance(source)[0][0]
    width = model.widths((hook,))[hook]
    if width != dictionary.d_in:
        raise ValueError(f"{hook}: expected width {dictionary.d_in}, the dictionary's d_in, got {width} from {model.id}.")
    text = TextSection.model_validate(source["text"])
    section = HarvestSection(hooks=(hook,), tokens=1, **source["harvest"])
    return ProbeTarget(dictionary.to(model.device).eval(), model, hook, text, section, source)


@torch.no_grad()
def sparse_codes(subject: ProbeTarget, x: np.ndarray) -> sparse.csc_array:
    """Encode rows of activations and return the nonzero entries of their codes, ``(rows, n_latents)``."""
    rows, columns, values, start = [], [], [], 0
    for part in torch.from_numpy(x).split(ROWS_AT_ONCE):
        code = subject.encode(part)
        fires = code.values != 0
        rows.append((code.token_ids()[fires] + start).cpu().numpy())
        columns.append(code.latents[fires].cpu().numpy())
        values.append(code.values[fires].float().cpu().numpy())
        start += len(part)
    shape = (len(x), subject.dictionary.n_latents)
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csc_array(sparse.coo_array(entries, shape=shape))


def latent_writes(subject: ProbeTarget) -> np.ndarray:
    """Return the decoder directions in raw activation units, one row per latent."""
    dictionary = subject.dictionary
    return (dictionary.atoms * dictionary.out_scale).detach().float().cpu().numpy()
