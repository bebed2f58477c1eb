"""Alignment of a start (``dictionary.start.align``): from where the map onto a run's activations comes, and its choice.

Maps are fitted on three quarters of the tokens and judged on the rest, by the error of the dictionary behind each; without one
that lowers the error, the dictionary stays as it was read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...sae import SparseDictionary
from ..activations.context_stream import ContextStream
from ..activations.live import LiveStream
from ..activations.model import LanguageModel, resolve_device
from ..activations.shards import ActivationStore
from ..activations.store_stream import StoreStream
from ..activations.stream import ActivationStream
from ..activations.tensor_stream import TensorStream
from ..processes import from_first, own_ranks
from ..recipe import AlignSection, ModelSection, Recipe, TextSection
from .fitted import fitted_dictionaries
from .judge import figures
from .maps import mapped
from .pairs import (
    Pairs,
    Sides,
    aligning_files,
    each_once,
    first_contexts,
    matched_pairs,
    pairs_of_files,
    rows_of_model,
    rows_of_store,
)
from .unpaired import unpaired_rotation

KEY = "dictionary.start.align"
# Tokens by default, and least number of them, as a multiple of the width.
TOKENS, PER_DIMENSION, LEAST_PER_DIMENSION = 16_384, 4, 2
# Share of the tokens that maps are judged on.
JUDGED_SHARE = 0.25
WORDS = {
    "none": "as read",
    "rotation": "by a rotation and a scale",
    "rotation_regression": "with a rotation to read and a regression to write",
    "regression": "by regressions",
}
# Share by which a regression must beat a rotation, which keeps the norms of decoder directions.
MARGIN = 0.01
# Keys of a recorded model that decide its activations. Its own Python code runs only if the recipe says so.
RECORDED = ("id", "revision", "dtype", "quantization", "adapter", "adapter_mode")


class OutlinedModel(Protocol):
    """Language model that is read from its configuration, and loaded only if its activations are needed."""

    section: ModelSection

    def tokenizer_sha256(self) -> str | None: ...
    def widths(self, hooks: tuple[str, ...]) -> dict[str, int]: ...
    def text_problems(self, text: TextSection) -> list[str]: ...
    def loaded_for(self, hooks: tuple[str, ...]) -> LanguageModel: ...


@dataclass(frozen=True)
class StartAlignment:
    """Source of the map onto a run's activations: the recipe's section, and the models of the start and of the run.

    ``hooks`` are those that the start was trained on, in its own model, and ``run_hooks`` those of the recipe.
    """

    section: AlignSection
    hooks: Sides
    run_hooks: Sides
    run: OutlinedModel
    own: OutlinedModel | None = None

    @property
    def place(self) -> str:
        """Name of what the map is fitted with."""
        if self.section.unpaired:
            return "its own reconstruction"
        if self.section.store is not None:
            return f"the store {self.section.store}"
        if self.section.files:
            return f"the vectors {', '.join(self.section.files)}"
        return "" if self.own is None else f"the model {self.own.section.id}"

    def tokens(self, width: int) -> int:
        """Return the number of tokens that are read."""
        return self.section.tokens or max(TOKENS, PER_DIMENSION * width)

    def require_fit(self, recipe: Recipe, dictionary: SparseDictionary) -> None:
        """Raise ``ValueError`` unless the source gives the start's activations of the recipe's text."""
        align = self.section
        if align.files:
            if not recipe.harvest.files:
                raise ValueError(
                    f"{KEY}.files: expected them with harvest.files, or with activations given in Python, got a recipe that "
                    "reads a model. Give model or store."
                )
            width = aligning_files(align, recipe.harvest).width
            self._require_widths({self.hooks[0][0]: width}, dictionary, ", ".join(align.files))
        elif recipe.harvest.files and not align.unpaired:
            raise ValueError(f"{KEY}: expected files or unpaired with harvest.files, which no model reads, got {self.place}.")
        elif align.store is not None:
            store = ActivationStore.open(align.store)
            store.require_hooks(f"{KEY}.store", each_once(self.hooks))
            self._require_widths({hook: store.width(hook) for hook in each_once(self.hooks)}, dictionary, align.store)
            self._require_tokenizer(f"{KEY}.store", align.store, store.manifest.get("tokenizer_sha256"))
        elif self.own is not None:
            if self.own.section == self.run.section and self.hooks == self.run_hooks:
                raise ValueError(
                    f"{KEY}: expected another model than the recipe's, or another hook, got {self.own.section.id} at "
                    f"{', '.join(each_once(self.hooks))} for both. Leave it out."
                )
            problems = self.own.text_problems(recipe.text)
            if problems:
                raise ValueError("\n".join(f"{KEY}.model: {line}" for line in problems))
            self._require_widths(self.own.widths(each_once(self.hooks)), dictionary, self.own.section.id)
            self._require_tokenizer(f"{KEY}.model", self.own.section.id, self.own.tokenizer_sha256())

    def _require_widths(self, widths: dict[str, int], dictionary: SparseDictionary, place: str) -> None:
        for hooks, width in zip(self.hooks, (dictionary.d_in, dictionary.d_out), strict=True):
            if widths[hooks[0]] != width:
                raise ValueError(
                    f"{KEY}: expected activations of width {width} at {hooks[0]} of {place}, as the start has, got "
                    f"{widths[hooks[0]]}. Name what the start was trained on."
                )

    def _require_tokenizer(self, key: str, place: str, recorded: str | None) -> None:
        own = self.run.tokenizer_sha256()
        if recorded is not None and own is not None and recorded != own:
            raise ValueError(
                f"{key}: expected the tokenizer of {self.run.section.id}, so that both models read the same token ids, got "
                f"another one with {place} (sha256 {own[:12]} and {recorded[:12]}). Choose align: unpaired, which "
                "needs no second model, or leave align out."
            )

    def pairs(self, recipe: Recipe, stream: ActivationStream, tokens: int) -> Pairs:
        """Return the activations of the same tokens in both models.

        Raises:
            ValueError: If the source has none of the tokens that the run reads.
        """
        align = self.section
        if isinstance(stream, TensorStream):
            if not align.files:
                raise ValueError(
                    f"{KEY}: expected files or unpaired with activations given in Python, which no model reads, got "
                    f"{self.place}. Save the start's activations of the same rows, and name the file."
                )
            return pairs_of_files(aligning_files(align, recipe.harvest), stream, tokens)
        store, sides = align.store, (self.hooks, self.run_hooks)
        if store is not None and isinstance(stream, StoreStream):
            own, runs = (
                rows_of_store(s, tokens, at) for s, at in zip((ActivationStore.open(store), stream.store), sides, strict=True)
            )
            return matched_pairs(own, runs, sides, f"{KEY}.store").rows(slice(tokens))
        model = _model_of(stream) or self.run.loaded_for(each_once(self.run_hooks))
        contexts = first_contexts(model, recipe, tokens)
        runs = rows_of_model(model, contexts, recipe, self.run_hooks)
        # Two models at a time may be too large for the device.
        del model
        if store is not None:
            own = rows_of_store(ActivationStore.open(store), tokens, self.hooks)
        else:
            assert self.own is not None
            own = rows_of_model(self.own.loaded_for(each_once(self.hooks)), contexts, recipe, self.hooks)
        return matched_pairs(own, runs, sides, f"{KEY}.store").rows(slice(tokens))


def _model_of(stream: ActivationStream) -> LanguageModel | None:
    """Return the model that a stream runs, ``None`` for a stream from a store."""
    if isinstance(stream, ContextStream):
        return stream.model
    return stream.source.model if isinstance(stream, LiveStream) else None


def recorded_model(recorded: Mapping[str, Any], model: ModelSection) -> ModelSection | None:
    """Return the model that a start's files record, to run on the device of the recipe's; ``None`` if they record none."""
    if not recorded.get("id"):
        return None
    known = {key: recorded[key] for key in RECORDED if recorded.get(key) is not None}
    trusted = model.trust_remote_code and known["id"] == model.id
    return ModelSection.model_validate({"device": model.device, "trust_remote_code": trusted} | known)


def require_alignable(place: str, dictionary: SparseDictionary) -> None:
    """Raise ``ValueError`` unless a linear map can be folded into the dictionary."""
    if dictionary.row_norm is not None:
        why = f"normalizes the inputs of every token ({dictionary.row_norm}), so that a map of them cannot be folded into it"
    elif dictionary.in_scale.ndim or dictionary.out_scale.ndim:
        why = "has a scale for every dimension, which turns with none of them"
    elif dictionary.shift is None and dictionary.blocks[0].weights.b_enc is None:
        why = "has no bias on its inputs or latents, so that a shift cannot be folded into it"
    else:
        return
    raise ValueError(f"{KEY}: {place} {why}. Leave it out.")


@dataclass(frozen=True)
class Aligned:
    """Dictionary behind the map that lowers its error most, or as it was; ``record`` says what was fitted and judged."""

    dictionary: SparseDictionary
    record: dict[str, Any]

    def words(self) -> str:
        """Return what was chosen, and by what error, as text."""
        record = self.record
        errors = ", ".join(f"{value:.4g} {WORDS[name]}" for name, value in record["fvu"].items())
        chosen = "not aligned" if record["map"] == "none" else f"aligned to {record['by']} {WORDS[record['map']]}"
        sizes = f"fitted on {record['fitted_tokens']:,} tokens, judged on {record['judged_tokens']:,} others"
        return f"{chosen}: fvu {errors}; {sizes}"


def aligned(alignment: StartAlignment, dictionary: SparseDictionary, recipe: Recipe, stream: ActivationStream) -> Aligned:
    """Return the dictionary aligned to a stream's activations, if that lowers its error on tokens that no map was fitted on.

    Raises:
        ValueError: If there are too few tokens that both models share, or their widths are not those of the dictionary.
    """
    wanted = alignment.tokens(max(dictionary.d_in, dictionary.d_out))
    found = {"none": dictionary}
    if alignment.section.unpaired:
        batch = stream.start_sample(wanted)
        fitted = _fitted_tokens(len(batch.x), dictionary)
        maps = unpaired_rotation(dictionary, batch.x[:fitted], resolve_device(recipe.model.device))
        found["rotation"] = mapped(dictionary, maps, maps)
    else:
        pairs = alignment.pairs(recipe, stream, wanted)
        batch, fitted = pairs.runs, _fitted_tokens(len(pairs), dictionary)
        _require_width(pairs, dictionary)
        found |= fitted_dictionaries(dictionary, pairs.rows(slice(fitted)))
    judged = batch.rows(slice(fitted, None))
    errors = {name: figures(each.eval(), judged)["fvu"] for name, each in found.items()}
    best = preferred_map(errors)
    record = {
        "by": alignment.place,
        "map": best,
        "scale": float(found[best].in_scale / dictionary.in_scale),
        "fitted_tokens": fitted,
        "judged_tokens": len(judged.x),
        "fvu": errors,
    }
    # Ranks may round differently.
    return from_first(own_ranks(), Aligned(found[best], record))


def preferred_map(errors: Mapping[str, float]) -> str:
    """Return the map with the lowest error; a regression must be lower by ``MARGIN``.

    >>> preferred_map({"none": 0.5, "rotation": 0.100, "regression": 0.0995})
    'rotation'
    """
    return min(errors, key=lambda name: errors[name] * (1 + MARGIN * name.endswith("regression")))


def _fitted_tokens(tokens: int, dictionary: SparseDictionary) -> int:
    """Return the number of tokens that maps are fitted on."""
    fitted, least = tokens - round(JUDGED_SHARE * tokens), LEAST_PER_DIMENSION * max(dictionary.d_in, dictionary.d_out)
    if fitted < least:
        raise ValueError(
            f"{KEY}.tokens: expected at least {least:,} tokens to fit a map on, twice the width, and a third as many to judge "
            f"it on, got {tokens:,} in all. Raise it, or give a source that holds more of the recipe's tokens."
        )
    return fitted


def _require_width(pairs: Pairs, dictionary: SparseDictionary) -> None:
    """Raise ``ValueError`` unless the start's activations are as wide as the dictionary."""
    if pairs.own.x.shape[1] != dictionary.d_in:
        raise ValueError(
            f"{KEY}.files: expected vectors of width {dictionary.d_in}, as the start has, got {pairs.own.x.shape[1]}. Name "
            "those that the start was trained on."
        )
