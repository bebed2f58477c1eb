"""Where things are in a model: the hooks of a block by what they mean, found in the module tree alone.

A site is a place in a block: ``layer`` and site together name the hook a dictionary reads and the one it writes. No weights
are looked at, so a model on the meta device will do.

- ``resid_pre``, ``resid_mid``, ``resid_post``: the residual stream before the block, between attention and MLP, behind it.
- ``attn_heads``: the values all heads have mixed, side by side, which the output projection reads.
- ``attn_out``: what that projection writes.
- ``mlp_in``, ``mlp_out``: what the MLP reads, behind its norm, and what it writes.
- ``mlp``: from ``mlp_in`` to ``mlp_out``, the site of a transcoder.

Where a model norms what the MLP has written before adding it (Gemma 2, OLMo 2), ``mlp_out`` is still what the MLP itself
writes; likewise ``attn_out``. Where the MLP module adds the residual stream itself (BLOOM, MPT), ``mlp_out`` is what its last
projection writes, without that stream.
"""

import inspect
import re
from dataclasses import dataclass

from torch import nn

from ...sae.suggestions import did_you_mean
from ..recipe.validation import SITES
from .model import LanguageModel

# Sites that read one tensor and write another.
TWO_SIDED = ("mlp",)

# What architectures call the parts of a block, by path from the block; the first that is there counts.
ATTENTION = ("attn.attention", "attn", "attention", "self_attn", "self_attention")
ATTENTION_PROJECTION = ("c_proj", "o_proj", "out_proj", "dense")
MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
MLP_PROJECTION = ("dense_4h_to_h", "down_proj", "c_proj", "fc_out", "fc2")
# Two projections in the block itself, without a module around them (OPT, XGLM).
LOOSE_MLP = ("fc1", "fc2")
# Not every block's second norm comes before the MLP: one that is called so comes behind.
MLP_NORM = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm", "norm_2", "final_layer_norm")
NORM_BEHIND_MLP = "post_feedforward_layernorm"
# Configuration keys that say attention and MLP read the same stream.
PARALLEL = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")


@dataclass(frozen=True)
class BlockPaths:
    """Module paths within the whole model; None where this block has no such part."""

    path: str
    attention: str | None
    attention_projection: str | None
    mlp: tuple[str, str] | None
    mlp_norm: str | None
    parallel: bool

    def sites(self) -> dict[str, tuple[str, str]]:
        """The hooks of every site this block has: what is read, what is written."""
        found = {"resid_pre": f"{self.path}:in", "resid_mid": None, "resid_post": f"{self.path}:out"}
        if self.attention_projection is not None:
            found |= {"attn_heads": f"{self.attention_projection}:in", "attn_out": f"{self.attention_projection}:out"}
        hooks = {}
        if self.mlp is not None:
            reads, writes = f"{self.mlp[0]}:in", f"{self.mlp[1]}:out"
            found |= {"mlp_in": reads, "mlp_out": writes}
            if not self.parallel:
                # Without a norm before it the MLP reads the stream itself.
                found["resid_mid"] = reads if self.mlp_norm is None else f"{self.mlp_norm}:in"
            hooks["mlp"] = (reads, writes)
        hooks |= {site: (hook, hook) for site, hook in found.items() if hook is not None}
        return {site: hooks[site] for site in SITES if site in hooks}


def n_layers(module: nn.Module) -> int:
    """How many blocks the model has."""
    return len(_block_paths(module))


