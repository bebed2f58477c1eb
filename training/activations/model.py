"""Load a language model; read or replace the tensor at a hook point. The only file that imports transformers.

A hook point is a module path and a side: ``transformer.h.2.mlp:in`` is what the module reads, ``transformer.h.2.mlp:out``
what it returns (the first element where it returns several).
"""

import difflib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..embedded import MODEL_DIR
from ..recipe import ModelSection


class _EnoughSeen(Exception):  # noqa: N818 - not an error: ends a forward pass once the last hook was read
    pass


class LanguageModel:
    """A causal model with its tokenizer, frozen and in eval mode."""

    def __init__(self, module: nn.Module, tokenizer: Any, model_id: str, revision: str | None):
        self.module = module.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.id = model_id
        self.revision = revision
        # Hooks are seen by every thread that runs the module: one at a time.
        self._lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def widths(self, hooks: tuple[str, ...]) -> dict[str, int]:
        """The width of the tensor at each hook.

        Raises:
            ValueError: If a hook does not exist or never sees a tensor of shape (contexts, positions, width).
        """
        # Any token will do: only the shape counts. Several contexts, so that tensors without them are told apart; a mask,
        # because some models would look into the input for padding, which has no values on the meta device.
        token_ids = torch.zeros((2, 3), dtype=torch.long, device=self.device)
        seen = self.activations(token_ids, hooks, attention_mask=torch.ones_like(token_ids))
        return {hook: x.shape[-1] for hook, x in seen.items()}

    @torch.no_grad()
    def activations(
        self, token_ids: Int[Tensor, "contexts positions"], hooks: tuple[str, ...], attention_mask: Tensor | None = None
    ) -> dict[str, Float[Tensor, "contexts positions width"]]:
        """What every hook sees in one forward pass, which stops at the last of them."""
        seen: dict[str, Tensor] = {}

        def keep(hook: str) -> Callable[[Tensor], None]:
            def reader(x: Tensor) -> None:
                seen[hook] = x.detach()
                if len(seen) == len(hooks):
                    raise _EnoughSeen
                # Modules above may write into this tensor; the copy is ours.
                seen[hook] = x.detach().clone()

            return reader

        with self.hooked({hook: keep(hook) for hook in hooks}), suppress(_EnoughSeen):
            self.module(input_ids=token_ids, attention_mask=attention_mask, use_cache=False)
        return self._in_order(seen, hooks, token_ids)

    def activations_and_gradients(
        self, token_ids: Int[Tensor, "contexts positions"], hooks: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What every hook sees, and the gradient there of the next-token loss.

        The loss is the sum over the positions of a context, so a token's gradient does not depend on its batch-mates.
        """
        seen: dict[str, Tensor] = {}

        def leaf(hook: str) -> Callable[[Tensor], Tensor]:
            def reader(x: Tensor) -> Tensor:
                # The first hook starts the graph; later ones are part of it and keep their gradient.
                x = x if x.requires_grad else x.detach().requires_grad_(True)
                x.retain_grad()
                seen[hook] = x
                # Modules above may write into what they get.
                return x.clone()

            return reader

        with torch.enable_grad(), self.hooked({hook: leaf(hook) for hook in hooks}):
            logits = self.module(input_ids=token_ids, use_cache=False).logits
            next_token_loss(logits, token_ids).sum().backward()
        values = {hook: x.detach() for hook, x in self._in_order(seen, hooks, token_ids).items()}
        # The first hook in execution order may not lie on the path to the loss of every position; zeros then.
        gradients = {hook: torch.zeros_like(x) if x.grad is None else x.grad for hook, x in seen.items()}
        return values, self._in_order(gradients, hooks, token_ids)

    def run(self, token_ids: Int[Tensor, "contexts positions"]) -> Float[Tensor, "contexts positions vocabulary"]:
        """Logits; gradients flow to whatever a hook put in."""
        # Under the lock: another thread's hooks would see this pass too.
        with self._lock:
            return self.module(input_ids=token_ids, use_cache=False).logits

    @torch.no_grad()
    def logits(self, token_ids: Int[Tensor, "contexts positions"]) -> Float[Tensor, "contexts positions vocabulary"]:
        """Logits, nothing kept for gradients."""
        return self.run(token_ids)

    @contextmanager
    def replacing(self, hook: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the context is open, everything after ``hook`` reads ``change(x)`` instead of ``x``."""
        with self.hooked({hook: change}):
            yield

    def _in_order(self, seen: dict[str, Tensor], hooks: tuple[str, ...], token_ids: Tensor) -> dict[str, Tensor]:
        for hook in hooks:
            if hook not in seen:
                raise ValueError(f"hook {hook}: the model never ran this module. Choose one that is part of its forward pass.")
            if seen[hook].ndim == 2 and seen[hook].shape[0] == token_ids.numel():
                # Some blocks (OPT's) lay all tokens of the batch in one row before their MLP.
                seen[hook] = seen[hook].view(*token_ids.shape, -1)
            if seen[hook].ndim != 3:
                raise ValueError(f"hook {hook}: expected a tensor (contexts, positions, width), got {tuple(seen[hook].shape)}.")
        return {hook: seen[hook] for hook in hooks}

    @contextmanager
    def hooked(self, readers: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """While the context is open, each reader sees the tensor at its hook; what it returns, if anything, replaces it."""
        with self._lock, ExitStack() as stack:
            for hook, reader in readers.items():
                module, side = self.find(hook)
                handle = _attach(module, side, reader)
                stack.callback(handle.remove)
            yield

    def find(self, hook: str) -> tuple[nn.Module, str]:
        """The module and side a hook names.

        Raises:
            ValueError: If there is no such module; the nearest hooks are listed.
        """
        path, _, side = hook.rpartition(":")
        modules = dict(self.module.named_modules())
        if path not in modules or not path or side not in ("in", "out"):
            near = difflib.get_close_matches(path or hook, list(modules), n=4, cutoff=0.0)
            choices = ", ".join(f"{name}:{side if side in ('in', 'out') else 'out'}" for name in near if name)
            raise ValueError(f"hook {hook!r} does not exist in {self.id}. Nearest: {choices}.")
        return modules[path], side


def _attach(module: nn.Module, side: str, reader: Callable[[Tensor], Tensor | None]) -> Any:
    """Show ``reader`` the tensor on that side; what it returns, if anything, takes the tensor's place."""
    if side == "in":

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            # Some models pass the hidden states by name.
            if args:
                changed = reader(args[0])
                return None if changed is None else ((changed, *args[1:]), kwargs)
            name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
            changed = reader(kwargs[name])
            return None if changed is None else (args, kwargs | {name: changed})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        changed = reader(first)
        if changed is None:
            return None
        return (changed, *rest) if isinstance(output, tuple) else changed

    return module.register_forward_hook(after)


def next_token_loss(
    logits: Float[Tensor, "contexts positions vocabulary"], token_ids: Int[Tensor, "contexts positions"]
) -> Float[Tensor, "contexts positions-1"]:
    """Cross-entropy in nats of predicting each token but the first; entry ``i`` is read off at position ``i``."""
    # In float32 whatever the model's dtype: half precision has too few digits for differences of losses.
    flat = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), token_ids[:, 1:].flatten().long(), reduction="none"
    )
    return flat.view(token_ids.shape[0], -1)


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model.device: {name!r} is not available here ({str(error).splitlines()[0]}). Use auto or cpu."
        ) from None
    return device


