"""Forward passes of a model with dictionaries spliced in, and steering by their latents.

A site of a dictionary reads the activation at ``hook_in``, and its reconstruction replaces the activation at ``hook_out``:
the same hook for an SAE, the two sides of the MLP for a transcoder, those of every MLP for a cross-layer transcoder. Later
layers and other dictionaries read the reconstruction, and gradients flow through it.

A crosscoder's code needs the activations at all its sites before the first is replaced. The unmodified model is therefore run
first, up to the last site, and the code is that of its activations, without dictionaries, and a constant for gradients of
inputs.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...sae import SparseCode
from .hooked_model import EnoughSeen, HookedModel
from .insertions import Insertion, Intervention, TokenPlace, grown_mask, latents_at


class Splice:
    """Dictionaries spliced into a model, with the codes and errors of the last forward pass.

    ``codes`` and ``errors`` are keyed by ``(insertion, site)``. Codes include the edits; rows of both are the replaced
    tokens, contexts concatenated. With gradients enabled, the values of codes and the errors retain their gradients.
    """

    def __init__(
        self,
        model: HookedModel,
        insertions: Sequence[Insertion],
        add_error: bool,
        kept: Tensor | None,
        edits: Sequence[Intervention],
        codes: Mapping[TokenPlace, SparseCode],
        errors: Mapping[TokenPlace, Tensor],
        prompt: int | None = None,
    ):
        self.codes: dict[TokenPlace, SparseCode] = {}
        self.errors: dict[TokenPlace, Tensor] = {}
        self._model, self._insertions, self._kept, self._edits = model, tuple(insertions), kept, tuple(edits)
        self._add_error, self._given_codes, self._given_errors, self._prompt = add_error, codes, errors, prompt
        self._inputs: dict[TokenPlace, Tensor] = {}
        self._unedited: dict[TokenPlace, SparseCode] = {}
        self._written: set[TokenPlace] = set()
        # Of insertions whose sites share one code: the code, and the unmodified activations it needs while they are read.
        self._shared: dict[int, SparseCode] = {}
        self._unmodified: dict[str, Tensor] | None = None
        self._require_valid()

    def _require_valid(self) -> None:
        writers: dict[str, int] = {}
        for index, insertion in enumerate(self._insertions):
            for hook in (insertion.hooks_out[site] for site in insertion.sites):
                if hook in writers:
                    raise ValueError(
                        f"{hook}: insertions {writers[hook]} and {index} both replace it. Remove one of them; of a grid's "
                        "dictionaries for one hook, use one."
                    )
                writers[hook] = index
            there = {tensor.device for tensor in insertion.dictionary.state_dict().values()}
            if there != {self._model.device}:
                raise ValueError(f"insertion {index}: expected a dictionary on {self._model.device}, where the model is.")
        for edit in self._edits:
            if not 0 <= edit.insertion < len(self._insertions):
                raise ValueError(f"edit: insertion: expected 0 to {len(self._insertions) - 1}, got {edit.insertion}.")
            dictionary = self._insertions[edit.insertion].dictionary
            if not 0 <= edit.site < len(dictionary.sites):
                raise ValueError(f"edit: site: expected 0 to {len(dictionary.sites) - 1}, got {edit.site}.")
            count = latents_at(dictionary, edit.site)
            wrong = [latent for latent in edit.latents if not 0 <= latent < count]
            if wrong:
                raise ValueError(f"edit: latents: expected 0 to {count - 1}, got {wrong}.")

    @contextmanager
    def opened(self) -> Iterator["Splice"]:
        """Context manager that splices the dictionaries in, and restores the model on exit, even after an error."""
        readers = self._readers()
        with self._model.hooked(readers), ExitStack() as stack:
            for path in self._idle(readers):
                stack.enter_context(_shape_only(self._model.find(f"{path}:out")[0]))
            stack.callback(self._model.module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            stack.callback(self._model.module.register_forward_hook(self._end).remove)
            yield self

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._unmodified is not None:
            return
        for left in (self.codes, self.errors, self._inputs, self._unedited, self._written, self._shared):
            left.clear()
        hooks = self._read_ahead()
        seen = self._unmodified_at(lambda: module(*args, **kwargs)) if hooks else {}
        # None of them is seen in a pass that only finds out how modules lay out their tensors.
        if seen and (missing := [hook for hook in hooks if hook not in seen]):
            raise ValueError(f"{missing[0]}: the model never ran this module. Choose a hook that is part of its forward pass.")
        for index, insertion in enumerate(self._insertions if seen else ()):
            if insertion.dictionary.shares_code:
                rows = [self._rows(seen[hook]).to(insertion.dictionary.in_scale.dtype) for hook in insertion.hooks_in]
                self._shared[index] = insertion.dictionary.encode(rows)

    def _unmodified_at(self, run: Callable[[], Any]) -> dict[str, Tensor]:
        """Return the activations of the unmodified model at the hooks to be read ahead."""
        seen = self._unmodified = {}
        try:
            with torch.no_grad(), suppress(EnoughSeen):
                run()
        finally:
            self._unmodified = None
        return seen

    def _read_ahead(self) -> list[str]:
        """Return the hooks of dictionaries whose code needs the activations at all their sites."""
        shared = (insertion for insertion in self._insertions if insertion.dictionary.shares_code)
        return list(dict.fromkeys(hook for insertion in shared for hook in insertion.hooks_in))

    def _end(self, *_: Any) -> None:
        if self._unmodified is not None:
            return
        for index, insertion in enumerate(self._insertions):
            for site in insertion.sites:
                if (index, site) not in self._written:
                    raise ValueError(
                        f"{insertion.hooks_out[site]}: insertion {index} was not spliced in: the model never ran this "
                        "module. Choose a hook that is part of its forward pass."
                    )

    def _readers(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """Return the reader for each hook: a dictionary that replaces the tensor runs first, others read its reconstruction."""
        reads: dict[str, list[TokenPlace]] = {}
        writes: dict[str, TokenPlace] = {}
        ahead = self._read_ahead()
        for index, insertion in enumerate(self._insertions):
            for site in insertion.sites:
                writes[insertion.hooks_out[site]] = index, site
            # Sites after the last written one need not be read. With one code for all, it is known before any is.
            before = range(max(insertion.sites, default=-1) + 1)
            for site in insertion.sites if insertion.dictionary.shares_code else before:
                reads.setdefault(insertion.hooks_in[site], []).append((index, site))

        def reader(hook: str) -> Callable[[Tensor], Tensor | None]:
            place, readers = writes.get(hook), reads.get(hook, [])

            def act(x: Tensor) -> Tensor | None:
                _require_contexts(hook, x)
                if self._unmodified is not None:
                    return self._keep(hook, x, ahead)
                changed = None
                if place is not None:
                    if place in readers:
                        self._read(place, x)
                    changed = self._replaced(place, x)
                for other in readers:
                    if other != place:
                        self._read(other, x if changed is None else changed)
                return changed

            return act

        return {hook: reader(hook) for hook in (*reads, *writes, *ahead)}

    def _keep(self, hook: str, x: Tensor, wanted: Sequence[str]) -> None:
        """Keep an activation of the unmodified model, which is run no further than the last that is wanted."""
        seen = self._unmodified
        assert seen is not None
        if hook in wanted and hook not in seen:
            # Cloned, because later modules may modify it in place.
            seen[hook] = x.clone()
            if len(seen) == len(wanted):
                raise EnoughSeen

    def _idle(self, readers: Mapping[str, Any]) -> list[str]:
        """Return modules whose own output is not used."""
        if self._add_error or self._kept is not None or self._read_ahead():
            return []
        found = []
        for insertion in self._insertions:
            for site in insertion.sites:
                path, _, side = insertion.hooks_out[site].rpartition(":")
                within = any(hook.startswith(f"{path}.") for hook in readers)
                if side == "out" and insertion.hooks_in[site] != insertion.hooks_out[site] and not within:
                    found.append(path)
        return found

    def _read(self, place: TokenPlace, x: Float[Tensor, "contexts positions width"]) -> None:
        index, site = place
        insertion = self._insertions[index]
        # Cloned, because later modules may modify their input in place, and a skip path reads it when decoding.
        rows = self._rows(x if insertion.hooks_in[site] == insertion.hooks_out[site] else x.clone())
        code = self._given_codes.get(place)
        if code is None:
            code = self._shared[index] if index in self._shared else insertion.dictionary.encode_at(site, rows)
        elif code.n_tokens != rows.shape[0]:
            raise ValueError(
                f"codes: {place}: expected {rows.shape[0]} tokens, the number that is replaced, got {code.n_tokens}."
            )
        code = _keeping_gradient(code)
        self._inputs[place], self._unedited[place] = rows, code
        self.codes[place] = self._edited(place, code, x.shape[0], x.shape[1])

    def _edited(self, place: TokenPlace, code: SparseCode, contexts: int, positions: int) -> SparseCode:
        for edit in self._edits:
            at_all_sites = place[0] in self._shared
            if edit.insertion != place[0] or not (at_all_sites or edit.site == place[1]):
                continue
            where = edit.where(contexts, positions, self._prompt)
            kept = self._mask(contexts, positions)
            if kept is not None and not isinstance(edit.positions, str) and bool((where & ~kept.cpu()).any()):
                missed = (where & ~kept.cpu()).any(0).nonzero().flatten().tolist()
                raise ValueError(f"positions: expected positions that are replaced (kept), got {missed}.")
            chosen = self._rows(where.to(code.values.device).unsqueeze(-1))
            latents = torch.tensor(list(edit.latents), device=code.latents.device)
            before = code.columns(latents)
            code = _keeping_gradient(code.with_columns(latents, torch.where(chosen, edit.apply(before), before)))
        return code

    def _replaced(self, place: TokenPlace, y: Float[Tensor, "contexts positions width"]) -> Tensor:
        y_hat = self._decoded(place, self.codes)
        rows = self._rows(y)
        if y_hat.shape[-1] != rows.shape[-1]:
            hook = self._insertions[place[0]].hooks_out[place[1]]
            raise ValueError(f"{hook}: expected width {y_hat.shape[-1]}, which the dictionary writes, got {rows.shape[-1]}.")
        if place in self._given_errors:
            y_hat = y_hat + self._given_errors[place]
        elif self._add_error:
            plain = self._decoded(place, self._unedited) if self._edits else y_hat
            error = (rows - plain).detach()
            error = self.errors[place] = error.requires_grad_(torch.is_grad_enabled())
            # Equals y_hat + error without its rounding: without edits, the model's own tensor is restored bit-exactly.
            y_hat = rows.detach() + (y_hat - plain.detach()) + (error - error.detach())
        self._written.add(place)
        y_hat = y_hat.to(y.dtype)
        mask = self._mask(y.shape[0], y.shape[1])
        return y_hat.unflatten(0, y.shape[:2]) if mask is None else y.masked_scatter(mask.unsqueeze(-1), y_hat)

    def _decoded(self, place: TokenPlace, codes: Mapping[TokenPlace, SparseCode]) -> Tensor:
        index, site = place
        insertion = self._insertions[index]
        if insertion.dictionary.shares_code:
            return insertion.dictionary.decode_at(site, [codes[place]], self._inputs[place])
        for earlier in range(site + 1):
            if (index, earlier) not in codes:
                raise ValueError(
                    f"{insertion.hooks_out[site]}: insertion {index} would write here before the model reaches the hook "
                    "that it reads, "
                    f"{insertion.hooks_in[earlier]}. Choose hooks in the model's order."
                )
        read = [codes[index, earlier] for earlier in range(site + 1)]
        return insertion.dictionary.decode_at(site, read, self._inputs[place])

    def _rows(self, x: Tensor) -> Tensor:
        """Return the replaced tokens, contexts concatenated."""
        mask = self._mask(x.shape[0], x.shape[1])
        return x.flatten(0, 1) if mask is None else x[mask]

    def _mask(self, contexts: int, positions: int) -> Tensor | None:
        if self._kept is None:
            return None
        kept = grown_mask(self._kept, "kept", (contexts, positions), self._prompt, beyond=True)
        return kept.to(self._model.device)


@contextmanager
def model_spliced(
    model: HookedModel,
    insertions: Sequence[Insertion],
    add_error: bool = False,
    kept: Tensor | None = None,
    edits: Sequence[Intervention] = (),
    codes: Mapping[TokenPlace, SparseCode] | None = None,
    errors: Mapping[TokenPlace, Tensor] | None = None,
) -> Iterator[Splice]:
    """Context manager that runs ``model`` with dictionaries spliced in; its value holds codes and errors of the last pass.

    Positions outside ``kept`` keep the model's own tensor. With ``add_error`` the reconstruction error is added back as a
    constant that passes no gradient: without edits, the logits are the model's own; with edits, they are those of the model
    plus the edited latents' change in decoder output. ``codes`` and ``errors``, keyed by ``(insertion, site)``, replace the
    computed ones. A module's own output is not computed if it is not needed (a transcoder replaces all of it).

    Dictionaries stay in their mode; loaded ones are in ``eval()``. Gradients also reach their parameters, unless these do
    not require any.

    Raises:
        ValueError: On entering, if two dictionaries replace one hook, a hook does not exist, or an edit names a latent that
            does not. In the pass, if a hook is never reached or reached too early, or widths, positions or numbers of tokens
            do not match.
    """
    with Splice(model, insertions, add_error, kept, edits, codes or {}, errors or {}).opened() as splice:
        yield splice


@torch.no_grad()
def generate(
    model: HookedModel,
    token_ids: Int[Tensor, "contexts positions"],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    insertions: Sequence[Insertion] = (),
    edits: Sequence[Intervention] = (),
    add_error: bool = False,
    kept: Tensor | None = None,
) -> Int[Tensor, "contexts longer"]:
    """Generate from prompts of equal length with dictionaries spliced in; return the prompts and the new tokens.

    Temperature 0 is greedy decoding; above 0, equal seeds give equal text, and the global random state is left unchanged.
    Every token is computed from the whole text before it (no KV cache), so codes are those of a plain forward pass. ``kept``
    applies to the prompt: new tokens are always replaced. Edits at ``"new"`` positions take effect after the first new
    token. A context that ends early is padded.

    Raises:
        ValueError: If a number is out of range; also see ``model_spliced``.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(f"temperature: expected 0, for the likeliest token, or above, got {temperature}.")
    config: Any = model.module.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    padding = next((token for token in (config.pad_token_id, *ends) if token is not None), 0)
    # Overrides the model's own sampling defaults, such as top-k 50.
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    )
    splice = Splice(model, insertions, add_error, kept, edits, {}, {}, prompt=token_ids.shape[1])
    run: Any = model.module.generate
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), splice.opened():
        torch.manual_seed(seed)
        return run(
            input_ids=token_ids.to(model.device),
            attention_mask=torch.ones_like(token_ids, device=model.device),
            max_new_tokens=max_new_tokens,
            use_cache=False,
            pad_token_id=padding,
            **sampling,
        )


def _require_contexts(hook: str, x: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"{hook}: expected a tensor (contexts, positions, width), got {tuple(x.shape)}. Choose another hook.")


def _keeping_gradient(code: SparseCode) -> SparseCode:
    if not torch.is_grad_enabled():
        return code
    if not code.values.requires_grad:
        return dataclasses.replace(code, values=code.values.detach().requires_grad_(True))
    code.values.retain_grad()
    return code


@contextmanager
def _shape_only(module: nn.Module) -> Iterator[None]:
    """Context manager in which the module computes a single token only, expanded to the right shape."""
    own, before = module.forward, vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 3:
            one = own(args[0][:1, :1])
            # A module that returns several values runs in full.
            if isinstance(one, Tensor):
                return one.expand(*args[0].shape[:2], -1)
        return own(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
