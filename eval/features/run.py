"""Feature descriptions of a checkpoint: ``features.jsonl``, ``features.json`` and ``features.html``."""

import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...sae.dictionary import SparseDictionary
from ...sae.files import file_crc32, replacing, write_json
from ...training.activations.model import LanguageModel, each_model, load_model
from ...training.activations.model_pair import NAMES
from ...training.activations.model_source import RemoteCodeRefused
from ...training.bad_rows import counted
from ...training.chats import template_text
from ...training.recipe import HarvestSection, ModelSection, TextSection
from ...training.shortfalls import shortfall
from ...training.stages import stage
from ...training.text import require_text
from ...transcoders.crosscoder import Crosscoder
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ...transcoders.stack import hooks_of_provenance
from ..checkpoint import LoadedCheckpoint, open_checkpoint, section_of_vectors, with_model
from ..heldout import DEFAULT_TOKENS, eval_data, told_shortfalls
from ..pages.document import encoder_words
from ..pages.examples import RECORDS_DIGEST
from ..pages.render import render_file
from ..result import Features
from .autointerp import DEFAULT_SCORERS, SCORERS, Evidence, evidence, require_scorers, score_explanations
from .collect import FeatureText, Limits, collect_features
from .intervention import Continuations
from .llm_client import Chat, Endpoint, LocalChat
from .logit_lens import unembedding
from .neuronpedia.export import NeuronpediaExport, write_neuronpedia
from .neuronpedia.neurons import NeuronMoments
from .predicates import token_texts
from .records import SCHEMA_VERSION, SCORES, Described, FeatureRecord, describe_latents, effects_of, number
from .vectors import describe_vectors, vectors_summary

RECORDS_FILE, ABOUT_FILE = "features.jsonl", "features.json"

log = logging.getLogger(__name__)
# Folder that caches the explainer's answers.
ANSWERS = "answers"
NOT_CONTINUED = "there is no model to continue text"


@dataclass(frozen=True)
class Explainer:
    """Language model that explains latents and scores the explanations (automated interpretability).

    Attributes:
        model: Model name at ``address``; without an address, a local or Hugging Face Hub model.
        address: Base URL of an OpenAI-compatible API.
        latents: Number of latents to explain.
        key_env: Environment variable that holds the API key.
        scorers: How explanations are scored: detection, fuzzing, intervention (the model under study continues text with the
            latent added) or surprisal (a local explainer's loss).

    Example:
        >>> from sparsary import Explainer
        >>> Explainer("gpt-4o-mini", "https://api.openai.com/v1", latents=50).key_env
        'OPENAI_API_KEY'
    """

    model: str
    address: str | None = None
    latents: int = 20
    key_env: str = "OPENAI_API_KEY"
    requests_per_minute: int | float | None = None
    scorers: tuple[str, ...] = DEFAULT_SCORERS

    def __post_init__(self) -> None:
        require_scorers(self.scorers)

    def chat(self, cache: Path) -> Chat:
        if self.latents < 1:
            raise ValueError(f"--explain: expected at least 1 latent, got {self.latents}.")
        if self.address is None:
            try:
                return LocalChat(load_model(ModelSection(id=self.model)))
            except RemoteCodeRefused:
                raise ValueError(
                    f"--explainer: {self.model!r} needs Python code from its repository, which is not supported here. "
                    "Serve the model with another program, and give its --address."
                ) from None
        return Endpoint(self.address, self.model, self.key_env, cache, self.requests_per_minute)


