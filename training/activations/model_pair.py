"""Two models run on the same token ids: a base and its fine-tuned copy, as one module with the hooks of both.

A hook of a pair begins with the name of its model: ``base/transformer.h.2:out`` and ``tuned/transformer.h.2:out``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

NAMES = ("base", "tuned")


class EnoughSeen(Exception):  # noqa: N818 - not an error
    """Control flow that ends a forward pass once the last hook has been read: all of them, or those of one model of a pair."""

    def __init__(self, of_all: bool = True):
        super().__init__()
        self.of_all = of_all


class PairOutput(NamedTuple):
    """Logits of both models; ``logits`` are those of the base, which are ``None`` if its pass ended early."""

    logits: Any
    tuned_logits: Any


class ModelPair(nn.Module):
    """Base and tuned model; a forward pass runs both, one after the other, on the same token ids."""

    def __init__(self, base: nn.Module, tuned: nn.Module):
        super().__init__()
        self.base, self.tuned = base, tuned
        self.config = getattr(base, "config", None)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of the base, whose tokenizer gives the token ids."""
        return self.base.get_input_embeddings()  # pyright: ignore[reportCallIssue]

    def forward(self, input_ids: Tensor, **options: Any) -> PairOutput:
        """Return the logits of both models.

        Raises:
            EnoughSeen: If a pass ended early because the last hook was read.
        """
        logits: list[Tensor | None] = []
        for part in (self.base, self.tuned):
            try:
                logits.append(part(input_ids=input_ids, **options).logits)
            except EnoughSeen as enough:
                if enough.of_all:
                    raise
                logits.append(None)
        return PairOutput(*logits)


def side_of(hook: str) -> str:
    """Return the model that a hook of a pair belongs to; an empty string for a hook of one model.

    >>> side_of("tuned/transformer.h.2:out"), side_of("transformer.h.2:out")
    ('tuned', '')
    """
    name, _, rest = hook.partition("/")
    return name if rest and name in NAMES else ""


def own_hook(hook: str) -> str:
    """Return a pair's hook as its own model names it.

    >>> own_hook("tuned/transformer.h.2:out")
    'transformer.h.2:out'
    """
    name = side_of(hook)
    return hook.removeprefix(f"{name}/") if name else hook


def hooks_of(hooks: Sequence[str], name: str) -> tuple[str, ...]:
    """Return the hooks of one model of a pair, as this model names them."""
    return tuple(own_hook(hook) for hook in hooks if side_of(hook) == name)


def hook_path(module: nn.Module, name: str) -> str:
    """Return the path that hooks use for a submodule: in a pair, a slash follows the name of the model."""
    return name.replace(".", "/", 1) if isinstance(module, ModelPair) else name


def require_equal_tokenizers(names: Sequence[str], digests: Sequence[str]) -> None:
    """Raise ``ValueError`` unless the tokenizers of a pair give equal ids.

    Args:
        names: Ids of the two models.
        digests: ``tokenizer_digest`` of their tokenizers.
    """
    if digests[0] != digests[1]:
        found = " and ".join(f"{name} (sha256 {digest[:12]})" for name, digest in zip(names, digests, strict=True))
        raise ValueError(
            f"models: expected models of one tokenizer, which run on the same token ids, got two that differ: {found}. Choose "
            "a model and its fine-tuned copy, each saved with the same tokenizer files."
        )
