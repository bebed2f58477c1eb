"""Sites of a transformer block: its hooks, named by their role.

A layer and a site name the hook that a dictionary reads and the one that it writes. Attention and MLP are recognized by their
module names; one forward pass (``dataflow``) then shows whether they are connected as their names suggest, whether they read
the same residual stream, and where that stream is visible between them. Values do not matter, so no weights are needed.

- ``resid_pre``, ``resid_mid``, ``resid_post``: the residual stream before the block, between attention and MLP, after it.
- ``attn_heads``: the outputs of all heads, concatenated: the input of the output projection.
- ``attn_out``: the output of that projection.
- ``mlp_in``, ``mlp_out``: the input of the MLP, after its norm, and its output.
- ``mlp``: from ``mlp_in`` to ``mlp_out``, the site of a transcoder.
- ``router``: the logits of a mixture's experts. Routers are recognized by what they return (``routers``), not by their names.

If a model normalizes the MLP's output before adding it (Gemma 2, OLMo 2), ``mlp_out`` is still the output of the MLP itself;
likewise ``attn_out``. If the MLP module adds the residual stream itself (BLOOM, MPT), ``mlp_out`` is the output of its last
projection, without that stream.
"""

import inspect
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import nn

from ...sae.suggestions import did_you_mean
from ..recipe.hook_names import SITES
from .dataflow import Dataflow
from .hooked_model import HookedModel
from .routers import WITHOUT

# Sites that read one tensor and write another.
TWO_SIDED = ("mlp",)

# Names of the parts of a block across architectures, as paths within the block; the first match counts.
ATTENTION = ("attn.attention", "attn", "attention", "self_attn", "self_attention", "multi_head_attention", "temporal_block")
ATTENTION_PROJECTION = ("c_proj", "o_proj", "out_proj", "dense", "output.dense", "Wo")
MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "mlp_block")
MLP_PROJECTION = ("dense_4h_to_h", "down_proj", "c_proj", "fc_out", "fc2")
# First and last layer of MLPs that have no module of their own (OPT and XGLM, BERT).
LOOSE_MLPS = (("fc1", "fc2"), ("intermediate", "output.dense"))
# Configuration keys for the number of blocks, in order of preference.
COUNTS = ("num_hidden_layers", "decoder_layers", "num_layers", "n_layer", "n_layers")

log = logging.getLogger(__name__)
_found: WeakKeyDictionary[nn.Module, list["BlockPaths"]] = WeakKeyDictionary()


@dataclass(frozen=True)
class BlockPaths:
    """Module paths, within the whole model, of the parts of a block; None if the block has no such part."""

    path: str
    attention: str | None
    attention_projection: str | None
    mlp: tuple[str, str] | None
    mlp_norm: str | None
    parallel: bool
    resid_mid: str | None
    router: str | None = None

    def sites(self) -> dict[str, tuple[str, str]]:
        """Return the hook read and the hook written at every site of this block."""
        found = {"resid_pre": f"{self.path}:in", "resid_mid": None, "resid_post": f"{self.path}:out"}
        if self.attention_projection is not None:
            found |= {"attn_heads": f"{self.attention_projection}:in", "attn_out": f"{self.attention_projection}:out"}
        hooks = {}
        if self.mlp is not None:
            reads, writes = f"{self.mlp[0]}:in", f"{self.mlp[1]}:out"
            found |= {"resid_mid": self.resid_mid, "mlp_in": reads, "mlp_out": writes}
            hooks["mlp"] = (reads, writes)
        if self.router is not None:
            found["router"] = f"{self.router}:out"
        hooks |= {site: (hook, hook) for site, hook in found.items() if hook is not None}
        return {site: hooks[site] for site in SITES if site in hooks}


def n_layers(module: nn.Module) -> int:
    """Return the number of blocks of the model."""
    return len(block_paths(module))


