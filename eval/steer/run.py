"""Contrast steering of a model by latents: ``steer.json``, ``steer.html``, and an exported vector."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...sae.files import write_json
from ...sae.suggestions import require_choice
from ...training.activations.model import LanguageModel
from ...training.stages import stage
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ..checkpoint import Checkpoint, LoadedCheckpoint, of_one_model, open_checkpoint, with_model
from ..features.predicates import token_texts
from ..features.records import number
from ..pages.examples import example_of, features_files, records_of
from ..pages.render import render_file
from ..result import Report
from ..select.pooled import POOLINGS
from .codes import DocumentCodes, document_codes, position_differences, record_of, selectivity, spectrum
from .edits import FIRST, NO_EDIT, Edit, random_edit
from .export import export_vector, require_exportable
from .outcomes import costs, log_mass, masses, success
from .task import PROMPTS, SteerTask, given_prompt_ids, steer_task, steered_subject
from .texts import Text, prompts_of

log = logging.getLogger(__name__)

STEER_FILE, STEER_VERSION = "steer.json", 1
STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
DOCUMENTS, LATENTS, MOST_KL = 400, 10, 0.05
POOLING, PIECE = "mean", 128
# Pieces are shorter where a half of a text has fewer than this many.
FEWEST_PIECES = 20
# Latents of each kind whose effect is measured, the most selective ones.
CANDIDATES = 100
# Latents with less than this share of the largest effect are not raised.
LEAST_EFFECT = 0.05
COST_DOCUMENTS, RANDOM_DRAWS = 50, 3
SAMPLES, NAMED_TOKENS = 5, 12
LATENT_EDIT, RAISED, RANDOM, MEAN, DIRECTIONS, PREFIX = "latents", "raised", "random", "mean", "directions", "prefix"


class LatentEffect(NamedTuple):
    """A candidate: its mean in the text steered towards, the difference of its means in the two texts, and its effect."""

    mean: float
    difference: float
    effect: float


def steer(
    checkpoint: Checkpoint,
    towards: Text,
    away_from: Text,
    out: str | Path | None = None,
    tokens: Sequence[str] | None = None,
    prompts: Iterable[str] = (),
    neutral: Text | None = None,
    strengths: Sequence[float] = STRENGTHS,
    latents: int = LATENTS,
    most_kl: float = MOST_KL,
    documents: int = DOCUMENTS,
    pooling: str = POOLING,
    piece: int = PIECE,
    export: str | Path | None = None,
    seed: int = 0,
    options: CheckpointOptions = NO_OPTIONS,
    model: LanguageModel | Any = None,
    tokenizer: Any = None,
) -> Report:
    """Steer a model from one text towards another by the latents that tell them apart; write ``steer.json`` and its page.

    Half of the documents chooses latents, tokens and strengths; all figures are of the other half.

    Example::

        found = sparsary.steer("runs/topk", towards="french.txt", away_from="english.txt", neutral="numbers.txt")
        found["edits"][0]["chosen"], found.page

    Args:
        checkpoint: An SAE; its language model is run.
        towards: File of documents (.txt, .jsonl, .parquet) that the model is to write like, or the documents themselves.
        away_from: Likewise, of documents that it is to write like no longer; their beginnings are the prompts.
        out: Output folder. Default: ``steer`` in the checkpoint's directory.
        tokens: Target tokens. Default: those that are more frequent in ``towards``.
        prompts: Prompts to show samples for, beside those from the text.
        neutral: Documents on which the cost is measured: text that the edit should leave as it is. Default: ``towards``.
        strengths: Multiples of the difference of the two texts' mean codes.
        latents: Number of latents to raise, and at most as many to set to zero.
        most_kl: Largest KL divergence on neutral text, in nats per token, at which a strength may be chosen.
        documents: Number of documents to read of each text at most.
        pooling: A latent's value in a piece of text, of which its selectivity is the AUROC: ``mean`` or ``max`` over tokens.
        piece: Length of these pieces in tokens, for which documents are joined; shorter if the texts have too few tokens.
        export: File for the vector (.safetensors) at the chosen strength.
        seed: Seed of the halves, random latents and samples.
        model: Language model in memory, and ``tokenizer``, as in ``evaluate``.

    Raises:
        ValueError: If the checkpoint is no SAE or its model is unknown, a text cannot be used, or a token does not exist.
    """
    strengths = _checked(strengths, latents, most_kl, documents, piece, seed)
    require_choice("--pooling", pooling, POOLINGS)
    opened = of_one_model(open_checkpoint(checkpoint, with_model(options, model, tokenizer)), "sparsary steer")
    subject = steered_subject(opened)
    layer = None if export is None else require_exportable(subject, Path(export))
    task = steer_task(subject, towards, away_from, neutral, tokens, documents, seed)
    prompts = list(prompts)
    given = [torch.tensor([given_prompt_ids(task, prompt)]) for prompt in prompts]
    directory = Path(out) if out is not None else opened.results / "steer"
    entries, edits = steer_entries(task, given, strengths, latents, most_kl, pooling, piece)
    _enter_labels(opened, entries["latents"])
    head = {
        "steer_version": STEER_VERSION,
        "checkpoint": opened.name,
        "encoder": json.dumps(subject.dictionary.arguments()["encoder"]),
        "n_latents": subject.dictionary.n_latents,
        "hook": subject.hook,
        "model": subject.model.id,
        "towards": _named(towards),
        "from": _named(away_from),
        "neutral": None if neutral is None else _named(neutral),
        "tokens_given": None if tokens is None else list(tokens),
        "prompts_given": prompts,
        "strengths": list(strengths),
        "latents_asked": latents,
        "most_kl": most_kl,
        "documents_asked": documents,
        "pooling": pooling,
        "seed": seed,
    }
    entries = head | entries
    if export is not None and layer is not None:
        chosen = next(row for row in entries["edits"] if row["name"] == RAISED)["chosen"]
        strength = 1.0 if chosen is None else chosen["strength"]
        entries["export"] = export_vector(Path(export), edits[RAISED].direction(subject), strength, subject, layer, entries)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / STEER_FILE, entries, sealed=True)
    page = render_file(directory / STEER_FILE)
    return Report(entries | {"page_path": str(page), "path": str(directory / STEER_FILE)}, entries["latents"])


def _enter_labels(opened: LoadedCheckpoint, rows: Sequence[dict[str, Any]]) -> None:
    """Enter the label of each latent, from the features that were described of the checkpoint: an explanation or predicate."""
    files = features_files([opened.directory], opened.members[0].dictionary.n_latents)
    found = {} if files is None else records_of(files.records, {row["latent"] for row in rows})
    for row in rows:
        record = found.get(row["latent"])
        row["label"] = example_of(record).words if record else ""


def _checked(
    strengths: Sequence[float], latents: int, most_kl: float, documents: int, piece: int, seed: int
) -> tuple[float, ...]:
    found = tuple(sorted({float(strength) for strength in strengths}))
    if not found or found[0] <= 0 or not np.isfinite(found).all():
        raise ValueError(f"--strengths: expected numbers above 0, got {', '.join(map(str, strengths)) or 'none'}.")
    counts = ("latents", latents, 1), ("documents", documents, 20), ("piece", piece, 1), ("seed", seed, 0)
    for name, value, least in counts:
        if value < least:
            raise ValueError(f"--{name}: expected at least {least}, got {value}.")
    if not most_kl > 0:
        raise ValueError(f"--most-kl: expected a number above 0, got {most_kl}.")
    return found


def _named(text: Text) -> str:
    return str(text) if isinstance(text, str | Path) else "texts in memory"


def steer_entries(
    task: SteerTask,
    given: Sequence[Tensor],
    strengths: Sequence[float],
    latents: int,
    most_kl: float,
    pooling: str,
    piece: int,
) -> tuple[dict[str, Any], dict[str, Edit]]:
    """Return the measured entries of ``steer.json``, and the edits by name."""
    subject = task.subject
    with stage("codes", 4, "texts") as shown:
        codes: list[DocumentCodes] = []
        for rows in (task.towards.choosing, task.away_from.choosing, task.towards.reporting, task.away_from.reporting):
            codes.append(document_codes(subject, rows))
            shown.update(len(codes))
    piece = max(1, min(piece, *(len(each.documents) // FEWEST_PIECES for each in codes)))
    chosen_on, reported_on = (selectivity(a, b, pooling, piece) for a, b in (codes[:2], codes[2:]))
    words = token_texts(subject.model.tokenizer, len(subject.model.tokenizer))
    effects = _effects(task, codes[0], codes[1], chosen_on)
    edits, roles = _edits(task, codes, effects, latents)
    rows = _measured(task, edits, strengths, most_kl)
    figures, directions = spectrum(position_differences(codes[0], codes[1]))
    difference = codes[0].mean - codes[1].mean
    raised = edits[RAISED].direction(subject).cpu().numpy()
    report_order = np.argsort(-chosen_on, kind="stable")[:latents]
    entries: dict[str, Any] = {
        "documents": {"towards": sum(map(len, task.towards)), "from": sum(map(len, task.away_from))},
        "target_tokens": _token_entries(task.sets.target, codes[2], words),
        "contrast_tokens": _token_entries(task.sets.contrast, codes[3], words),
        "classifier_accuracy": number(task.classifier.accuracy),
        "lengths": {"prompt": task.sizes.prompt, "new": task.sizes.new, "prefix": task.sizes.prefix, "piece": piece},
        "selectivity": _histogram(reported_on[codes[2].firings() + codes[3].firings() > 0]),
        "most_selective": [
            {"latent": int(latent), "auroc_choosing": number(chosen_on[latent]), "auroc": number(reported_on[latent])}
            for latent in report_order
        ],
        "directions": figures
        | {
            "mean_difference_norm": number(np.linalg.norm(difference)),
            "raised_norm": number(np.linalg.norm(raised)),
            "cosines": {
                "raised_mean": _cosine(raised, difference),
                "first_mean": abs(_cosine(directions[0], difference)),
                "raised_first": abs(_cosine(directions[0], raised)),
            },
        },
        "clean": _clean(task),
        "edits": rows,
        "latents": _latent_entries(task, codes, words, roles, chosen_on, reported_on, effects),
        "samples": _samples(task, edits, rows, given),
    }
    return entries, edits


def _effects(
    task: SteerTask, towards: DocumentCodes, away_from: DocumentCodes, selective: Float[np.ndarray, " n_latents"]
) -> dict[int, LatentEffect]:
    """Return the effect of each candidate: the change of the target tokens' log mass by its edit alone.

    A latent that is larger in the text steered towards is raised to its mean there; one that is larger in the other text is
    set to zero.
    """
    prompts, means = task.prompts(0), towards.means()
    differences = means - away_from.means()
    order = np.argsort(-selective, kind="stable")
    up = [int(latent) for latent in order[:CANDIDATES] if selective[latent] > 0.5 and differences[latent] > 0]
    down = [int(latent) for latent in order[::-1][:CANDIDATES] if selective[latent] < 0.5 and differences[latent] < 0]
    before = log_mass(task.steered, prompts, task.sets.target, (NO_EDIT, 0.0))
    found: dict[int, LatentEffect] = {}
    with stage("effects", len(up) + len(down), "latents") as shown:
        for latent in (*up, *down):
            edit = Edit("one", (latent,), (means[latent],), floor=True) if latent in up else Edit("one", zeroed=(latent,))
            change = float((log_mass(task.steered, prompts, task.sets.target, (edit, 1.0)) - before).mean())
            found[latent] = LatentEffect(float(means[latent]), float(differences[latent]), change)
            shown.update(len(found))
    return found


def _edits(
    task: SteerTask, codes: Sequence[DocumentCodes], effects: dict[int, LatentEffect], latents: int
) -> tuple[dict[str, Edit], dict[int, str]]:
    """Return the edits that are compared, and the role of every latent that the first of them touches."""
    towards, away_from = codes[0], codes[1]
    by_effect = sorted(effects, key=lambda latent: (-effects[latent].effect, latent))
    up = [latent for latent in by_effect if effects[latent].difference > 0][:latents]
    up = [latent for latent in up if effects[latent].effect >= LEAST_EFFECT * effects[up[0]].effect > 0]
    if not up:
        raise ValueError(
            "--towards: expected latents that are more active there than in --from, and make its tokens more likely, found "
            "none. This dictionary does not tell the two texts apart; give others, or a dictionary of another layer."
        )
    firings = np.stack([each.firings() for each in (towards, away_from)]).sum(0)
    density = firings / (len(towards.token_ids) + len(away_from.token_ids))
    # As many latents must be left for the random ones.
    room = int((density > 0).sum()) // 2 - len(up)
    down = [latent for latent in by_effect if effects[latent].difference < 0 and effects[latent].effect > 0][: max(0, room)]
    raised, added = (tuple(getattr(effects[latent], name) for latent in up) for name in ("mean", "difference"))
    edits = {
        LATENT_EDIT: Edit(LATENT_EDIT, tuple(up), raised, tuple(down), floor=True),
        RAISED: Edit(RAISED, tuple(up), added),
    }
    rng = np.random.default_rng(task.steered.seed)
    for draw in range(RANDOM_DRAWS):
        edits[f"{RANDOM}_{draw}"] = random_edit(edits[LATENT_EDIT], density, task.subject, rng, f"{RANDOM}_{draw}")
    difference = towards.mean - away_from.mean
    figures, directions = spectrum(position_differences(towards, away_from))
    some = directions[: figures["directions"]]
    device = task.subject.model.device
    edits[MEAN] = Edit(MEAN, vector=torch.from_numpy(difference).float().to(device))
    edits[DIRECTIONS] = Edit(DIRECTIONS, vector=torch.from_numpy(difference @ some.T @ some).float().to(device))
    beginning = max(task.towards.choosing, key=len)[FIRST : FIRST + task.sizes.prefix]
    edits[PREFIX] = Edit(PREFIX, prefix=tuple(beginning))
    return edits, dict.fromkeys(up, "raised") | dict.fromkeys(down, "zeroed")


def _measured(task: SteerTask, edits: dict[str, Edit], strengths: Sequence[float], most_kl: float) -> list[dict[str, Any]]:
    """Return a row for every edit: its figures at every strength on the reporting halves, and the strength that was chosen."""
    settings = [(edit, strength) for edit in edits.values() for strength in ((1.0,) if edit.prefix else strengths)]
    with stage("strengths", 3 + len(settings), "edits") as shown:
        neutral = costs(task.steered, task.neutral.choosing[:COST_DOCUMENTS], settings, task.padding)
        reported = costs(task.steered, task.neutral.reporting[:COST_DOCUMENTS], settings, task.padding)
        shown.update(2)
        own = reported
        if task.neutral is not task.towards:
            own = costs(task.steered, task.towards.reporting[:COST_DOCUMENTS], settings, task.padding)
        shown.update(3)
        choosing, reporting = task.prompts(0), task.prompts(1)
        rows: dict[str, dict[str, Any]] = {name: {"name": name, "points": [], "chosen": None} for name in edits}
        for place, setting in enumerate(settings):
            tried = masses(task.steered, choosing, task.sets, setting)
            share = success(task.steered, reporting, task.sizes.new, task.classifier, task.sets, setting)
            point = {"strength": setting[1]} | reported[place]
            point |= {"towards_kl": own[place]["kl"], "towards_ce": own[place]["ce"]}
            point |= masses(task.steered, reporting, task.sets, setting) | share
            point |= {"choosing_kl": neutral[place]["kl"], "choosing_mass": tried["target_mass"]}
            rows[setting[0].name]["points"].append(point)
            shown.update(4 + place)
    for name, row in rows.items():
        # A prefix has no strength to choose.
        fits = [point for point in row["points"] if point["choosing_kl"] <= most_kl or name == PREFIX]
        row["chosen"] = max(fits, key=lambda point: point["choosing_mass"], default=None)
    return list(rows.values())


def _clean(task: SteerTask) -> dict[str, Any]:
    """Return the figures of the model without edits, on prompts from the text and, as a ceiling, from the one towards."""
    setting = (NO_EDIT, 0.0)
    found = masses(task.steered, task.prompts(1), task.sets, setting)
    share = success(task.steered, task.prompts(1), task.sizes.new, task.classifier, task.sets, setting)
    ceiling = prompts_of(task.towards.reporting, task.sizes.prompt, PROMPTS, "--towards")
    best = success(task.steered, ceiling, task.sizes.new, task.classifier, task.sets, setting)
    most = masses(task.steered, ceiling, task.sets, setting)
    return found | share | {"towards_share": best["share"], "towards_target_mass": most["target_mass"]}


def _token_entries(mask: Bool[np.ndarray, " vocabulary"], codes: DocumentCodes, words: Sequence[str]) -> dict[str, Any]:
    """Return the number of tokens in a set, their share of a text's tokens, and the most frequent ones."""
    counts = np.bincount(codes.token_ids, minlength=len(mask)) * mask
    order = [token for token in np.argsort(-counts, kind="stable")[:NAMED_TOKENS] if counts[token]]
    return {
        "count": int(mask.sum()),
        "share": number(counts.sum() / len(codes.token_ids)),
        "most_frequent": [words[token] for token in order],
    }


