"""Language models: loading, and what one asks them about a text."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..content import Content
from ..recipe import ModelSection, TunedSection
from ..tokens import tokenizer_contents, tokenizer_digest, with_one_bos
from .adapters import adapter_files, with_adapter
from .hooked_model import HookedModel, next_token_loss
from .memory_models import beneath, held, hold, parameters_digest
from .model_pair import NAMES, ModelPair, hooks_of, require_equal_tokenizers
from .model_source import (
    causal_config,
    explaining_load,
    hub_commit,
    load_tokenizer,
    naming_remote_code,
    quiet_transformers,
    require_quantization,
    source_content,
    source_of,
)
from .partial_model import class_without, unneeded_modules
from .placement import quantization_options
from .prompt import Ablated, HookInfo, Steered, TextActivations, latent_edits
from .sites import hooks_with_sites
from .splice import generate, model_spliced
from .weightless import weightless

log = logging.getLogger(__name__)


class LanguageModel(HookedModel):
    """Causal language model with its tokenizer, frozen and in eval mode; ``section`` is the recipe section it was loaded by."""

    def __init__(
        self, module: nn.Module, tokenizer: Any, model_id: str, revision: str | None, section: ModelSection | None = None
    ):
        super().__init__(module, model_id)
        self.tokenizer = tokenizer
        self.revision = revision
        self.section = section

    @property
    def precision(self) -> dict[str, Any]:
        """Weights as the recipe section has them: ``dtype``, and quantization and adapter if there are any."""
        if self.section is None:
            return {"dtype": str(next(self.module.parameters()).dtype).removeprefix("torch.")}
        return _precision(self.section) | ({} if self.section.tuned is None else {"tuned": self._tuned_identity()})

    def _tuned_identity(self) -> dict[str, Any]:
        """Return id, revision and number format of a pair's tuned model."""
        pair = None if self.section is None else self.section.pair
        assert pair is not None
        tuned = pair[1]
        return {"id": tuned.id, "revision": hub_commit(tuned) or tuned.revision, **_precision(tuned)}

    def content(self) -> Content:
        """Return identifiers of model and tokenizer: file digests or commit, or a digest of the parameters if not loaded."""
        if self.section is None:
            known = None if isinstance(self.module, ModelPair) else held(self.id)
            model = {"parameters": parameters_digest(self.module) if known is None else known.parameters}
        else:
            model = source_content(self.section, self.revision)
            if self.section.pair is not None:
                tuned = self.section.pair[1]
                model |= {"tuned": source_content(tuned, hub_commit(tuned))}
        return {"model": model} | tokenizer_contents(self.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | nn.Module | Any,
        tokenizer: Any = None,
        *,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "LanguageModel":
        """Return a causal language model by hub id or directory, or from an object in memory and its tokenizer.

        ``embedded`` is the small model that comes with the package.

        >>> m = LanguageModel.from_pretrained("embedded", device="cpu")
        >>> m.activations("the war lasted from the year", "transformer.h.2:out").shape
        (7, 128)

        Args:
            model: A Hugging Face id, a directory, a module of transformers, or a wrapper of one: PEFT's, nnsight's,
                TransformerLens's bridge, or torch.compile's.
            tokenizer: The tokenizer, with a model object only; a directory has its own, and so may a wrapper.
            trust_remote_code: Run Python code that the model's repository brings.

        Raises:
            ValueError: If it cannot be loaded, is no causal language model, or a module comes without its tokenizer.
        """
        if isinstance(model, str | Path):
            section = {"id": str(model), "device": device, "dtype": dtype, "revision": revision}
            return load_model(ModelSection.model_validate(section | {"trust_remote_code": trust_remote_code}))
        module, tokenizer = beneath(model, tokenizer)
        return cls(module, tokenizer, str(getattr(module, "name_or_path", "") or type(module).__name__), None)

    def named_by_weights(self) -> "LanguageModel":
        """Return the model under the name of its weights if it was given in memory; else the model itself."""
        if self.section is not None:
            return self
        return LanguageModel(self.module, self.tokenizer, hold(self.module, self.tokenizer), None)

    def as_section(self) -> dict[str, Any]:
        """Return the model as a recipe's section names it."""
        if self.section is not None:
            return self.section.model_dump(mode="json")
        known = self.precision["dtype"] in get_args(ModelSection.model_fields["dtype"].annotation)
        return {"id": self.id} | (self.precision if known else {})

    def hooks(self) -> list[HookInfo]:
        """Return the hooks at the sites of every block, in the order of the layers, with the width of each.

        Any other module has hooks too: its path in ``module.named_modules()`` with ``:in`` or ``:out``.

        Raises:
            ValueError: If the model's blocks are not found.
        """
        found = hooks_with_sites(self.module)
        widths = self.widths(tuple(found))
        return [HookInfo(hook, widths[hook], layer, sites) for hook, (layer, sites) in found.items()]

    def token_ids(self, text: str) -> Int[Tensor, "1 positions"]:
        """Return the tokens of a text behind the BOS token, if the tokenizer has one, as in training contexts.

        Raises:
            ValueError: If the text has no token.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise ValueError(f"text: expected at least one token, got {text!r}.")
        return torch.tensor([with_one_bos(ids, self.tokenizer.bos_token_id)], device=self.device)

    @overload
    def activations(self, inputs: str, hooks: str, /) -> TextActivations: ...
    @overload
    def activations(self, inputs: Tensor, hooks: tuple[str, ...], /) -> dict[str, Tensor]: ...
    def activations(self, inputs: str | Tensor, hooks: str | tuple[str, ...], /) -> TextActivations | dict[str, Tensor]:
        """Return the activations of a text at one hook, ``(tokens, width)``, with its tokens beside them.

        Given token ids ``(contexts, positions)`` and a tuple of hooks, return ``(contexts, positions, width)`` for each.

        Raises:
            HookError: If a hook does not exist, or its module holds no hidden states.
        """
        if isinstance(inputs, str):
            if not isinstance(hooks, str):
                raise ValueError(f"hooks: expected one hook with a text, got {hooks!r}. Ask for one after another.")
            ids = self.token_ids(inputs)
            values = super().activations(ids, (hooks,))[hooks][0]
            tokens = tuple(self.tokenizer.decode([token]) for token in ids[0].tolist())
            return TextActivations(values, ids[0], tokens, hooks)
        return super().activations(inputs, (hooks,) if isinstance(hooks, str) else hooks)

    def generate(
        self,
        prompt: str,
        steer: Iterable[Steered] = (),
        ablate: Iterable[Ablated] = (),
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Return the prompt and its continuation, with latents steered or ablated at every position.

        The dictionary's error is kept: steering adds ``amount * d.direction(latent)`` to the model's own activations, and
        ablation takes the latent's contribution away.

        Args:
            steer: ``(dictionary, latent, amount)``, the amount in the units of ``encode``.
            ablate: ``(dictionary, latent)``; several latents may be listed in one entry.
            temperature: 0 takes the likeliest token; above 0 equal seeds give equal text.

        Raises:
            ValueError: If a dictionary's hooks are unknown or not the model's, or a number is out of range.
        """
        insertions, edits = latent_edits(steer, ablate)
        found = generate(
            self, self.token_ids(prompt), max_new_tokens, temperature, seed, insertions, edits, add_error=bool(insertions)
        )
        return self.tokenizer.decode(found[0], skip_special_tokens=True)

    def loss(self, text: str, steer: Iterable[Steered] = (), ablate: Iterable[Ablated] = ()) -> float:
        """Return the mean next-token cross-entropy of a text in nats, with latents steered or ablated as in ``generate``.

        Raises:
            ValueError: If the text has fewer than two tokens, BOS included, or as ``generate``.
        """
        ids = self.token_ids(text)
        if ids.shape[1] < 2:
            raise ValueError(f"text: expected at least two tokens, got {ids.shape[1]}. There is nothing to predict.")
        insertions, edits = latent_edits(steer, ablate)
        with torch.no_grad(), model_spliced(self, insertions, add_error=True, edits=edits):
            return float(next_token_loss(self.run(ids), ids).mean())


def _precision(section: ModelSection) -> dict[str, Any]:
    adapter = {} if section.adapter is None else {"adapter": section.adapter, "adapter_mode": section.adapter_mode}
    quantization = {} if section.quantization is None else {"quantization": section.quantization}
    return {"dtype": section.dtype} | quantization | adapter


def paired(base: LanguageModel, tuned: LanguageModel) -> LanguageModel:
    """Return a model and its fine-tuned copy as one, whose hooks are ``base/HOOK`` and ``tuned/HOOK``.

    >>> base, tuned = (LanguageModel.from_pretrained("embedded", device="cpu") for _ in range(2))
    >>> list(paired(base, tuned).widths(("base/transformer.h.2:out", "tuned/transformer.h.0:out")).values())
    [128, 128]

    Raises:
        ValueError: If their tokenizers differ.
    """
    if base.tokenizer is not None and tuned.tokenizer is not None:
        digests = [tokenizer_digest(base.tokenizer), tokenizer_digest(tuned.tokenizer)]
        require_equal_tokenizers((base.id, tuned.id), digests)
    section = None
    if base.section is not None and tuned.section is not None:
        section = base.section.model_copy(update={"tuned": TunedSection(**tuned.section.model_dump(exclude={"tuned"}))})
    return LanguageModel(ModelPair(base.module, tuned.module), base.tokenizer, base.id, base.revision, section)


def each_model(model: LanguageModel) -> tuple[LanguageModel, ...]:
    """Return the two models of a pair, or the model itself."""
    if not isinstance(model.module, ModelPair):
        return (model,)
    sections = (None, None) if model.section is None else model.section.pair
    assert sections is not None
    modules = (model.module.base, model.module.tuned)
    return tuple(
        LanguageModel(module, model.tokenizer, name if section is None else section.id, None, section)
        for name, section, module in zip(NAMES, sections, modules, strict=True)
    )


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
    if section.pair is not None:
        return paired(*map(load_model, section.pair))
    if (known := held(section.id)) is not None:
        return LanguageModel(known.module, known.tokenizer, section.id, None)
    log.info("loading model %s", section.id)
    _, model_class = causal_config(section)
    return _loaded(section, model_class)


def load_model_for(section: ModelSection, hooks: tuple[str, ...], outline: LanguageModel) -> LanguageModel:
    """Load what reading activations at these hooks runs, without later blocks; the whole model where that cannot be done.

    Args:
        outline: The ``skeleton`` of the same model, which tells the modules that run.

    Raises:
        RemoteCodeRefused, ValueError: As ``load_model``.
    """
    if section.pair is not None and isinstance(outline.module, ModelPair):
        return _pair_for(section.pair, hooks, outline.module)
    whole = section.truncate == "never" or section.adapter is not None
    if whole or outline.section is not None or held(section.id) is not None:
        return load_model(section)
    try:
        left_out = unneeded_modules(outline, hooks)
        if not left_out:
            return load_model(section)
        config, _ = causal_config(section)
        found: Any = type(outline.module)
        if getattr(config, "sub_configs", {}).get("text_config") is found.config_class:
            # A text model saved as part of a larger one, as transformers' own auto class reads it.
            config = config.get_text_config()
        log.info("loading model %s without %s", section.id, _span(left_out))
        model = _loaded(section, class_without(found, left_out), config=config)
        # The first pass fails if the model's code needs what was left out.
        model.widths(hooks)
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises
        log.warning(
            "%s: the part that %s needs could not be loaded by itself (%s: %s): loading the whole model.",
            *(section.id, ", ".join(hooks), type(error).__name__, " ".join(str(error).split())[:200]),
        )
        return load_model(section)
    return model


def _pair_for(sections: tuple[ModelSection, ModelSection], hooks: tuple[str, ...], outline: ModelPair) -> LanguageModel:
    """Load what reading activations at these hooks runs of both models of a pair."""
    loaded = []
    for name, section, module in zip(NAMES, sections, (outline.base, outline.tuned), strict=True):
        own = hooks_of(hooks, name)
        # The pass of a model without hooks is not ended early.
        loaded.append(
            load_model_for(section, own, LanguageModel(module, None, section.id, None)) if own else load_model(section)
        )
    return paired(*loaded)


def _span(paths: tuple[str, ...]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"


def _loaded(section: ModelSection, model_class: Any, **options: Any) -> LanguageModel:
    device = resolve_device(section.device)
    require_quantization(section)
    adapter_files(section)
    tokenizer = load_tokenizer(section)
    if section.quantization is not None:
        options["quantization_config"] = quiet_transformers().BitsAndBytesConfig(**quantization_options(section))
    if section.device_map is not None or section.quantization is not None:
        # Quantized weights cannot be moved later.
        options["device_map"] = section.device_map or {"": device}
    with explaining_load(section):
        module = model_class.from_pretrained(
            source_of(section),
            revision=section.revision,
            dtype=getattr(torch, section.dtype),
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            **options,
        )
    module = with_adapter(module, section)
    revision = hub_commit(section) or section.revision
    module = module if "device_map" in options else module.to(device)
    return LanguageModel(module, tokenizer, section.id, revision, section)


def skeleton(section: ModelSection) -> LanguageModel:
    """Build the model from its configuration alone, ``weightless``: it has all modules and computes shapes, but no tokenizer.

    Raises:
        RemoteCodeRefused: If it needs code from its repository, and ``trust_remote_code`` is not set.
        ValueError: If the configuration cannot be loaded.
    """
    if section.pair is not None:
        return paired(*map(skeleton, section.pair))
    if held(section.id) is not None:
        return load_model(section)
    config, model_class = causal_config(section)
    dtype = getattr(torch, section.dtype)

    def build() -> nn.Module:
        # Experts run one by one, because fused expert kernels need weights that are really in memory.
        options = {"dtype": dtype, "experts_implementation": "eager"}
        if model_class is not quiet_transformers().AutoModelForCausalLM:
            return model_class._from_config(config, **options)
        return model_class.from_config(config, trust_remote_code=section.trust_remote_code, **options)

    with naming_remote_code(section):
        module = weightless(build)
    return LanguageModel(module, None, section.id, section.revision)