def features(
    checkpoint: str | Path,
    out: str | Path | None = None,
    tokens: int | None = None,
    limits: Limits | None = None,
    explainer: Explainer | None = None,
    options: CheckpointOptions = NO_OPTIONS,
    model: LanguageModel | Any = None,
    tokenizer: Any = None,
    neuronpedia: NeuronpediaExport | str | Path | None = None,
) -> Features:
    """Describe every latent of a checkpoint on held-out text; write three files and return the content of ``features.json``.

    Args:
        out: Directory of the files. Default: ``features`` in the checkpoint's directory.
        tokens: Number of held-out tokens to read. Default: 200,000.
        limits: How many contexts and tokens are kept.
        explainer: Language model that explains some latents, once everything else is written.
        options: Model, text and hooks that the checkpoint does not record.
        model: Language model in memory, and ``tokenizer``, as in ``evaluate``.
        neuronpedia: Folder to export to as well, in the layout that Neuronpedia imports; a ``NeuronpediaExport`` has an id too.

    Raises:
        ValueError: If the checkpoint, its model or its text cannot be loaded, or do not fit together.

    Example::

        import sparsary

        about = sparsary.features("runs/topk", tokens=100_000)
        about["dead"], about["page_path"]
        about.records_of([17, 40])  # contexts of two latents
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"--tokens: expected at least 1, got {tokens}.")
    export = NeuronpediaExport(neuronpedia) if isinstance(neuronpedia, str | Path) else neuronpedia
    opened = open_checkpoint(checkpoint, with_model(options, model, tokenizer))
    section = section_of_vectors(opened)
    if section is not None:
        if explainer is not None:
            raise ValueError("--explainer: expected none for a dictionary of vectors: explanations are of tokens in text.")
        if neuronpedia is not None:
            raise ValueError("--neuronpedia: expected none for a dictionary of vectors: Neuronpedia shows tokens of text.")
        return describe_vectors(opened, section, Path(out) if out is not None else opened.results / "features", tokens)
    opened = opened.completed()
    directory = Path(out) if out is not None else opened.results / "features"
    if explainer is not None:
        # Before the explainer, which may be a model to load.
        require_text(TextSection.model_validate(opened.members[0].provenance["text"]))
    with nullcontext() if explainer is None else closing(explainer.chat(directory / ANSWERS)) as chat:
        if chat is not None:
            # Fail before the long pass over the text.
            chat.require_ready()
        pass_ = described_checkpoint(opened, tokens, limits, export)
        described, about = pass_.described, pass_.about
        written = write_features(directory, about, described.records())
        if explainer is None or chat is None:
            return pass_.exported(written, export)
        scorers = explainer.scorers
        continued = _continuations(opened, pass_) if "intervention" in scorers else NOT_CONTINUED
        explanations = explain_some(described, chat, explainer.latents, scorers, continued)
    asked = [found for found in explanations.values() if isinstance(found, dict)]
    about |= {
        "explainer": chat.name,
        "explained": sum(found["text"] is not None for found in asked),
        "malformed_answers": sum(found["malformed"] for found in asked),
        "questions": sum(found["questions"] for found in asked),
    }
    for name in scorers:
        known = [found[name] for found in asked if found[name] is not None]
        about[f"{name}_median"] = number(np.median(known)) if known else None
    about |= {f"explainer_{key}": value for key, value in chat.usage.entries().items()}
    pass_ = replace(pass_, described=replace(described, explanations=explanations))
    return pass_.exported(write_features(directory, about, pass_.described.records()), export)


@dataclass(frozen=True)
class DescribedCheckpoint:
    """Descriptions of a checkpoint's latents, their provenance for ``features.json``, and what the pass ran.

    ``moments`` are there for an export only.
    """

    described: Described
    about: dict[str, Any]
    model: LanguageModel
    dictionary: SparseDictionary
    moments: NeuronMoments | None

    def exported(self, written: Features, export: NeuronpediaExport | None) -> Features:
        """Write the export, if one is asked for, and return the written features with its folder."""
        if export is not None and self.moments is not None:
            folder = write_neuronpedia(export, self.about, self.model, self.dictionary, self.described, self.moments)
            written["neuronpedia_path"] = str(folder)
        return written


def _continuations(opened: LoadedCheckpoint, pass_: DescribedCheckpoint) -> Continuations | str:
    """Return what a checkpoint's model writes with latents added, or the reason why there is nothing."""
    # Hooks that the caller names are not in the files.
    pass_.dictionary.provenance = opened.members[0].provenance
    try:
        return Continuations(pass_.model, pass_.dictionary, pass_.described.collected)
    except ValueError as error:
        return str(error)


