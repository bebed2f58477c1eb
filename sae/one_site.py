"""Common base of dictionaries that read one activation of a model and write one."""

from abc import ABC

from .encoder import Encoder
from .one_block import OneBlockDictionary


class OneSiteDictionary(OneBlockDictionary, ABC):
    """Dictionary that reads one activation and writes one: the common base of SAEs and transcoders."""

    def __init__(
        self, d_in: int, d_out: int, n_latents: int, encoder: Encoder, row_norm: str | None = None, tied: bool = False
    ):
        super().__init__(d_in, d_out, n_latents, encoder, row_norm, tied)
