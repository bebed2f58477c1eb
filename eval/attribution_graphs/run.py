"""Attribution graph of a checkpoint on a prompt: ``graph.json`` and ``graph.html``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...sae.files import write_json
from ...training.activations.architecture import Architecture
from ...training.activations.model import LanguageModel, load_model
from ...training.recipe import HarvestSection, ModelSection, TextSection
from ...training.tokens import with_one_bos
from ...transcoders.cross_layer import CrossLayerTranscoder
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ...transcoders.stack import Stack, hooks_of_provenance
from .. import checkpoint as loading
from ..features.predicates import token_texts
from ..pages.render import render_file
from ..result import Report
from .attention import graph_attention
from .edges import MAX_NUMBERS
from .export import GraphLabels, as_json, write_graph
from .graph import AttributionGraph, graph_of
from .interventions import EFFECTS, PLACES, compare_replacement, intervene, most_influential
from .labels import Latent, Note, latents_of, read_heldout, read_records, with_promoted
from .levels import LevelSearch, search_levels
from .local_replacement_model import LocalReplacement
from .page_data import DATA_FILE, node_rows, page_data
from .pruning import EDGE_THRESHOLD, NODE_THRESHOLD, Pruned
from .replacement_model import Replacement, mlp_hooks, require_model

DEFAULT_TOKENS = 60_000
INTERVENTIONS = 30


@dataclass(frozen=True)
class GraphTarget:
    """The replacement model of a checkpoint, with its language model and provenance.

    ``folders`` are the members' directories, by the layers they replace; ``source`` is the loaded checkpoint.
    """

    model: LanguageModel
    replacement: Replacement
    provenance: Mapping[str, Any]
    folders: Mapping[tuple[int, ...], Path]
    source: loading.LoadedCheckpoint

    @property
    def text(self) -> TextSection:
        return TextSection.model_validate(self.provenance["text"])


def attribution_graph(
    checkpoint: loading.Checkpoint,
    prompt: str,
    out: str | Path | None = None,
    answer: str | None = None,
    foil: str | None = None,
    exclude_leading: int = 1,
    max_latents: int | None = None,
    node_threshold: float = NODE_THRESHOLD,
    edge_threshold: float = EDGE_THRESHOLD,
    context_tokens: int = DEFAULT_TOKENS,
    options: CheckpointOptions = NO_OPTIONS,
    model: LanguageModel | Any = None,
    attention: bool = False,
    levels: Sequence[int] = (),
    max_numbers: int = MAX_NUMBERS,
    tokenizer: Any = None,
) -> Report:
    """Compute a prompt's attribution graph; write ``graph.json`` and ``graph.html``, and return its scores and sizes.

    Example::

        facts = attribution_graph("runs/transcoders", "The capital of France is", answer=" Paris")
        print(facts["replacement_score"], facts["page_path"])
        facts.to_pandas()  # the kept nodes, the most influential first

    Args:
        checkpoint: A directory of transcoder checkpoints, a cross-layer transcoder, or a single transcoder; or loaded ones.
        out: Directory for the files; by default the checkpoint's folder ``graph``, and required with loaded ones.
        answer: Target token, as text of one token; by default the likeliest next tokens.
        foil: The target is the logit of ``answer`` minus that of this token.
        exclude_leading: Number of leading positions at which MLP outputs are constants.
        max_latents: Keep only this many latents, by influence; by default all, or as many as ``max_numbers`` allows.
        node_threshold: Share of the influence that the kept nodes carry.
        edge_threshold: Share of the influence that the kept edges carry.
        context_tokens: Held-out tokens to search for contexts of latents without a ``features.jsonl``; 0 skips this.
        options: Facts that the checkpoint's files leave open.
        model: The model the transcoders belong to, if it is in memory: a ``LanguageModel``, or a model object in place of the
            one that the checkpoint names, as in ``evaluate``. By default it is loaded by its id.
        attention: Add the heads and positions that carry each kept edge, and decompose the scores of the most influential ones.
        levels: Numbers of clusters, coarse to fine: group latents into supernodes and search a circuit along them by ablation.
        max_numbers: Entries of the largest tensor that the graph makes, which bounds the prompt's length times latents.
        tokenizer: Tokenizer of a model object, if it has none itself.

    Raises:
        ValueError: If the checkpoint, its model, the prompt or a token is invalid, they do not fit each other, or the graph
            exceeds ``max_numbers``.
    """
    if model is not None and not isinstance(model, LanguageModel):
        model = LanguageModel.from_pretrained(model, tokenizer).named_by_weights()
        options = options.updated(model=model.id)
    opened = open_graph_target(checkpoint, options, model)
    tokenizer = opened.model.tokenizer
    words = token_texts(tokenizer, len(tokenizer))
    token_ids = prompt_ids(opened, prompt)
    local = LocalReplacement(opened.replacement, token_ids, exclude_leading)
    chosen = [None if text is None else one_token(opened, name, text) for name, text in (("answer", answer), ("foil", foil))]
    graph = graph_of(local, *chosen, max_latents=max_latents, max_numbers=max_numbers)
    pruned = graph.prune(node_threshold, edge_threshold)
    seen = graph_attention(local, graph, pruned, max_numbers=max_numbers) if attention else None
    found = search_levels(local, graph, levels, max_numbers=max_numbers) if levels else None
    notes = _notes(opened, graph, pruned, words, context_tokens)
    targets = [words[t.token] + ("" if t.foil is None else f" \u2212 {words[t.foil]}") for t in graph.targets]
    tokens = [words[token] for token in token_ids.tolist()]
    labels = GraphLabels(opened.model.id, opened.source.name, prompt, tokens, targets, notes)
    target = Path(out) if out is not None else opened.source.results / "graph"
    facts = _facts(local, graph, pruned, max_numbers) | _level_facts(found)
    path = write_graph(target, as_json(graph, pruned, labels, node_threshold, edge_threshold, seen, found), notes)
    data = page_data(graph, pruned, labels, facts, seen, found)
    page = _written_page(path, data)
    return Report(facts | {"json_path": str(path), "page_path": str(page)}, node_rows(data))


def save_graph(graph: AttributionGraph, directory: str | Path, labels: GraphLabels | None = None) -> None:
    """Write ``graph.json``, in circuit-tracer's format, and ``graph.html``; without ``labels``, tokens are shown by id."""
    if labels is None:
        tokens = [str(token) for token in graph.token_ids.tolist()]
        targets = [str(target.token) + ("" if target.foil is None else f" \u2212 {target.foil}") for target in graph.targets]
        labels = GraphLabels("", "", " ".join(tokens), tokens, targets, {})
    pruned = graph.prune()
    path = write_graph(directory, as_json(graph, pruned, labels, NODE_THRESHOLD, EDGE_THRESHOLD), labels.notes)
    _written_page(path, page_data(graph, pruned, labels))