def explain_some(
    described: Described,
    chat: Chat,
    count: int,
    scorers: Sequence[str] = DEFAULT_SCORERS,
    continuations: Continuations | str = NOT_CONTINUED,
) -> dict[int, dict[str, Any] | str]:
    """Explain and score ``count`` latents, evenly spaced over those with enough text.

    Returns:
        Explanations by latent, and for latents without enough text the reason.
    """
    shown: dict[int, Evidence] = {}
    explanations: dict[int, dict[str, Any] | str] = {}
    for latent in range(described.collected.n_latents):
        found = evidence(described.collected, described.words, latent)
        if isinstance(found, str):
            explanations[latent] = found
        else:
            shown[latent] = found
    latents = list(shown)
    asked = latents[:: max(1, -(-len(latents) // count))]
    with stage("explanations", len(asked), "latents") as explaining:
        for done, latent in enumerate(asked):
            found = score_explanations(shown[latent], chat, chat, scorers=scorers, latent=latent, continuations=continuations)
            explanations[latent] = found.entries()
            explaining.update(done + 1)
    return explanations


def described_checkpoint(
    opened: LoadedCheckpoint,
    tokens: int | None = None,
    limits: Limits | None = None,
    export: NeuronpediaExport | None = None,
) -> DescribedCheckpoint:
    """Return the descriptions of a checkpoint's latents, and their provenance for ``features.json``.

    Args:
        export: The export that follows, which needs sums over the same pass.
    """
    member, *others = opened.members
    if others:
        hooks = ", ".join(hooks_of_provenance(member.provenance)[1][0] for member in opened.members)
        raise ValueError(
            f"{opened.name}: expected one dictionary, got {len(opened.members)}, of {hooks}. Give --hook HOOK, or one folder."
        )
    dictionary, provenance = member.dictionary, member.provenance
    arguments = dictionary.arguments()
    reads, writes = hooks_of_provenance(provenance)
    if export is not None:
        if len(reads) + len(writes) > 2:
            raise ValueError(f"--neuronpedia: expected a dictionary of one hook, got {len(reads)} in and {len(writes)} out.")
        # Before the long pass over the text.
        export.source(opened.name, writes[0], str(provenance["model"]["id"]))
    where = eval_data(provenance, reads)
    model, text = where.model, where.text
    _require_widths(dictionary, model, reads)
    dictionary = dictionary.to(model.device)
    source = FeatureText(model, text, where.exclusions, reads)
    wanted = tokens or DEFAULT_TOKENS
    moments = None if export is None else NeuronMoments(dictionary.n_latents, dictionary.d_in)
    with stage("features", wanted) as shown:
        batches = source.batches(dictionary, wanted, None if moments is None else moments.update)
        collected = collect_features(dictionary, batches, limits, shown)
    words = token_texts(model.tokenizer, len(model.tokenizer))
    seed = text.seed if text.source == "embedded" else None
    lens = unembedding(dictionary, model, provenance)
    described = describe_latents(collected, dictionary.atoms, words, lens, seed)
    if isinstance(dictionary, Crosscoder):
        described = replace(described, shares=dictionary.relative_norms().detach().cpu().numpy())
        if len(each_model(model)) > 1:
            base = unembedding(dictionary, model, provenance, NAMES[0])
            described = replace(described, base_effects=effects_of(base, len(words)))
    left_out = source.bad_texts.until(None) + source.bad_tokens.found
    if left_out:
        log.warning("Excluded or repaired: %s.", counted(left_out))
    lacking = shortfall("tokens", wanted, collected.tokens, "held-out tokens", "examples and scores use all of them")
    about = {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": opened.name,
        "kind": arguments["kind"],
        "encoder": json.dumps(arguments["encoder"]),
        "n_latents": dictionary.n_latents,
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "model": model.id,
        **({"models": [each.id for each in each_model(model)]} if len(each_model(model)) > 1 else {}),
        "hooks_in": list(reads),
        "hooks_out": list(writes),
        "text": text.source,
        "tokens": collected.tokens,
        "tokens_asked": wanted,
        "documents": collected.documents,
        "context_length": text.context_length,
        "sampled_tokens": len(collected.token_sample.tokens),
        "predicates": len(described.known.names),
        "no_factors": described.known.missing,
        "assumed": list(opened.assumed),
        **told_shortfalls(opened.name, [provenance], lacking),
        "skipped": [counted(left_out)] if left_out else [],
        "git_commit": provenance.get("git_commit"),
        "left_out": left_out_words(where.exclusions, text),
        **({"chat_template": template_text(text.chat, model.tokenizer)} if collected.has_roles else {}),
    }
    return DescribedCheckpoint(described, about, model, dictionary, moments)


def left_out_words(harvest: HarvestSection, text: TextSection) -> str:
    """Return the tokens that a recipe leaves out of training and evaluation, in words."""
    listed = harvest.exclude
    found = [
        "special tokens" * harvest.exclude_special,
        f"the first {harvest.exclude_leading} positions" * bool(harvest.exclude_leading),
        f"roles other than {', '.join(text.chat.roles)}" * bool(text.chat.roles),
        f"roles {', '.join(listed.roles)}" * bool(listed.roles),
        f"tokens {', '.join(map(repr, listed.tokens))}" * bool(listed.tokens),
        f"positions {', '.join(map(str, listed.positions))}" * bool(listed.positions),
        f"norms above {listed.norm_above:g} times the median" if listed.norm_above is not None else "",
    ]
    return "; ".join(filter(None, found)) or "none"


def write_features(directory: Path, about: dict[str, Any], records: Iterable[FeatureRecord]) -> Features:
    """Write the three files, each atomically, and return the content of ``features.json``; ``records`` are read once."""
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, list[float]] = {name: [] for name in SCORES}
    dead = 0
    with replacing(directory / RECORDS_FILE) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for record in records:
            handle.write(json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
            dead += record["dead"]
            for name, value in record["scores"].items():
                if value is not None:
                    values[name].append(value)
    about = about | {"dead": dead, RECORDS_DIGEST: file_crc32(directory / RECORDS_FILE)}
    for name, known in values.items():
        about |= {f"{name}_median": number(np.median(known)) if known else None, f"{name}_latents": len(known)}
    write_json(directory / ABOUT_FILE, about, sealed=True)
    return Features(about | {"page_path": str(render_file(directory / ABOUT_FILE))}, directory / RECORDS_FILE)


def _require_widths(dictionary: SparseDictionary, model: LanguageModel, reads: tuple[str, ...]) -> None:
    widths = model.widths(reads)
    total = sum(widths.values())
    if total != dictionary.d_in:
        raise ValueError(
            f"{', '.join(reads)}: expected width {dictionary.d_in}, the dictionary's d_in, got {total} from {model.id}. This "
            "dictionary belongs to another model or hook."
        )


def features_summary(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as pairs of name and value, for the console."""
    if "vectors_schema_version" in about:
        return vectors_summary(about)
    lines = [
        ("dictionary", f"{about['kind']} {about['d_in']} -> {about['n_latents']}  {encoder_words(about['encoder'])}"),
        ("read", f"{about['tokens']:,} held-out tokens of {about['documents']:,} documents"),
        ("latents", f"{about['n_latents']:,}, {about['dead']:,} of them dead on these tokens"),
    ]
    for name in SCORES:
        value = about[f"{name}_median"]
        words = "undefined" if value is None else f"median {value:.3f} over {about[f'{name}_latents']:,} latents"
        lines.append((name.replace("_", " "), words))
    if "explainer" in about:
        scores = "   ".join(f"{name} {_shown(about[f'{name}_median'])}" for name in SCORERS if f"{name}_median" in about)
        lines.append(("explained", f"{about['explained']} latents by {about['explainer']}   {scores}"))
        lines.append(
            (
                "asked",
                f"{about['questions']:,} questions, {about['malformed_answers']:,} unparsable answers   "
                f"{about['explainer_requests']:,} requests, {about['explainer_cached']:,} from the cache   "
                f"{about['explainer_prompt_tokens'] + about['explainer_completion_tokens']:,} tokens",
            )
        )
    return lines


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