def _histogram(values: Float[np.ndarray, " latents"]) -> list[int]:
    return np.histogram(values, bins=40, range=(0, 1))[0].tolist()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return number(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), np.finfo(float).tiny))


def _latent_entries(
    task: SteerTask,
    codes: Sequence[DocumentCodes],
    words: Sequence[str],
    roles: dict[int, str],
    chosen_on: Float[np.ndarray, " n_latents"],
    reported_on: Float[np.ndarray, " n_latents"],
    effects: dict[int, LatentEffect],
) -> list[dict[str, Any]]:
    """Return the latents that the edit touches, with their contexts in the reporting half of the text they are typical of."""
    rows = []
    for latent, role in roles.items():
        found = effects[latent]
        rows.append(
            record_of(latent, codes[2] if role == "raised" else codes[3], words)
            | {
                "role": role,
                "auroc_choosing": number(chosen_on[latent]),
                "auroc": number(reported_on[latent]),
                "mean": number(found.mean),
                "difference": number(found.difference),
                "effect": number(found.effect),
                "effect_per_unit": number(found.effect / found.mean) if role == "raised" else None,
            }
        )
    return rows


def _samples(
    task: SteerTask, edits: dict[str, Edit], rows: Sequence[dict[str, Any]], given: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Return continuations of the prompts given and of some from the text: clean, and under edits at their chosen strengths."""
    tokenizer = task.subject.model.tokenizer
    own = [prompt[None] for prompt in task.prompts(1)[:SAMPLES]]
    chosen = {row["name"]: row["chosen"] for row in rows if row["name"] in (LATENT_EDIT, RAISED, f"{RANDOM}_0", MEAN, PREFIX)}
    found = []
    for prompt in (*given, *own):
        texts = {"none": task.steered.continuations(prompt, task.sizes.new, NO_EDIT, 0.0)}
        for name, point in chosen.items():
            if point is not None:
                texts[name] = task.steered.continuations(prompt, task.sizes.new, edits[name], point["strength"])
        found.append(
            {
                "prompt": tokenizer.decode(prompt[0], skip_special_tokens=True),
                "texts": {name: tokenizer.decode(ids[0], skip_special_tokens=True) for name, ids in texts.items()},
            }
        )
    return found
