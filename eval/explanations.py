"""What every entry of a report says: the texts of the report's page and of docs/report.md."""

from .registry import GROUPS

PROVENANCE = "Dictionary and data"
OWN: dict[str, str] = {
    "report_version": "Version of this report's format. A changed definition gets a new name.",
    "checkpoint": "Where the dictionary was loaded from.",
    "kind": "What is mapped: an sae maps an activation to itself, a transcoder what a part of the model reads to what it "
    "writes. What is to be reconstructed, for an sae the activation itself, is called the target.",
    "encoder": "How latents are chosen: the variant and its arguments.",
    "d_in": "Width of the activation that is read.",
    "d_out": "Width of the activation that is written; d_in for an sae.",
    "n_latents": "How many latents (learned units) the dictionary has.",
    "selection": "How latents were chosen while judging; 'per token' is how a dictionary is used.",
    "hook": "Module path and side of the activation the dictionary was trained on; of a transcoder, of both activations.",
    "model": "The language model whose activations these are.",
    "text": "The corpus. Only documents held out from training are evaluated.",
    "training_tokens": "Tokens trained on; a token seen twice counts twice.",
    "git_commit": "Version of the code that trained the dictionary.",
    "documents": "Held-out documents scored. The mean and the linear error were fitted on others.",
    "tokens": "Tokens scored. Excluded positions (special tokens, the first few of a context) are not among them.",
    "reasons": "Entry -> why it is null. Nothing in a report is NaN or infinite.",
}


def explained() -> dict[str, dict[str, str]]:
    """Section -> entry -> explanation: the suite's own, then those of all groups of metrics, in their order."""
    found = {PROVENANCE: dict(OWN)}
    for group in GROUPS:
        for section, entries in group.explanations.items():
            found.setdefault(section, {}).update(entries)
    return found


EXPLANATIONS = explained()
