"""Saved dictionary that a run starts from (``dictionary.start``), and the keys that a recipe takes over from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...sae import SparseDictionary
from ...sae.encoders import ENCODERS, encoder_spec
from ...sae.files import read_text
from ...transcoders.cross_layer import CrossLayerTranscoder
from ...transcoders.load import OWN, CheckpointOptions, find
from ...transcoders.stack import hooks_of_provenance
from ..activations.stream import ActivationBatch
from ..checkpoints import RECIPE_FILE
from ..content import Content, file_digest
from ..recipe import DictionarySection, Recipe, check_recipe, parse_yaml
from ..recipe.encoder_checks import missing_budget
from ..recipe.validation import check_together
from ..state import STATE_FILE
from .alignment import StartAlignment

# Encoders that reproduce published dictionaries, and the trainable encoder with the same rule of selection.
TRAINABLE = {"threshold": "jumprelu", "residual_pursuit": "matching_pursuit"}


@dataclass(frozen=True)
class StartSource:
    """Dictionary that a run starts from, as it was read.

    ``hooks`` are those it reads and writes, empty if its files name none; ``model`` is the id of its language model.
    """

    place: str
    dictionary: SparseDictionary
    hooks: tuple[tuple[str, ...], tuple[str, ...]]
    model: str | None
    evidence: str
    directory: Path
    files: tuple[Path, ...]
    # The model as the files record it, with what else they say of it than its id.
    recorded: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    alignment: StartAlignment | None = field(default=None, kw_only=True)

    @property
    def kind(self) -> str:
        return self.dictionary.arguments()["kind"]

    @property
    def n_latents(self) -> int:
        """Number of latents as in a recipe: per layer for cross-layer transcoders."""
        return self.dictionary.n_latents // self.dictionary.n_sites

    @property
    def skip(self) -> bool:
        return getattr(self.dictionary, "W_skip", None) is not None

    @property
    def joint(self) -> bool:
        return isinstance(self.dictionary, CrossLayerTranscoder) and self.dictionary.joint

    def fitted(self, sample: ActivationBatch) -> "StartSource":
        """Return the source with its weights; files hold them, whatever the sample is."""
        return self

    def content(self) -> Content:
        """Return the sha256 of every file that was read, by its name."""
        base = self.directory if self.directory.is_dir() else self.directory.parent
        names = {path: path.relative_to(base) if path.is_relative_to(base) else Path(path.name) for path in self.files}
        return {name.as_posix(): file_digest(path) for path, name in names.items()}

    def spec(self) -> dict[str, Any]:
        """Return the trainable encoder with this dictionary's rule, without a budget that its files do not say.

        Raises:
            ValueError: If no encoder that can be trained has the rule.
        """
        own = encoder_spec(self.dictionary.encoder)
        name = TRAINABLE.get(own["name"], own["name"])
        if name not in ENCODERS:
            raise ValueError(
                f"dictionary.encoder: {self.place} has {own['name']}, which cannot be trained. Name an encoder: "
                f"{', '.join(ENCODERS)}; a k or target_l0 that you leave out is the start's l0."
            )
        if self.evidence != OWN or name != own["name"]:
            # Other libraries' files do not say what weight a penalty had.
            own = {"name": name} | {key: own[key] for key in ("k", "tolerance") if key in own}
            if name == "matching_pursuit" and "k" not in own:
                own["k"] = encoder_spec(self.dictionary.encoder)["max_steps"]
        # Latents are fitted already: a penalty that rises from 0 would let them go before it gathers them again.
        return own | ({"ramp": 0.0} if "ramp" in ENCODERS[name].parameters_of() else {})

    def budget(self) -> int | float | None:
        """Return the number of active latents that the encoder's arguments say, ``None`` if they say none."""
        spec = encoder_spec(self.dictionary.encoder)
        return spec.get("k") or spec.get("target_l0")

    def words(self, section: DictionarySection) -> str:
        """Return what a recipe takes over and what it changes, as text."""
        own, now = encoder_spec(self.dictionary.encoder), section.known_encoder
        shown = {key: own[key] for key in ("name", "k", "target_l0") if own.get(key) is not None}
        words = [f"{self.place} ({self.evidence}): {self.kind}, {self.n_latents} latents, {_words(shown)}"]
        if section.n_latents != self.n_latents:
            more = section.known_n_latents - self.n_latents
            assert section.start is not None
            origin = "errors" if section.start.new_latents == "error" else "activations"
            words.append(f"{more} latents from {origin} added" if more > 0 else f"{-more} least dense latents dropped")
        if now != own:
            budget = missing_budget(now)
            words.append(f"now {_words(now)}{f', {budget} of the l0 on the initial sample' if budget else ''}")
        if self.alignment is not None:
            words.append(f"aligned by {self.alignment.place}, if that lowers its error")
        if self.dictionary.row_norm is not None:
            words.append(f"inputs normalized by {self.dictionary.row_norm}")
        return "; ".join(words)

    def require_fit(self, section: DictionarySection, widths: Mapping[str, int]) -> None:
        """Raise ``ValueError`` unless the dictionary reads and writes activations of the recipe's widths."""
        d = self.dictionary
        if d.n_sites != len(section.hooks_in):
            word = "sites" if d.shares_code else "layers"
            raise ValueError(
                f"dictionary.start: {self.place} has {d.n_sites} {word}, the recipe has {len(section.hooks_in)}. Name as many."
            )
        sides = (("input", d.d_in, section.hooks_in, "hook_in"), ("output", d.d_out, section.hooks_out, "hook_out"))
        for side, own, hooks, key in sides:
            wanted = sum(widths[hook] for hook in hooks)
            if own != wanted:
                named = key if section.two_sided else "hook" if section.kind == "sae" else "hooks"
                raise ValueError(
                    f"dictionary.start: {self.place} has {side}s of width {own}, the activations at {', '.join(hooks)} have "
                    f"{wanted}. Choose another dictionary.{named}, or another start."
                )

    def differences(self, recipe: Recipe) -> list[str]:
        """Return one line for each fact in which the recipe differs from what the files record: hooks and model."""
        if self.alignment is not None:
            # A map is there for them.
            return []
        section, found = recipe.dictionary, []
        sides = list(zip(("reads", "writes"), self.hooks, (section.hooks_in, section.hooks_out), strict=True))
        # SAEs and crosscoders write what they read.
        for key, own, now in sides if section.two_sided else sides[:1]:
            if own and own != now:
                found.append(f"the start {key} {', '.join(own)}, the recipe {', '.join(now)}")
        if self.model is not None and self.model != recipe.model.id:
            found.append(f"the start is of model {self.model}, the recipe of {recipe.model.id}")
        return found


