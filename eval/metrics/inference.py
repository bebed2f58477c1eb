"""Inference modes of an evaluation: latents selected by the encoder, by the loss gradient, or by pursuit."""

from dataclasses import dataclass

from torch import Tensor

from ...sae import SparseCode, SparseDictionary
from ...sae.pursuit import PURSUITS
from ...sae.suggestions import require_choice


@dataclass(frozen=True)
class InferenceMode:
    """Rule that selects active latents during an evaluation; every report states it.

    By default the encoder reads one token at a time. With ``oracle``, a gradient SAE selects latents by the gradient of the
    same loss that it is then scored on. With ``pursuit``, the encoder is ignored: the code is computed from the decoder alone,
    with ``k`` latents per token.

    Example:
        >>> from sparsary import InferenceMode
        >>> InferenceMode().describe()
        'per token'
        >>> InferenceMode(pursuit="matching_pursuit", k=32).k
        32
    """

    oracle: bool = False
    pursuit: str | None = None
    k: int | None = None

    def require_valid(self, dictionary: SparseDictionary) -> None:
        if self.oracle and not dictionary.encoder.needs_gradient:
            raise ValueError("--oracle: expected a gradient_topk dictionary. Omit --oracle.")
        if self.pursuit is not None:
            require_choice("--pursuit", self.pursuit, PURSUITS)
        if (self.pursuit is None) != (self.k is None) or (self.k is not None and self.k < 1):
            raise ValueError(f"--k: expected a number of latents above 0 with --pursuit, and none without it, got {self.k}.")
        if self.oracle and self.pursuit is not None:
            raise ValueError("--oracle: expected --oracle or --pursuit, got both.")

    def describe(self) -> str:
        if self.oracle:
            return "oracle: latents chosen by the gradient of the loss that is measured"
        return "per token" if self.pursuit is None else f"{self.pursuit} of the atoms, {self.k} latents"

    def code(self, dictionary: SparseDictionary, x: Tensor, y: Tensor, grad: Tensor | None) -> SparseCode:
        """Return the code of raw activations ``x``. Pursuit reads the target ``y``, which equals ``x`` only for an SAE."""
        if self.pursuit is not None and self.k is not None:
            return dictionary.pursue(y, self.k, self.pursuit)
        return dictionary.encode(x, grad if self.oracle else None)


DEFAULT_INFERENCE = InferenceMode()