def find_block(module: nn.Module, layer: int) -> BlockPaths:
    """Return the parts of one block, found by their names and by the data flow between them.

    Raises:
        ValueError: If the model has no such block.
    """
    paths = block_paths(module)
    if not 0 <= layer < len(paths):
        raise ValueError(
            f"dictionary.layer: expected 0 to {len(paths) - 1}, as the model has {len(paths)} blocks, got {layer}."
        )
    if module not in _found:
        _found[module] = _connected(module, [named_parts(module, path) for path in paths])
    return _found[module][layer]


def named_parts(module: nn.Module, path: str) -> BlockPaths:
    """Return the parts of a block that are recognized by name."""
    block = module.get_submodule(path)
    children = {name for name, _ in block.named_modules() if name}

    def first(names: tuple[str, ...], within: str = "") -> str | None:
        return next((f"{within}{name}" for name in names if f"{within}{name}" in children), None)

    attention = first(ATTENTION)
    projection = attention and first(ATTENTION_PROJECTION, f"{attention}.")
    mlp = first(MLP)
    if mlp is not None:
        ends = (mlp, _writer(block, mlp, first(MLP_PROJECTION, f"{mlp}.")))
    else:
        ends = next((pair for pair in LOOSE_MLPS if children.issuperset(pair)), None)
    return BlockPaths(
        path,
        attention and f"{path}.{attention}",
        projection and f"{path}.{projection}",
        ends and (f"{path}.{ends[0]}", f"{path}.{ends[1]}"),
        mlp_norm=None,
        parallel=False,
        resid_mid=None,
    )


def _connected(module: nn.Module, blocks: list[BlockPaths]) -> list[BlockPaths]:
    """Drop parts that are not connected as their names suggest, and add norm and stream between attention and MLP."""
    between = {block.path: _between(module, block) for block in blocks}
    inside = [
        f"{block.path}.{name}" for block in blocks for name, _ in module.get_submodule(block.path).named_modules() if name
    ]
    hooks = [
        f"{path}:{side}"
        for block in blocks
        for path in dict.fromkeys(
            (block.path, block.attention, block.attention_projection, *(block.mlp or ()), *between[block.path])
        )
        if path is not None
        for side in ("in", "out")
    ]
    try:
        flow = Dataflow(module, hooks, [f"{block.path}:in" for block in blocks], inside)
        assert flow.marks, "it runs without gradients"
    except Exception as error:  # noqa: BLE001 - models raise anything
        log.warning(
            "dictionary.site: %s could not be run to see how its parts are connected (%s: %s): attention and MLP are "
            "identified by name, and no site between them is offered.",
            type(module).__name__,
            type(error).__name__,
            error,
        )
        return blocks
    routers = {block.path: [path for path in flow.routers if path.startswith(f"{block.path}.")] for block in blocks}
    blocks = [replace(block, router=_mlp_first(block, routers[block.path])) for block in blocks]
    return [_checked(flow, block, between[block.path]) for block in blocks]


def _mlp_first(block: BlockPaths, routers: list[str]) -> str | None:
    """Return the router of a block: that of the MLP, if attention has one too (JetMoE)."""
    parts = tuple(f"{part}." for part in block.mlp or ())
    return next((path for path in routers if path.startswith(parts)), next(iter(routers), None))


def _between(module: nn.Module, block: BlockPaths) -> list[str]:
    """Return modules of a block outside its attention and MLP, where the residual stream may be visible."""
    parts = [path for path in (block.attention, *(block.mlp or ())) if path is not None]
    found = [f"{block.path}.{name}" for name, _ in module.get_submodule(block.path).named_modules() if name]
    return [path for path in found if not path.startswith(tuple(f"{part}." for part in parts)) and path not in parts]


