"""Schema of a recipe: every key with its type, default and description.

Types are never coerced, and unknown keys are errors. Checks that involve several keys are in ``validation.py``.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .fields import (
    Betas,
    Hooks,
    Layers,
    Names,
    ObjectiveName,
    OnBadRow,
    Place,
    Places,
    Positive,
    Rate,
    Roles,
    Section,
    Share,
    Token,
)
from .model_schema import ModelSection
from .start_schema import StartSection, start_section
from .text_schema import TextSection


class ExcludeSection(Section):
    """Tokens to leave out, besides special tokens and leading positions."""

    roles: Roles = Field(default=(), description="chats: roles whose tokens are left out; template: what the template adds")
    tokens: Annotated[tuple[Token, ...], Field(strict=False)] = Field(
        default=(), description="tokens, as text or as ids, which are left out wherever they occur"
    )
    positions: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        default=(), description="positions of every context; negative ones count from its end"
    )
    norm_above: Annotated[float, Field(gt=1.0)] | None = Field(
        default=None,
        description="leave out tokens whose activation at any hook has a norm above this multiple of the median norm there "
        "(of the text's first 64 contexts); null: none",
    )

    @property
    def given(self) -> bool:
        """True if anything is left out."""
        return self != ExcludeSection()


class HarvestSection(Section):
    """Choice and storage of activations."""

    files: Places = Field(
        default=(),
        description="vectors to train on in place of a model's activations: .npy, .safetensors or .parquet files, saved data "
        "sets, folders or patterns (embeddings/*.npy)",
    )
    column: str | None = Field(
        default=None, description="files: column of vectors, or name of the tensor; null: the only one there is"
    )
    rows: Place | None = Field(
        default=None,
        description="files: table (.csv, .jsonl, .parquet) with one record per vector, shown by `sparsary features`: label, "
        "text, name, id, image (path of a thumbnail)",
    )
    hooks: Names = Field(
        default=(),
        description="module paths with a side, e.g. transformer.h.2:out; default: the hooks of the recipe's dictionaries",
    )
    tokens: Positive | None = Field(default=None, description="with a store: tokens to store, including held-out ones")
    store: Place | None = Field(
        default=None,
        description="directory of the activation store, or a URL for fsspec (s3://bucket/store); null: stream from the model",
    )
    cache_gb: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="store on a URL: largest size of all copies of such stores in the cache, in GB; null: as the disk allows",
    )
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        default="float32", description="precision of the stored activations; int8 has one scale per block of dimensions"
    )
    block: Positive = Field(default=64, description="int8: number of neighboring dimensions that share a scale")
    gradients: bool = Field(default=False, description="also store the gradient of the next-token loss at every hook")
    batch_contexts: Positive = Field(default=32, description="contexts per forward pass of the model")
    shard_tokens: Positive = Field(default=131_072, description="tokens per file of the store")
    heldout: Share = Field(default=0.05, description="share of documents held out for evaluation")
    exclude_special: bool = Field(default=True, description="leave out BOS, EOS and padding: their norms dwarf all others")
    exclude_leading: Annotated[int, Field(ge=0)] = Field(
        default=8, description="leading positions of every context to leave out"
    )
    exclude: ExcludeSection = Field(default=ExcludeSection(), description="further tokens to leave out")
    live_buffer_tokens: Positive = Field(default=65_536, description="store null: size of the shuffle buffer, in tokens")
    verify: bool = Field(default=True, description="verify the checksum of every shard before training")
    on_bad_row: OnBadRow = Field(
        default="skip", description="skip: leave out and count tokens with activations that are not finite; error: stop"
    )
    max_bad_share: Share = Field(default=0.01, description="on_bad_row skip: stop if a larger share of tokens is bad")


class DictionarySection(Section):
    """Dictionary to train, and its hooks: given directly, or by ``layer`` and ``site``.

    With a ``start``, keys that the recipe leaves out are those of the saved dictionary.
    """

    kind: Literal["sae", "transcoder", "cross_layer_transcoder", "crosscoder"] = Field(
        default="sae",
        description="sae: reconstructs its own input; transcoder: predicts a module's output from its input; "
        "cross_layer_transcoder: predicts the outputs of a layer's MLP and of all later ones; crosscoder: reconstructs several "
        "activations of a token from one code",
    )
    hook: str | None = Field(default=None, description="sae: hook to read and reconstruct")
    hooks: Hooks = Field(default=None, description="crosscoder: two or more hooks to read and reconstruct together")
    hook_in: Hooks = Field(
        default=None, description="transcoder: hook to read; cross_layer_transcoder: a list, one hook per layer"
    )
    hook_out: Hooks = Field(default=None, description="hook to predict, or a list, as in hook_in")
    layer: Annotated[int, Field(ge=0)] | None = Field(default=None, description="with site, in place of hooks; counted from 0")
    layers: Layers = Field(default=None, description="cross_layer_transcoder, crosscoder: all, or a list; with site")
    site: str | None = Field(default=None, description="part of the layer: mlp (transcoders), mlp_out, attn_out, ...")
    skip: bool = Field(default=False, description="transcoder: add an affine skip path around the latents, zero at first")
    causal: bool = Field(
        default=False,
        description="crosscoder: weakly causal: each latent reads one hook, and writes to it and later ones, so that the "
        "model can run on the result; the checkpoint is a cross-layer dictionary of the same hooks",
    )
    joint: bool = Field(
        default=False,
        description="cross_layer_transcoder: topk selects n_layers x k latents among those of all layers; relu and jumprelu "
        "reach target_l0 on average over layers, with one penalty weight",
    )
    start: Annotated[StartSection | None, BeforeValidator(start_section)] = Field(
        default=None, description="train a saved dictionary further, on this recipe's activations; null: train a new one"
    )
    n_latents: Positive | None = Field(
        default=None,
        description="number of latents; per layer in a cross_layer_transcoder or a causal crosscoder. Required without start; "
        "null: those of the start. More: new ones are added; fewer: the densest are kept",
    )
    encoder: dict[str, Any] | None = Field(
        default=None,
        description="name of the encoder, and its arguments. Required without start; null: that of the start. With start, k or "
        "target_l0 may be left out: it is then the start's l0",
    )
    row_norm: str | None = Field(
        default=None, description="per-token normalization of the inputs; only that of the start, set by sparsary"
    )
    normalize: Literal["scale", "none"] = Field(
        default="scale", description="scale: divide by one constant, so that the variance per dimension is 1"
    )
    aligned: bool = Field(
        default=False,
        description="sae: keep the product of every encoder row with its decoder direction at 1 (arXiv:2605.18629): after each "
        "step, encoder rows are moved by the least that makes it so",
    )
    orthogonality: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="weight of a penalty on overlapping decoder directions (OrtSAE, arXiv:2509.22033): the mean squared cosine "
        "of each with the nearest of 1024 others, drawn at every step; costs half an encoder product at 2048 tokens",
    )
    init: Literal["data", "random"] = Field(
        default="data", description="initial decoder directions; data: centered activations; random: isotropic"
    )

    @property
    def known_n_latents(self) -> int:
        """Number of latents of a resolved recipe."""
        assert self.n_latents is not None, "a recipe is resolved before its size is asked for"
        return self.n_latents

    @property
    def known_encoder(self) -> dict[str, Any]:
        """Encoder of a resolved recipe."""
        assert self.encoder is not None, "a recipe is resolved before its encoder is asked for"
        return self.encoder

    @property
    def resolved(self) -> bool:
        """True if the hooks are given directly, by module path."""
        sides = self.hook_in is not None and self.hook_out is not None
        return sides or self.hook is not None or self.hooks is not None

    @property
    def built_kind(self) -> Literal["sae", "transcoder", "cross_layer_transcoder", "crosscoder"]:
        """Kind of the checkpoint: a causal crosscoder is a cross-layer dictionary that reads and writes the same hooks."""
        return "cross_layer_transcoder" if self.causal else self.kind

    @property
    def two_sided(self) -> bool:
        """True if the dictionary predicts activations other than those it reads."""
        return self.kind in ("transcoder", "cross_layer_transcoder")

    @property
    def hooks_in(self) -> tuple[str, ...]:
        """Hooks to read, concatenated along the feature axis."""
        return self._named(self.hook_in)

    @property
    def hooks_out(self) -> tuple[str, ...]:
        """Hooks to reconstruct; for an SAE or crosscoder, the same as ``hooks_in``."""
        return self._named(self.hook_out)

    @property
    def all_hooks(self) -> tuple[str, ...]:
        """All hooks, each once."""
        return tuple(dict.fromkeys((*self.hooks_in, *self.hooks_out)))

    def _named(self, given: str | tuple[str, ...] | None) -> tuple[str, ...]:
        named = next((hooks for hooks in (self.hook, self.hooks) if hooks is not None), given)
        assert named is not None, "a recipe is resolved before its hooks are asked for"
        return (named,) if isinstance(named, str) else named


class PhaseSection(Section):
    """Switch to another encoder or objective during the run; a new encoder inherits the statistics of the one before."""

    start: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="share of the run at which the phase begins")
    encoder: dict[str, Any] | None = Field(
        default=None, description="name of the encoder, and its arguments; null: the encoder stays"
    )
    objective: ObjectiveName | None = Field(default=None, description="objective from here on; null: the objective stays")
    reconstruction_weight: Annotated[float, Field(ge=0.0)] | None = Field(
        default=None,
        description="weight of the reconstruction error from here on; null: it stays, unless the objective changes",
    )
    blend: Share = Field(default=0.0, description="share of the run over which batches switch gradually to the new phase")
    lr_factor: Annotated[float, Field(gt=0.0)] = Field(default=1.0, description="multiplier of lr during the phase")


# [[share of the run, value], ...]
Knots = Annotated[tuple[Annotated[tuple[float, int | float], Field(strict=False)], ...], Field(strict=False, min_length=1)]


class DistributedSection(Section):
    """Division of the work among the processes of a run; how many there are is the launcher's choice."""

    latents: Positive = Field(
        default=1,
        description="number of processes that divide the latents among them, for dictionaries that do not fit one device; the "
        "rest of the processes divide the batch",
    )


