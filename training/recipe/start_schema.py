"""Schema of ``dictionary.start``: the saved dictionary that a run begins with, and its alignment."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .fields import Place, Places, Positive, Section
from .model_schema import TunedSection

# Start of a transcoder that is no saved dictionary.
MLP_START = "mlp"


def _align_section(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return {"auto": {}, "unpaired": {"unpaired": True}}.get(value, {"model": value})


def _named_model(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class AlignSection(Section):
    """Source of the map from the start's activations to the recipe's; with none given, the model that its files record.

    ``align: auto`` is short for a section without keys, ``unpaired`` for ``{unpaired: true}``, any other text for a model.
    """

    model: Annotated[TunedSection | None, BeforeValidator(_named_model)] = Field(
        default=None,
        description="model that the start was trained on, run on the recipe's text; its tokenizer must be that of the recipe's "
        "model. The text of an id is enough; null: the one that the start's files record, unless another key is given",
    )
    store: Place | None = Field(
        default=None, description="activation store of that model and of the recipe's text, in place of running it"
    )
    files: Places = Field(
        default=(),
        description="vectors to pair with those of harvest.files, or with activations given in Python: row i of both must be "
        "the same token or item",
    )
    column: str | None = Field(default=None, description="files: column of vectors, or name of the tensor, as in harvest")
    unpaired: bool = Field(
        default=False,
        description="sae: use no activations but the recipe's own: fit a rotation, a scale and a shift by the reconstruction",
    )
    tokens: Positive | None = Field(
        default=None,
        description="tokens to fit the map on and to judge it on (a quarter); null: 16,384, or four times the width if more",
    )


class StartSection(Section):
    """Saved dictionary that training starts from (warm start); ``start: PATH`` alone gives its path."""

    path: Place = Field(
        description="checkpoint, stack, or another library's files: a directory, a file, or a Hub repository; mlp: the neurons "
        "of the MLP that a transcoder replaces (a directory of that name: ./mlp)"
    )
    hook: str | None = Field(
        default=None, description="which dictionary, if there are several; null: that of the recipe's hook"
    )
    subfolder: str | None = Field(default=None, description="folder of the directory or repository")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hub; null: the main branch")
    format: str | None = Field(default=None, description="format of the files; null: detected")
    k: Positive | None = Field(default=None, description="latents per token, if the files do not record it")
    scale: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="input scale, if the files do not record it"
    )
    threshold: float | None = Field(default=None, description="value that latents must exceed, if the files do not record it")
    subtract_b_dec: bool | None = Field(
        default=None, description="subtract b_dec from the input; needed where versions of a library differ"
    )
    new_latents: Literal["error", "data"] = Field(
        default="error",
        description="directions of latents beyond those of the start; error: errors of the start on the initial sample; data: "
        "centered activations",
    )
    align: Annotated[AlignSection | None, BeforeValidator(_align_section)] = Field(
        default=None,
        description="map the dictionary onto the recipe's activations before the first step, if that lowers its error; auto: "
        "by the model that its files record; unpaired: by its own reconstruction; else a model's id, or a section; null: no",
    )


def start_section(value: Any) -> Any:
    """Return a start as a section: a path alone is its ``path``."""
    return {"path": value} if isinstance(value, str) else value
