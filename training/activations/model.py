"""Loading of language models, and hooks that read or replace their tensors. The only file that imports transformers.

A hook is a module path and a side: ``transformer.h.2.mlp:in`` is the input of the module, ``transformer.h.2.mlp:out`` its
output (the first element if it returns several).
"""

import difflib
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...sae.errors import doing
from ..content import Content, folder_content, model_folder
from ..embedded import MODEL_DIR
from ..recipe import ModelSection
from .hidden_states import HookError, PassLayout, path_in, path_in_arguments, tensor_at, with_tensor
from .weightless import weightless

log = logging.getLogger(__name__)


class RemoteCodeRefused(ValueError):  # noqa: N818 - says what happened
    """Error for a model repository that contains Python code which the user has not allowed to run."""


class EnoughSeen(Exception):  # noqa: N818 - not an error
    """Control flow that ends a forward pass once the last hook has been read."""


class LanguageModel:
    """Causal language model with its tokenizer, frozen and in eval mode; ``section`` is the recipe section it was loaded by."""

    def __init__(
        self, module: nn.Module, tokenizer: Any, model_id: str, revision: str | None, section: ModelSection | None = None
    ):
        self.module = module.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.id = model_id
        self.revision = revision
        self.section = section
        # Hooks affect every thread that runs the module, so only one may at a time.
        self._lock = threading.RLock()
        self._layout = PassLayout()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def content(self) -> Content:
        """Return identifiers of model and tokenizer: file digests or commit, or a digest of the parameters if not loaded."""
        if self.section is None:
            model = {"parameters": _parameters_digest(self.module)}
        else:
            model = _source_content(self.section, self.revision)
        return {"model": model, "tokenizer": None if self.tokenizer is None else tokenizer_content(self.tokenizer)}

    def widths(self, hooks: tuple[str, ...]) -> dict[str, int]:
        """Return the width of the tensor at each hook.

        Raises:
            HookError: If a hook does not exist or never sees a tensor of shape (contexts, positions, width).
        """
        # Only shapes matter, so any token works. Several contexts, so that tensors without this axis are noticed.
        token_ids = torch.zeros((2, 3), dtype=torch.long, device=self.device)
        return {hook: x.shape[-1] for hook, x in self.activations(token_ids, hooks).items()}

    @torch.no_grad()
    def activations(
        self, token_ids: Int[Tensor, "contexts positions"], hooks: tuple[str, ...]
    ) -> dict[str, Float[Tensor, "contexts positions width"]]:
        """Return the tensor at every hook in one forward pass, which stops at the last hook.

        For a module that runs several times in a pass (shared by layers) it is the tensor of the first run.
        """
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

            return reader

        with self.hooked({hook: keep(hook) for hook in hooks}), suppress(EnoughSeen):
            # On the meta device there are no values in which a model could look for padding.
            mask = {"attention_mask": torch.ones_like(token_ids)} if token_ids.is_meta else {}
            self.module(input_ids=token_ids, use_cache=False, **mask)
        return self._in_order(seen, hooks)

    def activations_and_gradients(
        self,
        token_ids: Int[Tensor, "contexts positions"],
        hooks: tuple[str, ...],
        document_ids: Int[Tensor, "contexts positions"] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensor at every hook and the gradient of the next-token loss with respect to it.

        The loss is summed over the predictions within a token's own document, so its gradient depends neither on other
        contexts of the batch nor on documents packed after it. Attention reaches across documents, so each document of a
        context takes a backward pass. Without ``document_ids`` every context is one document.
        """
        if document_ids is None:
            document_ids = torch.zeros_like(token_ids)
        seen: dict[str, Tensor] = {}

        def leaf(hook: str) -> Callable[[Tensor], Tensor]:
            def reader(x: Tensor) -> Tensor:
                # The first hook starts the graph; later ones are part of it.
                x = x if x.requires_grad else x.detach().requires_grad_(True)
                seen.setdefault(hook, x)
                # Later modules may modify their input in place.
                return x.clone()

            return reader

        with torch.enable_grad(), self.hooked({hook: leaf(hook) for hook in hooks}):
            logits = self.module(input_ids=token_ids, use_cache=False).logits
            losses = next_token_loss(logits, token_ids)
            starts = document_ids[:, 1:] != document_ids[:, :-1]
            # Padding belongs to no document.
            within = ~starts & (document_ids[:, :-1] >= 0)
            # Index, within its context, of the document of every position.
            place = nn.functional.pad(starts.long().cumsum(1), (1, 0))
            gradients = {hook: torch.zeros_like(x) for hook, x in seen.items()}
            last = int(place.max())
            for number in range(last + 1):
                own = (losses * (within & (place[:, :-1] == number))).sum()
                # A hook that is not on the path to the loss has gradient zero.
                found = torch.autograd.grad(own, list(seen.values()), retain_graph=number < last, allow_unused=True)
                for hook, gradient in zip(seen, found, strict=True):
                    if gradient is not None:
                        here = (place == number).unsqueeze(-1)
                        gradients[hook] = torch.where(here, gradient, gradients[hook])
        values = {hook: x.detach() for hook, x in self._in_order(seen, hooks).items()}
        return values, self._in_order(gradients, hooks)

    def run(self, token_ids: Int[Tensor, "contexts positions"]) -> Float[Tensor, "contexts positions vocabulary"]:
        """Return the logits; gradients flow to tensors that hooks put in."""
        # Under the lock, because another thread's hooks would see this pass too.
        with self._lock:
            return self.module(input_ids=token_ids, use_cache=False).logits

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

        Readers see a single tensor ``(contexts, positions, width)``, even if the module flattens tokens, puts positions
        first, or nests the tensor in a tuple, list, mapping or dataclass.

        Raises:
            HookError: If a hook does not exist; while the model runs, if a module holds nothing of that shape.
        """
        with self._lock, ExitStack() as stack:
            stack.callback(self.module.register_forward_pre_hook(self._layout.begin, with_kwargs=True).remove)
            for hook, reader in readers.items():
                module, side = self.find(hook)
                handle = attach(module, side, hook, self._layout.reading(hook, reader))
                stack.callback(handle.remove)
            yield

    def find(self, hook: str) -> tuple[nn.Module, str]:
        """Return the module and the side that a hook names.

        Raises:
            HookError: If there is no such module; the message lists the nearest hooks.
        """
        path, _, side = hook.rpartition(":")
        modules = dict(self.module.named_modules())
        if path not in modules or not path or side not in ("in", "out"):
            near = difflib.get_close_matches(path or hook, list(modules), n=4, cutoff=0.0)
            choices = ", ".join(f"{name}:{side if side in ('in', 'out') else 'out'}" for name in near if name)
            raise HookError(f"hook {hook!r} does not exist in {self.id}. Nearest: {choices}.")
        return modules[path], side


def attach(module: nn.Module, side: str, hook: str, reader: Callable[[Tensor], Tensor | None]) -> Any:
    """Register ``reader`` on the hidden states on that side of a module; a tensor it returns replaces them."""

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
    return module.register_forward_hook(lambda _, _args, output: shown(output, lambda: path_in(output)))


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


def resolve_device(name: str) -> torch.device:
    """Return a device by name; ``auto`` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"model.device: {name!r} is not available ({str(error).splitlines()[0]}). Use auto or cpu.") from None
    return device


def load_model(section: ModelSection) -> LanguageModel:
    """Load the model and tokenizer of a recipe: embedded, from a local directory, or from the Hugging Face Hub.

    Raises:
        RemoteCodeRefused: If it needs code from its repository, and ``trust_remote_code`` is not set.
        ValueError: If it cannot be loaded; the message names the offline alternative.
    """
    device = resolve_device(section.device)
    log.info("loading model %s", section.id)
    _, model_class = _causal_config(section)
    tokenizer = load_tokenizer(section)
    with _explained(section):
        module = model_class.from_pretrained(
            _source(section),
            revision=section.revision,
            dtype=getattr(torch, section.dtype),
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
        )
    revision = _commit(section) or section.revision
    return LanguageModel(module.to(device), tokenizer, section.id, revision, section)


def load_tokenizer(section: ModelSection) -> Any:
    """Load the tokenizer of a recipe's model.

    Raises:
        ValueError: If it cannot be loaded.
    """
    with _explained(section):
        return _transformers().AutoTokenizer.from_pretrained(
            _source(section), revision=section.revision, trust_remote_code=section.trust_remote_code
        )


def skeleton(section: ModelSection) -> LanguageModel:
    """Build the model from its configuration alone, ``weightless``: it has all modules and computes shapes, but no tokenizer.

    Raises:
        RemoteCodeRefused: If it needs code from its repository, and ``trust_remote_code`` is not set.
        ValueError: If the configuration cannot be loaded.
    """
    config, model_class = _causal_config(section)
    dtype = getattr(torch, section.dtype)

    def build() -> nn.Module:
        # Experts run one by one, because fused expert kernels need weights that are really in memory.
        options = {"dtype": dtype, "experts_implementation": "eager"}
        if model_class is not _transformers().AutoModelForCausalLM:
            return model_class._from_config(config, **options)
        return model_class.from_config(config, trust_remote_code=section.trust_remote_code, **options)

    with _asked(section):
        module = weightless(build)
    return LanguageModel(module, None, section.id, section.revision)


def _causal_config(section: ModelSection) -> tuple[Any, Any]:
    """Return the configuration of a causal language model and the class that loads it.

    Raises:
        ValueError: If it cannot be loaded, or is of another kind of model; the message explains how to train on those.
    """
    transformers = _transformers()
    with _explained(section):
        # If unset, transformers would prompt on the terminal, and run a repository's code if a "y" is piped in.
        config = transformers.AutoConfig.from_pretrained(
            _source(section), revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    names = transformers.models.auto.modeling_auto
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    saved = (getattr(config, "architectures", None) or [""])[0]
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or own_code:
        found = transformers.AutoModelForCausalLM
    else:
        # Parts of larger models are not in the mapping (Emu3's language model): take the class they name.
        found = getattr(transformers, saved, None)
    if saved not in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and saved and not own_code:
        # Masked and encoder-decoder models would load as the causal model that shares their configuration.
        masked = config.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if masked or getattr(config, "is_encoder_decoder", False) or found is not transformers.AutoModelForCausalLM:
            found = None
    if found is not None:
        return config, found
    raise ValueError(
        f"model.id: expected a causal language model, which is what recipes run, got {saved or config.model_type} "
        f"({section.id}). Its activations are read in Python, and trained on with the same recipe:\n"
        f"  model = transformers.AutoModel.from_pretrained({section.id!r})\n"
        '  rows = sparsary.read_activations(model, "encoder.layer.1:out", inputs)\n'
        "  sparsary.train(RECIPE, rows)\n"
        "where the hook is a module path of the model and a side, and inputs is a list or data loader of what the model takes "
        '(mappings such as {"pixel_values": ...} or {"input_ids": ..., "attention_mask": ...}).'
    )


def section_content(section: ModelSection) -> Content:
    """Return the ``content()`` of the model that a recipe names, without loading its weights.

    Raises:
        ValueError: If its tokenizer or configuration cannot be loaded.
    """
    with _explained(section):
        # Digest of the tokenizer itself, because its files contain much that does not affect text.
        tokenizer = load_tokenizer(section)
        if model_folder(section) is None:
            # Resolves the revision to a commit of the Hub.
            _transformers().AutoConfig.from_pretrained(
                _source(section), revision=section.revision, trust_remote_code=section.trust_remote_code
            )
    return {"model": _source_content(section, _commit(section)), "tokenizer": tokenizer_content(tokenizer)}


def _source_content(section: ModelSection, commit: str | None) -> Content:
    folder = model_folder(section)
    if folder is None:
        return {"commit": commit} if commit else {}
    return folder_content(folder, section.trust_remote_code)


def _commit(section: ModelSection) -> str | None:
    """Return the commit of the Hub model loaded last, from the Hub client's cache; ``None`` for a local model."""
    if model_folder(section) is not None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(section.id, "config.json", revision=section.revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _transformers() -> Any:
    # Imported lazily: it takes seconds, and `sparsary --help` and errors in a recipe must stay fast.
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _source(section: ModelSection) -> str:
    return str(MODEL_DIR) if section.id == "embedded" else section.id


@contextmanager
def _asked(section: ModelSection) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error) or section.trust_remote_code:
            raise
        raise RemoteCodeRefused(
            f"model.id: {section.id!r} needs Python code from its repository, which is not run by default: it could do "
            "anything that you can do on this machine. Read it; to allow it, set model.trust_remote_code: true (on the "
            "command line: "
            "--trust-remote-code)."
        ) from None


@contextmanager
def _explained(section: ModelSection) -> Iterator[None]:
    try:
        with doing(f"loading the model {section.id}"), _asked(section):
            yield
    except RemoteCodeRefused:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.id: {section.id!r} could not be loaded ({reason}). Give a local directory with config.json, "
            "model.safetensors and tokenizer files, or use model.id: embedded, which needs no network."
        ) from None


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of the vocabulary and the tokenization rules: equal for tokenizers that give equal ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()


def tokenizer_content(tokenizer: Any) -> str:
    """Return a hash of all that decides which tokens a harvest stores: the tokenization and the special tokens."""
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(f"{tokenizer_digest(tokenizer)} {json.dumps(marks)}".encode()).hexdigest()


def _parameters_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
