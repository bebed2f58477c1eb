"""Schema of the recipe sections that name a language model."""

from typing import Literal

from pydantic import Field

from .fields import Place, Section


class TunedSection(Section):
    """Fine-tuned model, run on the token ids of the first: its hooks are ``tuned/HOOK``, those of the first ``base/HOOK``.

    Keys that ``models: [BASE, TUNED]`` leaves out for the tuned model are those of the base.
    """

    id: Place = Field(default="embedded", description="'embedded', a Hugging Face model id, or a local directory")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hub; null: the main branch")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="precision the model runs in")
    device: str = Field(default="auto", description="'auto' uses a GPU if there is one")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        default=None,
        description="how accelerate spreads a model over several GPUs, and over main memory and disk where they are too small; "
        "null: all of it on device, which the dictionary is on in any case",
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None,
        description="load weights in 8 bits (LLM.int8) or 4 (NF4), with bitsandbytes; the activations are then those of the "
        "quantized model, and stores and results are kept apart from those of the original. null: as dtype says",
    )
    adapter: Place | None = Field(
        default=None,
        description="directory of a PEFT adapter (LoRA and others) for the model's weights; part of its identity; needs peft",
    )
    adapter_mode: Literal["merged", "active"] = Field(
        default="merged", description="merged: added to the weights; active: computed beside them, as in fine-tuning"
    )
    truncate: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: where only activations are read, load no blocks after the last hook; never: always the whole model",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code from the model's repository; it has your permissions on this machine, so read it first",
    )


class ModelSection(TunedSection):
    """Language model whose activations are studied."""

    tuned: TunedSection | None = Field(
        default=None,
        description="second model, compared with this one on the same token ids; `models: [BASE, TUNED]` is short for both",
    )

    @property
    def pair(self) -> "tuple[ModelSection, ModelSection] | None":
        """Sections of the base and the tuned model; ``None`` for one model."""
        if self.tuned is None:
            return None
        tuned = ModelSection.model_validate(self.tuned.model_dump())
        return self.model_copy(update={"tuned": None}), tuned