def _checked(flow: Dataflow, block: BlockPaths, between: list[str]) -> BlockPaths:
    """Return the block as corrected by the data flow."""
    start, end, projection = f"{block.path}:in", f"{block.path}:out", block.attention_projection

    def chain(*hooks: str) -> bool:
        pairs = itertools.pairwise(hooks)
        return flow.marks.keys() >= set(hooks) and all(flow.depends(after, before) for before, after in pairs)

    def usable(part: tuple[str, str] | None) -> bool:
        """Return True if a part reads the residual stream, writes to it, and has hidden states at both ends."""
        hooks = () if part is None else (f"{part[0]}:in", f"{part[1]}:out")
        return bool(hooks) and chain(start, *hooks, end) and all(flow.marks[hook].axes <= 3 for hook in hooks)

    if projection is None or not usable((projection, projection)):
        projection = None
    if block.mlp is None or not usable(block.mlp):
        return replace(block, attention_projection=projection, mlp=None)
    reads, writes = f"{block.mlp[0]}:in", f"{block.mlp[1]}:out"
    # The attention module may add the residual stream and normalize the sum (BERT).
    paths = between if block.attention is None else [*between, block.attention]
    hooks = [hook for path in paths for hook in (f"{path}:in", f"{path}:out") if hook in flow.marks]
    # Without a norm, an identity module may be in its place.
    before = [path for path in between if flow.marks.keys() >= {f"{path}:in", f"{path}:out"}]
    before = [path for path in before if flow.source(f"{path}:out") is flow.source(reads)]
    norm = next((path for path in before if flow.source(f"{path}:in") is not flow.source(reads)), next(iter(before), None))
    written = None if projection is None else f"{projection}:out"
    return replace(
        block,
        attention_projection=projection,
        mlp_norm=norm,
        parallel=written is not None and not flow.depends(reads, written),
        resid_mid=_stream_between(flow, start, end, written, (reads, writes), hooks),
    )


def _stream_between(
    flow: Dataflow, start: str, end: str, written: str | None, mlp: tuple[str, str], hooks: Sequence[str]
) -> str | None:
    """Return the hook at the residual stream between attention and MLP: every path to or around the MLP passes through it.

    Of several candidates, the last one that everything reads is taken; if each reader has its own hook, the last of these.
    """
    reads, writes = mlp
    order = list(flow.marks)
    places = sorted(
        (
            hook
            for hook in (*hooks, reads)
            if flow.marks[hook].axes <= 3
            and flow.source(hook) is not flow.marks[start].node
            and not flow.depends(hook, writes)
            and flow.depends(hook, start if written is None else written)
        ),
        key=order.index,
    )
    for node_of in (lambda hook: flow.marks[hook].node, flow.source):
        found = [
            hook
            for hook in places
            if not flow.depends(reads, start, without=[node_of(hook)])
            and not flow.depends(end, start, without=[node_of(hook), flow.marks[writes].node])
        ]
        if found:
            # A container sees the same tensor as its first module: take the outermost.
            same = [hook for hook in found if flow.source(hook) is flow.source(found[-1])]
            return min(same, key=lambda hook: hook.count("."))
    return None


def sites_of(module: nn.Module) -> tuple[str, ...]:
    """Return the sites of this architecture: those of any of its blocks."""
    found = {site for layer in range(n_layers(module)) for site in find_block(module, layer).sites()}
    return tuple(site for site in SITES if site in found)