def _written_page(path: Path, data: Mapping[str, Any]) -> Path:
    """Write the page's data next to the graph, render the page, and return its path."""
    write_json(path.with_name(DATA_FILE), data, sealed=True, compact=True)
    return render_file(path)


def open_graph_target(
    checkpoint: loading.Checkpoint, options: CheckpointOptions = NO_OPTIONS, model: LanguageModel | None = None
) -> GraphTarget:
    """Load transcoders, and the model they were trained on if it is not given.

    Raises:
        ValueError: If they were trained on tensors, on different models, or on anything but MLPs.
    """
    found = loading.open_checkpoint(checkpoint, options).completed(text=False)
    provenances = [member.provenance for member in found.members]
    loaded = [member.dictionary for member in found.members]
    model = load_model(ModelSection.model_validate(provenances[0]["model"])) if model is None else model
    anatomy = Architecture(model, post_norms=True)
    hooks = [mlp_hooks(anatomy, provenance) for provenance in provenances]
    layers = [tuple(some) for some in hooks]
    for dictionary in loaded:
        dictionary.to(model.device)
    require_model(anatomy, provenances[0])
    if isinstance(loaded[0], CrossLayerTranscoder):
        replacement = Replacement(anatomy, loaded[0], layers[0], hooks[0])
    elif found.stacked:
        written = [hooks_of_provenance(provenance)[1][0] for provenance in provenances]
        stack = Stack(dict(zip(written, loaded, strict=True)), dict(zip(written, provenances, strict=True)))
        replacement = Replacement(anatomy, stack)
    else:
        replacement = Replacement(anatomy, {layers[0][0]: loaded[0]}, hooks=hooks[0])
    folders = {} if found.foreign else dict(zip(layers, (member.directory for member in found.members), strict=True))
    return GraphTarget(model, replacement, provenances[0], folders, found)


