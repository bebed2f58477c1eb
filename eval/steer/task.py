"""Model, texts and token sets of a contrast, read and checked before anything is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ...training.activations.limits import context_problems
from ...training.activations.model import load_model
from ...training.recipe import ModelSection
from ...training.tokens import padding_id, with_one_bos
from ..checkpoint import LoadedCheckpoint
from ..probing.subject import ProbeTarget, probe_source, probe_target
from .edits import FIRST, SteeredModel
from .outcomes import TokenClassifier
from .texts import (
    Lengths,
    Rows,
    Text,
    TextHalves,
    TokenSets,
    document_halves,
    frequent_tokens,
    lengths,
    prompts_of,
    read_rows,
    require_distinct,
    tokens_named,
)

PROMPTS, NEW_TOKENS = 40, 20


@dataclass(frozen=True)
class SteerTask:
    """Everything that the measurements share: the model, the texts' halves, prompts, and token sets."""

    subject: ProbeTarget
    steered: SteeredModel
    sizes: Lengths
    towards: TextHalves
    away_from: TextHalves
    neutral: TextHalves
    sets: TokenSets
    classifier: TokenClassifier
    padding: int

    def prompts(self, half: int) -> Int[Tensor, "prompts positions"]:
        """Return prompts from the text steered from: of its choosing half (0) or its reporting half (1)."""
        return prompts_of(self.away_from[half], self.sizes.prompt, PROMPTS, "--from")


def steered_subject(opened: LoadedCheckpoint) -> ProbeTarget:
    """Return the SAE of a checkpoint with its model.

    Raises:
        ValueError: If it is no SAE of one hook, or its model is unknown or does not generate text.
    """
    dictionary, source = probe_source(opened)
    kind, reads, writes = dictionary.arguments()["kind"], source["hooks_in"], source["hooks_out"]
    if len(dictionary.sites) > 1 or kind != "sae" or reads != writes:
        raise ValueError(
            f"{opened.name}: expected an SAE, which writes to the hook that it reads, got kind {kind}. Its latents are "
            "added by hand: LanguageModel.generate(prompt, steer=[(dictionary, latent, amount)])."
        )
    subject = probe_target(dictionary, load_model(ModelSection.model_validate(source["model"])), source)
    if not hasattr(subject.model.module, "generate"):
        raise ValueError(
            f"{subject.model.id}: expected a model that generates text, got {type(subject.model.module).__name__}."
        )
    if problems := context_problems(subject.model, subject.text.context_length):
        raise ValueError("\n".join(problems))
    return subject


def steer_task(
    subject: ProbeTarget,
    towards: Text,
    away_from: Text,
    neutral: Text | None,
    tokens: Sequence[str] | None,
    documents: int,
    seed: int,
) -> SteerTask:
    """Read and check the texts, and return what the measurements need.

    Raises:
        ValueError: If a text cannot be used, a token does not exist, or no token tells the two texts apart.
    """
    tokenizer, section = subject.model.tokenizer, subject.text
    sizes = lengths(section.context_length, NEW_TOKENS)
    # Room for the prefix.
    longest = sizes.document - sizes.prefix
    read: dict[str, Rows] = {}
    for option, text in (("--towards", towards), ("--from", away_from), ("--neutral", neutral)):
        if text is not None:
            read[option] = read_rows(text, option, section, tokenizer, documents, longest)
    require_distinct(read["--towards"], read["--from"])
    split = {option: document_halves(rows, seed) for option, rows in read.items()}
    steered = SteeredModel(subject, seed)
    vocabulary = subject.model.logits(torch.zeros((1, 1), dtype=torch.long, device=subject.model.device)).shape[-1]
    special = [token for token in tokenizer.all_special_ids if token < vocabulary]
    a, b = split["--towards"], split["--from"]
    sets = frequent_tokens(a.choosing, b.choosing, vocabulary, special)
    if tokens is not None:
        target = tokens_named(tokens, tokenizer, vocabulary)
        sets = TokenSets(target, sets.contrast & ~target)
    if not sets.target.any():
        raise ValueError(
            "--towards: expected tokens that are more frequent there than in --from, found none. Give more text, or the "
            "tokens: --tokens LIST."
        )
    pairs = (a.choosing, b.choosing), (a.reporting, b.reporting)
    classifier = TokenClassifier.fitted(*pairs, sizes.new, special, vocabulary)
    return SteerTask(subject, steered, sizes, a, b, split.get("--neutral", a), sets, classifier, padding_id(tokenizer))


def given_prompt_ids(task: SteerTask, prompt: str) -> list[int]:
    """Return the token ids of a prompt, behind BOS if the texts are.

    Raises:
        ValueError: If it is empty, or too long to be continued.
    """
    tokenizer = task.subject.model.tokenizer
    bos = None if task.subject.text.bos == "none" else tokenizer.bos_token_id
    ids = with_one_bos(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"], bos)
    most = task.sizes.document - task.sizes.prefix - task.sizes.new
    if not FIRST < len(ids) <= most:
        raise ValueError(f"--prompt: expected {FIRST + 1} to {most} tokens, BOS included, got {len(ids)}: {prompt!r}.")
    return ids