def hooks_with_sites(module: nn.Module) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return the hooks at the sites of all blocks, in the order of the layers: the layer of each, and the sites it serves.

    Raises:
        ValueError: If no blocks are found.
    """
    found: dict[str, tuple[int, list[str]]] = {}
    for layer in range(n_layers(module)):
        for site, (reads, writes) in find_block(module, layer).sites().items():
            if reads == writes:
                found.setdefault(reads, (layer, []))[1].append(site)
    return {hook: (layer, tuple(sites)) for hook, (layer, sites) in found.items()}


def site_hooks(module: nn.Module, layer: int, site: str) -> tuple[str, str]:
    """Return the hook read and the hook written at a site; they are the same unless the site is in ``TWO_SIDED``.

    Raises:
        ValueError: If there is no such layer, or the architecture has no such site; the message lists its sites.
    """
    block = find_block(module, layer)
    hooks = block.sites()
    if site in hooks:
        return hooks[site]
    choices = f"expected one of {', '.join(hooks)} for this architecture, got {site!r}"
    if site not in SITES:
        raise ValueError(f"dictionary.site: {choices}.{did_you_mean(site, hooks)}")
    if site == "router":
        raise ValueError(f"dictionary.site: {choices}: {_no_router(module, block.path)}.")
    if block.mlp is not None and block.parallel and site == "resid_mid":
        reason = "attention and MLP of a block read the same stream, so nothing lies between them"
    elif block.mlp is not None and site == "resid_mid":
        reason = (
            f"in {block.path} no module reads or returns the stream between attention and MLP. Give hook_in and hook_out (for "
            "an SAE: hook) by hand, as MODULE_PATH:in or MODULE_PATH:out"
        )
    else:
        part = "attention's output projection" if site.startswith("attn") else "MLP"
        inside = ", ".join(name for name, _ in module.get_submodule(block.path).named_modules() if name)
        reason = (
            f"the {part} could not be located in {block.path}, whose modules are {inside}. Give hook_in and hook_out "
            "(for an SAE: hook) by hand, as MODULE_PATH:in or MODULE_PATH:out"
        )
    raise ValueError(f"dictionary.site: {choices}: {reason}.")


def _no_router(module: nn.Module, path: str) -> str:
    layers = [layer for layer in range(n_layers(module)) if find_block(module, layer).router is not None]
    if layers:
        return f"{path} has no mixture of experts. The layers that have one: {', '.join(map(str, layers))}"
    for part in module.modules():
        if (reason := WITHOUT.get(type(part).__name__)) is not None:
            return (
                f"{type(module).__name__} has no logit for every expert: {reason}. A hook by hand, MODULE_PATH:out, reads "
                "what there is"
            )
    return (
        f"no module of {type(module).__name__} returns a router's logits together with the scores and indices of the experts "
        "that it chooses: it has no mixture of experts, or routes in another way. A hook by hand, MODULE_PATH:out, reads any "
        "module's output"
    )


def block_paths(module: nn.Module) -> list[str]:
    """Return the module paths of the model's blocks, in order.

    Raises:
        ValueError: If no list of as many blocks as the configuration says is found.
    """
    config = getattr(module, "config", None)
    # For multimodal models, the configuration of the text model.
    config = getattr(config, "get_text_config", lambda: config)()
    counts = [count for key in COUNTS if isinstance(count := getattr(config, key, None), int)]
    for count in counts:
        lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
        if lists:
            # Blocks, and encoders of other modalities, may contain module lists of the same length.
            outermost = min(lists, key=lambda name: (re.search("text|language|decoder", name) is None, name.count(".")))
            return [f"{outermost}.{index}" for index in range(count)]
    raise ValueError(
        f"dictionary.layer: expected a module list of {' or '.join(map(str, dict.fromkeys(counts))) or 'num_hidden_layers'} "
        f"blocks in {type(module).__name__}, found none. Give hook_in and hook_out (for an SAE: hook) by hand."
    )


def _writer(block: nn.Module, mlp: str, projection: str | None) -> str:
    takes = inspect.signature(block.get_submodule(mlp).forward).parameters
    # A module that takes the residual stream as an argument adds it to its output.
    return projection if "residual" in takes and projection is not None else mlp


# Names of the last linear map of an MLP, whose inputs are the neurons, across architectures.
NEURON_READERS = ("mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2")


def neuron_hook(model: HookedModel, hook: str) -> str | None:
    """Return the hook at the MLP neurons of the block that ``hook`` is in; None if no known name matches."""
    block = re.match(r".*?\.\d+(?=[.:])", hook)
    names = dict(model.module.named_modules())
    found = (
        [] if block is None else [f"{block.group()}.{name}" for name in NEURON_READERS if f"{block.group()}.{name}" in names]
    )
    return f"{found[0]}:in" if found else None