def _words(spec: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in spec.items())


def read_start(section: DictionarySection) -> StartSource:
    """Read the dictionary that a recipe with named hooks starts from.

    Raises:
        ValueError: If it cannot be read, there are several and none is for the recipe's hook, or it is of another kind.
    """
    start = section.start
    assert start is not None
    options = CheckpointOptions(
        hook=start.hook,
        format=start.format,
        subfolder=start.subfolder,
        revision=start.revision,
        k=start.k,
        scale=start.scale,
        threshold=start.threshold,
        subtract_b_dec=start.subtract_b_dec,
    )
    place = start.path if start.subfolder is None else f"{start.path}/{start.subfolder}"
    try:
        found = find(start.path, options)
        names = {name: _hooks(found.provenances[name]) for name in found.dictionaries}
        name = _chosen(names, section)
    except ValueError as error:
        raise ValueError(f"dictionary.start: {error}") from None
    dictionary, provenance = found.dictionaries[name], found.provenances[name]
    source = StartSource(
        place if len(names) == 1 else f"{place} ({name})",
        dictionary,
        names[name],
        (provenance.get("model") or {}).get("id"),
        found.evidence,
        found.directory,
        found.files,
        recorded=provenance.get("model") or {},
    )
    require_kind(source.place, source.kind, section.built_kind)
    return source