def find_block(module: nn.Module, layer: int) -> BlockPaths:
    """The parts of one block.

    Raises:
        ValueError: If the model has no such block.
    """
    paths = _block_paths(module)
    if not 0 <= layer < len(paths):
        raise ValueError(
            f"dictionary.layer: expected 0 to {len(paths) - 1}, as the model has {len(paths)} blocks, got {layer}."
        )
    path = paths[layer]
    block = module.get_submodule(path)
    config = getattr(module, "config", None)
    children = {name for name, _ in block.named_modules() if name}

    def first(names: tuple[str, ...], within: str = "") -> str | None:
        return next((f"{within}{name}" for name in names if f"{within}{name}" in children), None)

    attention = first(ATTENTION)
    projection = attention and first(ATTENTION_PROJECTION, f"{attention}.")
    norm = first(MLP_NORM)
    parallel = any(getattr(config, key, False) for key in PARALLEL)
    if (norm != MLP_NORM[0] and NORM_BEHIND_MLP in children) or getattr(config, "do_layer_norm_before", True) is False:
        norm = None
    elif norm is None:
        # One norm for both: then both read the same stream.
        parallel = True
    mlp = first(MLP)
    if mlp is not None:
        ends = (mlp, _writer(block, mlp, first(MLP_PROJECTION, f"{mlp}.")))
    else:
        ends = LOOSE_MLP if children.issuperset(LOOSE_MLP) else None
    return BlockPaths(
        path,
        attention and f"{path}.{attention}",
        projection and f"{path}.{projection}",
        ends and (f"{path}.{ends[0]}", f"{path}.{ends[1]}"),
        norm and f"{path}.{norm}",
        parallel,
    )


def sites_of(module: nn.Module) -> tuple[str, ...]:
    """The sites this architecture has."""
    return tuple(find_block(module, 0).sites())


def site_hooks(module: nn.Module, layer: int, site: str) -> tuple[str, str]:
    """The hook read and the hook written at a site; one and the same unless the site is one of ``TWO_SIDED``.

    Raises:
        ValueError: If there is no such layer, or the architecture has no such site; those it has are listed.
    """
    block = find_block(module, layer)
    hooks = block.sites()
    if site in hooks:
        return hooks[site]
    choices = f"this architecture has {', '.join(hooks)}"
    if site not in SITES:
        raise ValueError(f"dictionary.site: {site!r} is no site; {choices}.{did_you_mean(site, hooks)}")
    if block.mlp is not None and block.parallel and site == "resid_mid":
        reason = "attention and MLP of a block read the same stream, so nothing lies between them"
    else:
        part = "attention's output projection" if site.startswith("attn") else "MLP"
        inside = ", ".join(name for name, _ in module.get_submodule(block.path).named_modules() if name)
        reason = (
            f"the {part} could not be located in {block.path}, whose modules are {inside}. Give hook_in and hook_out "
            "(for an SAE: hook) by hand, as MODULE_PATH:in or MODULE_PATH:out"
        )
    raise ValueError(f"dictionary.site: {site!r}: {choices}; {reason}.")


def _block_paths(module: nn.Module) -> list[str]:
    config = getattr(module, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if not lists:
        raise ValueError(
            f"dictionary.layer: no list of {count or 'as many modules as config.num_hidden_layers'} blocks was found in "
            f"{type(module).__name__}. Give hook_in and hook_out (for an SAE: hook) by hand."
        )
    # A block may hold lists of its own that happen to be as long.
    outermost = min(lists, key=lambda name: name.count("."))
    return [f"{outermost}.{index}" for index in range(count or 0)]


def _writer(block: nn.Module, mlp: str, projection: str | None) -> str:
    takes = inspect.signature(block.get_submodule(mlp).forward).parameters
    # A module that is given the stream adds it to what it writes.
    return projection if "residual" in takes and projection is not None else mlp


# The last linear map of an MLP, whose inputs are its neurons, as model families name it.
NEURON_READERS = ("mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2")


def neuron_hook(model: LanguageModel, hook: str) -> str | None:
    """Where the neurons of the hook's own block can be read; None if the model has none by a known name."""
    block = re.match(r".*?\.\d+(?=[.:])", hook)
    names = dict(model.module.named_modules())
    found = (
        [] if block is None else [f"{block.group()}.{name}" for name in NEURON_READERS if f"{block.group()}.{name}" in names]
    )
    return f"{found[0]}:in" if found else None