def prompt_ids(opened: GraphTarget, prompt: str) -> torch.Tensor:
    """Return the prompt's token ids, after a BOS token if contexts had one in training.

    Raises:
        ValueError: If the prompt is empty.
    """
    tokenizer = opened.model.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt: expected text of at least one token, got {prompt!r}.")
    bos = None if opened.text.bos == "none" else tokenizer.bos_token_id
    return torch.tensor(with_one_bos(ids, bos), device=opened.model.device)


def one_token(opened: GraphTarget, name: str, text: str) -> int:
    """Return the id of a text that is a single token, with or without a leading space.

    Raises:
        ValueError: If it is not a single token, or unknown to the tokenizer.
    """
    tokenizer = opened.model.tokenizer
    for spelled in (text, f" {text}"):
        ids = tokenizer(spelled, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    raise ValueError(f"{name}: expected text that is one token of {opened.model.id}, got {text!r}.")


def _notes(
    opened: GraphTarget, graph: AttributionGraph, pruned: Pruned, words: Sequence[str], context_tokens: int
) -> dict[Latent, Note]:
    """Return notes on the latents that are shown."""
    shown = graph.active.where(pruned.nodes[graph.latents])
    latents = list(latents_of(shown.layers, shown.latents))
    notes: dict[Latent, Note] = {}
    for layers, folder in opened.folders.items():
        notes |= read_records(folder, _numbers(opened.replacement, layers, latents))
    missing = [latent for latent in latents if latent not in notes]
    if missing and context_tokens and "source" in opened.provenance["text"]:
        reads = tuple(opened.replacement.anatomy.blocks[layer].sites()["mlp"][0] for layer in opened.replacement.layers)
        harvest = HarvestSection(hooks=reads, tokens=1, **opened.provenance["harvest"])
        notes |= read_heldout(opened.replacement, missing, opened.text, harvest, words, context_tokens)
    return with_promoted(opened.replacement, {latent: notes.get(latent, Note()) for latent in latents}, words)


def _numbers(replacement: Replacement, layers: tuple[int, ...], latents: Sequence[Latent]) -> dict[int, Latent]:
    """Map the latents' numbers in one checkpoint to latents; a cross-layer transcoder numbers them through all layers."""
    found = {}
    for layer, latent in latents:
        if layer in layers:
            insertion, site = replacement.place(layer)
            found[replacement.insertions()[insertion].dictionary.blocks[site].latents.start + latent] = (layer, latent)
    return found


def _level_facts(found: LevelSearch | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "circuit_size": int(found.circuit.sum()),
        "circuit_faithfulness": found.faithfulness,
        "circuit_passes": found.passes,
        "circuit_flat_passes": found.flat_passes,
    }


def _facts(local: LocalReplacement, graph: AttributionGraph, pruned: Pruned, max_numbers: int) -> dict[str, Any]:
    scores = graph.scores()
    facts: dict[str, Any] = {
        "positions": len(graph.token_ids),
        "n_nodes": int(pruned.nodes.sum()),
        "n_edges": int(pruned.edges.sum()),
        "n_nodes_all": graph.n_nodes,
        "n_edges_all": int((graph.adjacency != 0).sum()),
        "latents_left_out": graph.n_left_out,
        "left_out_share": graph.left_out_share,
        "replacement_score": scores.replacement,
        "completeness_score": scores.completeness,
        "error_shares": graph.error_shares().tolist(),
        **asdict(compare_replacement(local)),
    }
    shown = pruned.nodes[graph.latents].nonzero()[:, 0]
    sources = most_influential(graph, INTERVENTIONS)
    found = intervene(local, graph, sources, shown, max_numbers=max_numbers)
    for kind in EFFECTS:
        for place in PLACES[1:]:
            agreement = found.agreement(kind, place) if len(sources) * len(found.targets) > 2 else None
            facts[f"{kind}_spearman_{place}"] = None if agreement is None else agreement.spearman
    return facts
