"""Forward passes of the full model, each with one latent of the graph changed, optionally with parts of it frozen."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...sae.sparse_code import SparseCode
from ...training.activations.architecture import Norm
from ...training.activations.insertions import Intervention
from ...training.activations.splice import model_spliced
from .graph import AttributionGraph
from .local_replacement_model import LocalReplacement

ValueReader = Callable[[Tensor], Tensor | None]


class Measured:
    """Batched runs of the prompt, each with one latent of the graph changed.

    Args:
        hold_mlps: Freeze all MLP outputs, except for what the changed latent writes.
        hold_patterns: Use the clean run's attention patterns.
        hold_norms: Use the clean run's norm denominators.
    """

    def __init__(
        self,
        local: LocalReplacement,
        graph: AttributionGraph,
        hold_mlps: bool = False,
        hold_patterns: bool = False,
        hold_norms: bool = False,
    ):
        self.local, self.graph = local, graph
        self.hold_mlps, self.hold_patterns, self.hold_norms = hold_mlps, hold_patterns, hold_norms
        # From the latest pass: the stream before attention and before the MLP's norm, and the MLP inputs.
        self._pre: dict[int, Tensor] = {}
        self._mid: dict[int, Tensor] = {}
        self._mlp_in: dict[int, Tensor] = {}
        # Inputs of the norms after attention and MLP, by module path.
        self._before: dict[str, Tensor] = {}
        self._last: list[Tensor] = []

    @torch.no_grad()
    def changes(self, some: Int[Tensor, " runs"], factor: float) -> Float[Tensor, "runs nodes"]:
        """Return the change of every latent's pre-activation and every target relative to the clean run."""
        local, runs = self.local, len(some)
        edits = [self._edit(latent, run, runs, factor) for run, latent in enumerate(some.tolist())]
        codes, errors = {}, {}
        if self.hold_mlps:
            rows = slice(local.exclude_leading, None)
            for layer in local.replacement.layers:
                place = local.replacement.place(layer)
                codes[place], errors[place] = tiled(local.codes[layer], rows, runs), local.errors[layer, rows].repeat(runs, 1)
        kept, insertions = kept_positions(local, runs), local.replacement.insertions()
        splice = model_spliced(local.anatomy.model, insertions, not self.hold_mlps, kept, edits, codes, errors)
        # These hooks first: dictionaries must read the output of a frozen norm.
        with local.anatomy.model.hooked(self._readers()), splice:
            logits = local.anatomy.model.logits(local.token_ids.expand(runs, -1))[:, -1]
        if self.hold_norms or local.anatomy.logit_cap is not None:
            # Logits before the soft cap, as the graph has them.
            [last] = self._last
            last, norm = last[:, -1], local.anatomy.final_norm
            scale = local.trace.last_scale[:, -1] if self.hold_norms else norm.scale(last)
            logits = norm.apply(last, scale) @ local.anatomy.W_U.T
        return self.graph.changes(self._pre_acts(logits), self._targets(logits))

    def _targets(self, logits: Float[Tensor, "runs vocabulary"]) -> Float[Tensor, "runs targets"]:
        means = logits.mean(-1)
        return torch.stack(
            [logits[:, t.token] - (means if t.foil is None else logits[:, t.foil]) for t in self.graph.targets], 1
        )

    def _pre_acts(self, logits: Tensor) -> Float[Tensor, "runs latents"]:
        active, replacement = self.graph.active, self.local.replacement
        found = logits.new_zeros(len(logits), len(active))
        for layer in replacement.layers:
            here = active.layers == layer
            vectors, constants = replacement.reads(layer, active.latents[here])
            found[:, here] = torch.einsum("bnm,nm->bn", self._mlp_in[layer][:, active.positions[here]], vectors) + constants
        return found

    def _edit(self, latent: int, run: int, runs: int, factor: float) -> Intervention:
        """Return the intervention that scales one latent at its position in one run."""
        node = self.graph.node(latent)
        assert node.layer is not None
        assert node.index is not None
        where = torch.zeros(runs, len(self.local.token_ids), dtype=torch.bool)
        where[run, node.position] = True
        insertion, site = self.local.replacement.place(node.layer)
        return Intervention("scale", [node.index], factor, positions=where, insertion=insertion, site=site)

    def _readers(self) -> dict[str, ValueReader]:
        anatomy, readers = self.local.anatomy, {}
        for layer, block in enumerate(anatomy.blocks):
            sites = block.sites()
            readers[sites["resid_pre"][0]] = self._keep(self._pre, layer)
            if not anatomy.parallel:
                readers[sites["resid_mid"][0]] = self._keep(self._mid, layer)
            readers[sites["mlp"][0]] = self._read(layer)
            if self.hold_patterns:
                readers[sites["attn_heads"][0]] = self._mix(layer)
            if self.hold_mlps and layer not in self.local.replacement.layers:
                readers[sites["mlp"][1]] = self._held(layer)
            if self.hold_norms:
                readers |= self._post_norms(layer)
        readers[anatomy.blocks[-1].sites()["resid_post"][0]] = self._keep_last
        return readers

    def _post_norms(self, layer: int) -> dict[str, ValueReader]:
        """Return readers that hold the denominators of the norms after attention and MLP."""
        paths = self.local.anatomy.post_norm_paths(layer)
        if paths is None:
            return {}
        weights, at = self.local.anatomy.layers[layer], self.local.trace.layers[layer]
        readers: dict[str, ValueReader] = {}
        for path, norm, scale in (
            (paths[0], weights.attention_post_norm, at.attention_post_scale),
            (paths[1], weights.mlp_post_norm, at.mlp_post_scale),
        ):
            assert norm is not None
            assert scale is not None
            readers[f"{path}:in"] = self._keep_before(path)
            readers[f"{path}:out"] = self._held_norm(path, norm, scale)
        return readers

    def _keep_before(self, path: str) -> ValueReader:
        return lambda x: self._before.__setitem__(path, x.clone())

    def _held_norm(self, path: str, norm: Norm, scale: Tensor) -> ValueReader:
        return lambda _: norm.apply(self._before[path], scale)

    def _keep(self, into: dict[int, Tensor], layer: int) -> ValueReader:
        # Cloned: later modules may modify it in place.
        return lambda x: into.__setitem__(layer, x.clone())

    def _keep_last(self, x: Tensor) -> None:
        self._last = [x.clone()]

    def _read(self, layer: int) -> ValueReader:
        norm, at = self.local.anatomy.layers[layer].mlp_norm, self.local.trace.layers[layer]

        def read(x: Tensor) -> Tensor | None:
            changed = None
            if self.hold_norms:
                x = changed = norm.apply((self._pre if self.local.anatomy.parallel else self._mid)[layer], at.mlp_scale)
            self._mlp_in[layer] = x.clone()
            return changed

        return read

    def _mix(self, layer: int) -> ValueReader:
        weights, at = self.local.anatomy.layers[layer], self.local.trace.layers[layer]
        norm = weights.attention_norm

        def mixed(_: Tensor) -> Tensor:
            stream = self._pre[layer]
            normed = norm.apply(stream, at.attention_scale if self.hold_norms else norm.scale(stream))
            v = torch.einsum("bsm,hdm->bshd", normed, weights.W_V) + weights.b_V
            return torch.einsum("hts,bshd->bthd", at.pattern[0], v).flatten(2)

        return mixed

    def _held(self, layer: int) -> ValueReader:
        clean = self.local.trace.layers[layer].mlp_out
        return lambda y: clean.expand_as(y).clone()


def kept_positions(local: LocalReplacement, runs: int) -> Bool[Tensor, "runs positions"]:
    """Return the mask of positions at which MLPs are replaced."""
    kept = torch.ones(runs, len(local.token_ids), dtype=torch.bool)
    kept[:, : local.exclude_leading] = False
    return kept


def tiled(code: SparseCode, rows: slice, runs: int) -> SparseCode:
    """Return the code of the tokens in ``rows``, repeated for every run."""
    first = int(code.starts[rows.start])
    latents, values, starts = code.latents[first:], code.values[first:], code.starts[rows] - first
    offsets = torch.arange(runs, device=starts.device)[:, None] * len(latents)
    return SparseCode(latents.repeat(runs), values.repeat(runs), (starts + offsets).flatten())
