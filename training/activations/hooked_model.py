"""Hooks that read or replace the tensors of a model while it runs.

A hook is a module path and a side: ``transformer.h.2.mlp:in`` is the input of the module, ``transformer.h.2.mlp:out`` its
output (the first element if it returns several).
"""

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .document_gradients import UnembeddingInput, contexts_of_equal_passes, document_gradients, document_numbers
from .document_masks import DocumentMasks, Pass
from .hidden_states import HookError, PassLayout, path_in, path_in_arguments, tensor_at, with_tensor
from .model_pair import EnoughSeen, ModelPair, hook_path, side_of
from .placement import input_device, is_spread, on_device
from .routers import OTHERS, rerouted, routing


class HookedModel:
    """Model in eval mode, its parameters frozen, with hooks at its modules; ``model_id`` names it in messages."""

    def __init__(self, module: nn.Module, model_id: str):
        self.module = module.requires_grad_(False).eval()
        self.id = model_id
        # Hooks affect every thread that runs the module, so only one may at a time.
        self._lock = threading.RLock()
        self._layout = PassLayout()
        self._documents: DocumentMasks | None = None

    def mask_documents(self, bos_id: int | None) -> None:
        """Let no token attend to another document from here on; every ``bos_id`` begins one. None: all of a context is seen."""
        if bos_id is None:
            self._documents = None
        elif self._documents is None or self._documents.bos_id != bos_id:
            self._documents = DocumentMasks(self.module, self.id, bos_id, embedding_rows(self.module) or bos_id + 1)

    @property
    def device(self) -> torch.device:
        """Device of token ids, and of the tensors that hooks read and replace, wherever the module that they are of runs."""
        return input_device(self.module)

    def widths(self, hooks: tuple[str, ...]) -> dict[str, int]:
        """Return the width of the tensor at each hook.

        Raises:
            HookError: If a hook does not exist or never sees a tensor of shape (contexts, positions, width).
        """
        # Only shapes matter, so any token works. Several contexts, so that tensors without this axis are noticed.
        token_ids = torch.zeros((2, 3), dtype=torch.long, device=self.device)
        return {hook: x.shape[-1] for hook, x in self.activations(token_ids, hooks).items()}

    def activations(
        self, token_ids: Int[Tensor, "contexts positions"], hooks: tuple[str, ...], /
    ) -> dict[str, Float[Tensor, "contexts positions width"]]:
        """Return the tensor at every hook in one forward pass, which stops at the last hook.

        For a module that runs several times in a pass (shared by layers) it is the tensor of the first run.
        """

        def run(some: Tensor, more: Mapping[str, Any]) -> list[Tensor]:
            return list(self._activations(some, hooks, more).values())

        return self._activations(token_ids, hooks, self._apart(token_ids, hooks, run))

    def _apart(self, token_ids: Tensor, kind: Any, run: Pass) -> dict[str, Tensor]:
        """Return the arguments of a pass that keep documents apart, if they are to be."""
        return {} if self._documents is None else self._documents.arguments(token_ids, kind, run)

    @torch.no_grad()
    def _activations(
        self, token_ids: Int[Tensor, "contexts positions"], hooks: tuple[str, ...], more: Mapping[str, Any]
    ) -> dict[str, Float[Tensor, "contexts positions width"]]:
        seen: dict[str, Tensor] = {}

        def keep(hook: str) -> Callable[[Tensor], None]:
            def reader(x: Tensor) -> None:
                if hook in seen:
                    return
                seen[hook] = x.detach()
                if len(seen) == len(hooks):
                    raise EnoughSeen
                # Later modules may modify this tensor in place.
                seen[hook] = x.detach().clone()
                if all(other in seen for other in hooks if side_of(other) == side_of(hook)):
                    raise EnoughSeen(of_all=False)

            return reader

        with self.hooked({hook: keep(hook) for hook in hooks}), suppress(EnoughSeen):
            # On the meta device there are no values in which a model could look for padding.
            mask = {"attention_mask": torch.ones_like(token_ids)} if token_ids.is_meta else {}
            self.module(input_ids=token_ids, use_cache=False, **mask, **more)
        return self._in_order(seen, hooks)

    def activations_and_gradients(
        self,
        token_ids: Int[Tensor, "contexts positions"],
        hooks: tuple[str, ...],
        document_ids: Int[Tensor, "contexts positions"] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensor at every hook and the gradient of the next-token loss with respect to it.

        The loss is summed over the predictions within a token's own document, so its gradient depends neither on other
        contexts of the batch nor on documents packed after it. Every context takes as many backward passes as it has
        documents. Without ``document_ids`` every context is one document.
        """
        numbers = document_numbers(torch.zeros_like(token_ids) if document_ids is None else document_ids)
        of_all: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for rows in contexts_of_equal_passes(numbers):
            whole = len(rows) == len(token_ids)
            some = self._with_gradients(token_ids if whole else token_ids[rows], hooks, numbers if whole else numbers[rows])
            if whole:
                return some
            for found, total in zip(some, of_all, strict=True):
                for hook, x in found.items():
                    total.setdefault(hook, x.new_zeros(len(token_ids), *x.shape[1:]))[rows] = x
        return of_all

    def _with_gradients(
        self,
        token_ids: Int[Tensor, "contexts positions"],
        hooks: tuple[str, ...],
        numbers: Int[Tensor, "contexts positions"],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def leaf(hook: str) -> Callable[[Tensor], Tensor]:
            def reader(x: Tensor) -> Tensor:
                # The first hook starts the graph; later ones are part of it.
                x = x if x.requires_grad else x.detach().requires_grad_(True)
                seen.setdefault(hook, x)
                # Later modules may modify their input in place.
                return x.clone()

            return reader

        more = self._apart(token_ids, "logits", self._logits_of)
        unembedding = UnembeddingInput(self.module)
        with torch.enable_grad(), self.hooked({hook: leaf(hook) for hook in hooks}), unembedding.watched():
            logits = self._logits_of(token_ids, more)[0]
            losses = next_token_loss(logits, token_ids)
            found = list(seen.values())
            gradients = document_gradients(losses, unembedding.local(logits, found), found, numbers)
        values = {hook: x.detach() for hook, x in self._in_order(seen, hooks).items()}
        return values, self._in_order(dict(zip(seen, gradients, strict=True)), hooks)

    def run(self, token_ids: Int[Tensor, "contexts positions"]) -> Float[Tensor, "contexts positions vocabulary"]:
        """Return the logits; gradients flow to tensors that hooks put in."""
        # Under the lock, because another thread's hooks would see this pass too.
        with self._lock:
            return self._logits_of(token_ids, self._apart(token_ids, "logits", self._logits_of))[0]

    def _logits_of(self, token_ids: Tensor, more: Mapping[str, Any]) -> list[Tensor]:
        return [self.module(input_ids=token_ids, use_cache=False, **more).logits.to(token_ids.device)]

    @torch.no_grad()
    def logits(self, token_ids: Int[Tensor, "contexts positions"]) -> Float[Tensor, "contexts positions vocabulary"]:
        """Return the logits, without gradients."""
        return self.run(token_ids)

    @contextmanager
    def replacing(self, hook: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Context manager that replaces the tensor ``x`` at ``hook`` by ``change(x)``."""
        with self.hooked({hook: change}):
            yield

    def _in_order(self, seen: dict[str, Tensor], hooks: tuple[str, ...]) -> dict[str, Tensor]:
        for hook in hooks:
            if hook not in seen:
                raise HookError(f"hook {hook}: the model never ran this module. Choose one that is part of its forward pass.")
        return {hook: seen[hook] for hook in hooks}

    @contextmanager
    def hooked(self, readers: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """Context manager that calls each reader with the tensor at its hook; a tensor it returns replaces the original.

        Readers see a single tensor ``(contexts, positions, width)`` on the model's ``device``, even if the module flattens
        tokens, puts positions first, runs on another device, or nests the tensor in a tuple, list, mapping or dataclass.

        Raises:
            HookError: If a hook does not exist; while the model runs, if a module holds nothing of that shape.
        """
        with self._lock, ExitStack() as stack:
            stack.callback(self.module.register_forward_pre_hook(self._layout.begin, with_kwargs=True).remove)
            spread, device = is_spread(self.module), self.device
            for hook, reader in readers.items():
                module, side = self.find(hook)
                reader = on_device(device, reader) if spread else reader
                handle = attach(module, side, hook, self._layout.reading(hook, reader))
                stack.callback(handle.remove)
            yield

    def find(self, hook: str) -> tuple[nn.Module, str]:
        """Return the module and the side that a hook names.

        Raises:
            HookError: If there is no such module; the message lists the nearest hooks.
        """
        path, _, side = hook.rpartition(":")
        modules = {hook_path(self.module, name): part for name, part in self.module.named_modules()}
        if path not in modules or not path or side not in ("in", "out"):
            # Of two models, the one that the hook names.
            own = side_of(hook) if isinstance(self.module, ModelPair) else ""
            names = [name for name in modules if not own or side_of(name) == own]
            near = difflib.get_close_matches(path or hook, names, n=4, cutoff=0.0)
            choices = ", ".join(f"{name}:{side if side in ('in', 'out') else 'out'}" for name in near if name)
            where = f"the {own} model" if own else self.id
            raise HookError(f"hook {hook!r} does not exist in {where}. Nearest: {choices}.")
        return modules[path], side


def attach(module: nn.Module, side: str, hook: str, reader: Callable[[Tensor], Tensor | None]) -> Any:
    """Register ``reader`` on the hidden states on that side of a module; a tensor it returns replaces them.

    Of a router, these are the logits of the experts; the router chooses again if they are replaced.
    """

    def shown(value: Any, find: Callable[[], tuple[Any, ...]]) -> Any:
        try:
            path = find()
        except LookupError as error:
            raise HookError(
                f"hook {hook}: expected a tensor (contexts, positions, width), {error}. Choose another module or side."
            ) from None
        changed = reader(tensor_at(value, path))
        return None if changed is None else with_tensor(value, path, changed)

    if side == "in":
        # Some models pass hidden states as keyword arguments.
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: shown((args, kwargs), lambda: path_in_arguments(module, args, kwargs)), with_kwargs=True
        )

    def written(part: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        other = OTHERS.get(type(part).__name__)
        changed = shown(output, lambda: path_in(output) if other is None else other.logits)
        router = routing(output, part)
        if changed is None or router is None:
            return changed
        logits = changed[0] if other is None else tensor_at(changed, other.logits)
        return rerouted(part, args, kwargs, router, logits, hook)

    return module.register_forward_hook(written, with_kwargs=True)


def embedding_rows(module: nn.Module) -> int | None:
    """Return the number of token embeddings of a model; None if it is unknown."""
    # Models without an embedding raise various errors.
    with suppress(Exception):
        return int(module.get_input_embeddings().weight.shape[0])  # pyright: ignore
    return None


def next_token_loss(
    logits: Float[Tensor, "contexts positions vocabulary"], token_ids: Int[Tensor, "contexts positions"]
) -> Float[Tensor, "contexts positions-1"]:
    """Return the cross-entropy, in nats, of each token but the first; entry ``i`` is of the prediction at position ``i``."""
    # Always in float32: half precision has too few digits for differences of losses.
    flat = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), token_ids[:, 1:].flatten().long(), reduction="none"
    )
    return flat.view(token_ids.shape[0], -1)