class WandbSection(Section):
    """Logging to Weights & Biases, in addition to metrics.jsonl."""

    project: str = Field(description="W&B project")
    name: str | None = Field(default=None, description="name of the W&B run; null: chosen by W&B")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        default=None, description="null: WANDB_MODE from the environment, else online"
    )


class Recipe(Section):
    """Configuration of one training run."""

    model: ModelSection = ModelSection()
    text: TextSection = TextSection()
    harvest: HarvestSection = HarvestSection()
    dictionary: DictionarySection
    tokens: Positive = Field(description="number of training tokens; more than the store holds means several passes")
    batch_tokens: Positive = Field(default=2048, description="tokens per training step")
    accumulate: Positive = Field(default=1, description="number of micro-batches per batch, to save memory")
    lr: Rate = Field(
        default=1e-3,
        description="peak learning rate; auto: 2e-4 x sqrt(16384 / n_latents) (rule: Gao et al. 2024; constant: sparsify)",
    )
    lr_bias: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0,
        description="learning rate of the encoder's biases, as a multiple of lr; 10 lowers transcoders' fvu in short runs",
    )
    lr_warmup_steps: Annotated[int, Field(ge=0)] = Field(default=100, description="steps over which lr rises from 0")
    lr_decay: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.2, description="share of the run, at its end, over which lr decays to 0"
    )
    betas: Betas = Field(
        default=(0.9, 0.999),
        description="Adam's betas; auto: those of the encoder's paper, which are 0 and 0.999 for jumprelu and gated",
    )
    grad_clip: Annotated[float, Field(gt=0.0)] | None = Field(
        default=0.003,
        description="maximum gradient norm; null: no clipping. The loss is an FVU, so 0.003 clips nearly every step: Adam then "
        "sees gradients of equal norm, and the large ones at the start do not slow the rest of the run",
    )
    weight_average: Share = Field(
        default=0.0,
        description="above 0 the checkpoint holds an exponential mean of the weights with this decay per step, e.g. 0.999; "
        "the training itself is unchanged",
    )
    screen: Literal["none", "int8"] = Field(
        default="none",
        description="int8: approximate top-k (topk): an int8 product finds candidates, an exact one ranks them. Faster; rarely "
        "misses a latent",
    )
    screen_floor: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.999,
        description="minimum recall of approximate top-k; below it, first use more candidates, then exact top-k",
    )
    optimizer: Literal["auto", "plain"] = Field(
        default="auto",
        description="auto: Adam fused with sparse gradients, if there are kernels and no accumulation; plain: "
        "materialized gradients and torch's Adam. Both are the same step up to rounding",
    )
    objective: ObjectiveName = Field(
        default="reconstruction",
        description="kl: train end to end on the KL divergence of the model's predictions when it runs on the reconstruction",
    )
    reconstruction_weight: Annotated[float, Field(ge=0.0)] | None = Field(
        default=None, description="weight of the reconstruction error; null: 1, or 0 with objective kl"
    )
    phases: Annotated[tuple[PhaseSection, ...], Field(strict=False)] = Field(
        default=(), description="later parts of the run with another encoder or objective, each with its start"
    )
    schedules: dict[str, Knots] = Field(
        default_factory=dict,
        description="encoder argument, e.g. k or beta -> [[share of the run, value], ...], interpolated linearly",
    )
    auxk_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=1 / 32, description="weight of AuxK (Gao et al. 2024, appendix A.2)"
    )
    auxk_latents: Positive | None = Field(
        default=None, description="dead latents per token in the auxiliary loss; null: half the width of one output hook"
    )
    aux_zipf_tau: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="above 0 the auxiliary loss also includes latents that fire less than tau times as often as a Zipf law "
        "predicts for their rank (aux_zipf_loss); 0 is AuxK. On stories3M 0.1 changed nothing and 0.5 left more latents dead",
    )
    aux_zipf_absolute: bool = Field(default=False, description="compare with the prediction for the last rank instead")
    calibration_tokens: Positive = Field(
        default=262_144,
        description="tokens to calibrate thresholds on after training, where the encoder has any; at most those of the run",
    )
    dead_after_tokens: Positive = Field(default=1_000_000, description="tokens without firing after which a latent is dead")
    precision: Literal["auto", "float32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on a GPU that supports it, else float32"
    )
    seed: int = Field(default=0, description="seed of the initial weights and of the order of tokens")
    out_dir: Place = Field(description="directory of the run: checkpoint, saved state and logs")
    log_every: Positive = Field(default=50, description="steps between two lines of the log")
    save_every: Positive = Field(default=1000, description="steps between two saved states")
    distributed: DistributedSection = DistributedSection()
    wandb: WandbSection | None = Field(default=None, description="log to Weights & Biases as well; null: do not")
    eval_tokens: Positive = Field(default=200_000, description="number of held-out tokens that `sparsary eval` uses")

    @property
    def encoders(self) -> list[dict[str, Any]]:
        """Encoder of every phase of a resolved recipe; the first is the dictionary's own."""
        found = [self.dictionary.known_encoder]
        for phase in self.phases:
            found.append(phase.encoder or found[-1])
        return found

    @property
    def uses_kl(self) -> bool:
        """True if any part of the run trains through the model."""
        return "kl" in (self.objective, *(phase.objective for phase in self.phases))


def total_steps(recipe: Recipe) -> int:
    """Return the number of steps of the run; the last batch is a full one."""
    return -(-recipe.tokens // recipe.batch_tokens)


def calibrated_on(recipe: Recipe) -> int:
    """Return the number of tokens for calibrating thresholds and for a streamed run's moments: at most those of the run."""
    return min(recipe.calibration_tokens, recipe.tokens)


def peak_lr(recipe: Recipe) -> float:
    """Return the highest learning rate of a run.

    With ``auto`` it is proportional to the inverse square root of the number of latents. The rule is from Gao et al. 2024,
    arXiv:2406.04093, section 3; the constant, 2e-4 at 16,384 latents, from EleutherAI's sparsify.
    """
    return 2e-4 * (16_384 / recipe.dictionary.known_n_latents) ** 0.5 if recipe.lr == "auto" else recipe.lr