def require_kind(place: str, kind: str, wanted: str) -> None:
    """Raise ``ValueError`` unless a start is of the recipe's kind of dictionary."""
    if kind != wanted:
        pair = "hook_in and hook_out"
        keys = {
            "sae": "hook",
            "transcoder": pair,
            "cross_layer_transcoder": f"lists of {pair}",
            "crosscoder": "a list of hooks",
        }
        raise ValueError(
            f"dictionary.start: {place} is a {kind}, the recipe's dictionary is a {wanted}. Set "
            f"dictionary.kind: {kind} with {keys[kind]}, or choose another start."
        )


def _hooks(provenance: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the hooks that a dictionary reads and writes, empty if its files do not say."""
    try:
        reads, writes = hooks_of_provenance(dict(provenance))
    except ValueError:
        return (), ()
    return tuple(reads), tuple(writes)


def _chosen(names: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]], section: DictionarySection) -> str:
    """Return the name of one of several dictionaries: that of the recipe's hooks."""
    if len(names) == 1:
        return next(iter(names))
    hooks = {*section.hooks_in, *section.hooks_out}
    fitting = [name for name, sides in names.items() if hooks & {name, *sides[0], *sides[1]}]
    if len(fitting) != 1:
        raise ValueError(
            f"{section.start.path if section.start else ''}: {len(names)} dictionaries ({', '.join(names)}), and "
            f"{'none' if not fitting else len(fitting)} of them for {', '.join(sorted(hooks))}. Set dictionary.start.hook."
        )
    return fitting[0]


def with_start(
    recipe: Recipe, read: Callable[[DictionarySection], StartSource] = read_start
) -> tuple[DictionarySection, StartSource | None]:
    """Return the recipe's dictionary section with the keys of its start filled in, and the start, which ``read`` returns.

    A run that has saved a state resumes: the start is not read again, and missing keys are those of the saved recipe.

    Raises:
        ValueError: In the cases of ``read_start``, if the encoder must be named, or if the completed recipe is invalid.
    """
    section = recipe.dictionary
    if section.start is None:
        return section, None
    saved = _saved(recipe)
    if saved is not None:
        own = {key: getattr(saved, key) for key in ("n_latents", "row_norm") if getattr(section, key) is None}
        own |= {key: getattr(saved, key) for key in ("skip", "joint") if not getattr(section, key)}
        spec = saved.known_encoder if section.encoder is None else section.encoder
        key = missing_budget(spec)
        if key is not None and saved.known_encoder["name"] == spec["name"]:
            spec = spec | {key: saved.known_encoder[key]}
        return _checked(recipe, section.model_copy(update=own | {"encoder": spec})), None
    source = read(section)
    spec = source.spec() if section.encoder is None else section.encoder
    key, budget = missing_budget(spec), source.budget()
    if key is not None and budget is not None:
        spec = spec | {key: max(1, round(budget)) if key == "k" else budget}
    if section.row_norm not in (None, source.dictionary.row_norm):
        raise ValueError(
            f"dictionary.row_norm: expected {source.dictionary.row_norm!r}, that of {source.place}, got {section.row_norm!r}. "
            "Leave it out."
        )
    taken = {
        "n_latents": section.n_latents or source.n_latents,
        "encoder": spec,
        "row_norm": source.dictionary.row_norm,
        "skip": section.skip or source.skip,
        "joint": section.joint or (source.joint and section.encoder is None),
    }
    return _checked(recipe, section.model_copy(update=taken)), source


def _saved(recipe: Recipe) -> DictionarySection | None:
    """Return the dictionary section of the saved run that the recipe would resume, if it has the same start."""
    directory, start = Path(recipe.out_dir), recipe.dictionary.start
    if not (directory / STATE_FILE).exists() or not (directory / RECIPE_FILE).exists():
        return None
    where = directory / RECIPE_FILE
    saved = check_recipe(parse_yaml(read_text(where), str(where)), str(where)).dictionary
    return saved if saved.start == start else None


def _checked(recipe: Recipe, section: DictionarySection) -> DictionarySection:
    """Return the section; raise ``ValueError`` if the recipe with it is invalid."""
    problems = check_together(recipe.model_copy(update={"dictionary": section}))
    if problems:
        raise ValueError("\n".join(problems))
    return section