def load_model(section: ModelSection) -> LanguageModel:
    """The model and tokenizer of a recipe: embedded, from a local directory, or from the hub.

    Raises:
        ValueError: If it cannot be had; the message names the offline alternative.
    """
    transformers = _transformers()
    device = resolve_device(section.device)
    with _explained(section):
        # No trust_remote_code: a model id must not run its repository's code here.
        tokenizer = transformers.AutoTokenizer.from_pretrained(_source(section), revision=section.revision)
        module = transformers.AutoModelForCausalLM.from_pretrained(
            _source(section), revision=section.revision, dtype=getattr(torch, section.dtype), use_safetensors=True
        )
    revision = getattr(module.config, "_commit_hash", None) or section.revision
    return LanguageModel(module.to(device), tokenizer, section.id, revision)


def load_tokenizer(section: ModelSection) -> Any:
    """The tokenizer of a recipe's model alone.

    Raises:
        ValueError: If it cannot be had.
    """
    with _explained(section):
        # As for the model: no code of a repository.
        return _transformers().AutoTokenizer.from_pretrained(_source(section), revision=section.revision)


def skeleton(section: ModelSection) -> LanguageModel:
    """The model on the meta device, from its configuration alone: no weights are read, and there is no tokenizer.

    Raises:
        ValueError: If the configuration cannot be had.
    """
    transformers = _transformers()
    with _explained(section):
        config = transformers.AutoConfig.from_pretrained(_source(section), revision=section.revision)
        with torch.device("meta"):
            # Other implementations of attention look whether the mask hides anything.
            module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return LanguageModel(module, None, section.id, section.revision)


def _transformers() -> Any:
    # Imported on first use: it takes seconds, which `sparsary --help` and a refused recipe need not spend.
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _source(section: ModelSection) -> str:
    return str(MODEL_DIR) if section.id == "embedded" else section.id


@contextmanager
def _explained(section: ModelSection) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.id: {section.id!r} could not be had ({reason}). Give a local directory with config.json, "
            "model.safetensors and tokenizer files, or use model.id: embedded, which needs no network."
        ) from None


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of the vocabulary and of how text is cut: equal for tokenizers that give equal ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
