"""Codes, reconstructions and loss gradients of the peer libraries for given weights; test_codes.py compares them with ours.

    .venv-peers/bin/python tests/parity/reference_codes.py LIBRARY GIVEN.safetensors OUT.safetensors [CASE ...]

GIVEN holds inputs ``x``, weights under our names and shapes, and the settings, all fields of ``Given``. OUT holds for every
case ``CASE/code``, ``CASE/y_hat``, where it differs in training ``CASE/trained_code``, and ``CASE/loss`` with
``CASE/grad.NAME`` for each parameter of the peer. Without CASE all of a library's cases run.

Everything of a peer is translated here, and only here, into what we mean:

- A matrix that a peer stores transposed is recognised by its shape, since no two dimensions are equal.
- A peer whose encoder does not subtract ``b_dec`` is given ``x - b_dec``, and has no ``b_dec`` gradient to compare.
- A loss is the squared error summed over dimensions and averaged over tokens, plus the penalty; AuxK is divided by the
  spread of the error and weighs ``aux``.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_peers import skip_package_init

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """Inputs, weights under our names, and settings; ``widths`` are Matryoshka's, ``level`` is the batch-wide threshold."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    r_mag: Tensor
    b_mag: Tensor
    threshold: Tensor
    dead: Tensor
    widths: Tensor
    k: Tensor
    pursuit_k: Tensor
    orthogonal_k: Tensor
    sparsity: Tensor
    target_l0: Tensor
    bandwidth: Tensor
    level: Tensor
    tolerance: Tensor
    aux: Tensor

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @property
    def n_latents(self) -> int:
        return self.W_enc.shape[0]

    @property
    def centred(self) -> Tensor:
        return self.x - self.b_dec

    def with_unit_atoms(self) -> "Given":
        return replace(self, W_dec=torch.nn.functional.normalize(self.W_dec, dim=-1))

    def with_unit_inputs(self) -> "Given":
        """Inputs at distance 1 from ``b_dec``: an absolute tolerance is then a relative one."""
        return replace(self, x=torch.nn.functional.normalize(self.centred, dim=-1) + self.b_dec)


@torch.no_grad()
def fill(parameters: dict[str, Tensor], given: Given) -> None:
    """Copy our weights into the parameters of a peer, which are listed under our names."""
    for name, parameter in parameters.items():
        value = getattr(given, name)
        parameter.copy_(value if value.shape == parameter.shape else value.T)


def differentiate(loss: Tensor, parameters: dict[str, Tensor], given: Given) -> Results:
    """The loss and its gradients, in our shapes."""
    results = {"loss": loss.detach()}
    for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        results[f"grad.{name}"] = grad if grad.shape == getattr(given, name).shape else grad.T
    return results


def aux_weight(given: Given, y_hat: Tensor) -> float:
    """What a squared error, summed over dimensions and averaged over tokens, is weighed with to become our AuxK."""
    error = given.x - y_hat.detach()
    return float(given.aux * len(error) / (error - error.mean(0)).pow(2).sum())


# --- SAELens


def saelens(
    given: Given,
    architecture: str,
    names: dict[str, str],
    settings: dict[str, Any],
    coefficients: dict[str, float] | None = None,
    inferred: str | None = None,
    dead: Tensor | None = None,
) -> Results:
    """Both classes of an architecture; ``names``: our names to theirs; ``inferred``: the class that inference uses."""
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput

    size = {"d_in": given.d, "d_sae": given.n_latents, "dtype": str(given.x.dtype).removeprefix("torch.")}
    training_class, training_config = get_sae_training_class(architecture)
    trained = training_class(training_config(**size, **settings))
    parameters = {ours: getattr(trained, theirs) for ours, theirs in names.items()}
    fill(parameters, given)
    step = TrainStepInput(
        sae_in=given.x, coefficients=coefficients or {}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )
    output = trained.training_forward_pass(step)
    results = {"trained_code": output.feature_acts.detach()} | differentiate(output.loss, parameters, given)
    if "topk_threshold" in dict(trained.named_buffers()):
        # A running mean that starts from 0 (batchtopk_sae.py:123), so the first batch counts for its rate only.
        results["level"] = trained.topk_threshold / trained.cfg.topk_threshold_lr

    inference_class, inference_config = get_sae_class(inferred or architecture)
    known = inference_config.__dataclass_fields__
    sae = inference_class(inference_config(**size, **{key: value for key, value in settings.items() if key in known}))
    sae.eval()
    fill({ours: getattr(sae, theirs) for ours, theirs in names.items()}, given)
    if inferred == "jumprelu":
        fill({"level": sae.threshold}, replace(given, level=given.level.expand(given.n_latents)))
    with torch.no_grad():
        code = sae.encode(given.x)
        return results | {"code": code, "y_hat": sae.decode(code)}


LINEAR = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
TIED = {name: name for name in ("W_dec", "b_dec")}


def saelens_topk(given: Given, rescale: bool = False, **more: Any) -> Results:
    settings = {"k": int(given.k), "rescale_acts_by_decoder_norm": rescale, "aux_loss_coefficient": 1.0}
    return saelens(given, "topk", LINEAR, settings | more.pop("settings", {}), **more)


def saelens_auxk(given: Given) -> Results:
    plain = saelens_topk(given)
    settings = {"aux_loss_coefficient": aux_weight(given, plain["y_hat"])}
    return saelens_topk(given, settings=settings, dead=given.dead)


def saelens_batchtopk(given: Given) -> Results:
    settings = {"k": int(given.k), "rescale_acts_by_decoder_norm": False}
    return saelens(given, "batchtopk", LINEAR, settings, inferred="jumprelu")


def saelens_matryoshka(given: Given) -> Results:
    widths = given.widths.tolist()
    settings = {"k": int(given.k), "rescale_acts_by_decoder_norm": False, "matryoshka_widths": widths}
    results = saelens(given, "matryoshka_batchtopk", LINEAR, settings, inferred="jumprelu")
    # Theirs is the sum over prefixes, ours the mean.
    return {key: value / len(widths) if key.startswith(("loss", "grad")) else value for key, value in results.items()}


def saelens_standard(given: Given) -> Results:
    # Their penalty is summed over latents, ours is divided by the width as well.
    return saelens(given, "standard", LINEAR, {}, {"l1": float(given.sparsity) / given.d})


def saelens_gated(given: Given) -> Results:
    names = {"W_enc": "W_enc", "b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag", "W_dec": "W_dec", "b_dec": "b_dec"}
    return saelens(given, "gated", names, {}, {"l1": float(given.sparsity) / given.d})


def saelens_jumprelu(given: Given) -> Results:
    pre_acts = given.centred @ given.W_enc.T + given.b_enc
    l0 = float((pre_acts > given.threshold).sum() / len(pre_acts))
    # Our penalty is sparsity (l0 / target - 1)^2 with the batch's l0. None of their modes is (the quadratic one squares every
    # token's, jumprelu_sae.py:357), but their linear mode has the same gradient once it weighs this.
    weight = 2 * float(given.sparsity) / float(given.target_l0) * (l0 / float(given.target_l0) - 1)
    settings = {"jumprelu_bandwidth": float(given.bandwidth)}
    return saelens(given, "jumprelu", LINEAR | {"threshold": "threshold"}, settings, {"l0": weight})


def saelens_pursuit(given: Given, k: int, tolerance: float) -> Results:
    settings = {"residual_threshold": tolerance, "max_iterations": k, "stop_on_duplicate_support": False}
    # The configuration for training warns unless this says 1, and our atoms replace the initial ones anyway.
    return saelens(given, "matching_pursuit", TIED, settings | {"decoder_init_norm": 1.0})


SAELENS: dict[str, Callable[[Given], Results]] = {
    "topk": saelens_topk,
    # Theirs by default: selection by pre-activation times atom norm, which unit atoms make the same.
    "topk_rescaled": lambda given: saelens_topk(given.with_unit_atoms(), rescale=True),
    "topk_auxk": saelens_auxk,
    "batchtopk": saelens_batchtopk,
    "matryoshka": saelens_matryoshka,
    "standard": saelens_standard,
    "gated": lambda given: saelens_gated(given.with_unit_atoms()),
    "jumprelu": saelens_jumprelu,
    "matching_pursuit": lambda given: saelens_pursuit(given.with_unit_atoms(), int(given.pursuit_k), 0.0),
    "matching_pursuit_free_norms": lambda given: saelens_pursuit(given, int(given.pursuit_k), 0.0),
    # Their tolerance is an absolute norm.
    "matching_pursuit_tolerance": lambda given: saelens_pursuit(
        given.with_unit_atoms().with_unit_inputs(), int(given.pursuit_k), float(given.tolerance)
    ),
}


# --- dictionary_learning


def learning_trainer(trainer_class: type, given: Given, **settings: Any) -> Any:
    """A trainer of theirs, of which only the autoencoder and the loss are used; the schedule does not matter."""
    return trainer_class(
        steps=10,
        activation_dim=given.d,
        dict_size=given.n_latents,
        layer=0,
        lm_name="-",
        warmup_steps=0,
        device="cpu",
        **settings,
    )


@torch.no_grad()
def learning_code(ae: Any, given: Given, **options: Any) -> Results:
    code = ae.encode(given.x, **options)
    return {"code": code, "y_hat": ae.decode(code)}


def linear_of(ae: Any) -> dict[str, Tensor]:
    """Our names of an autoencoder made of two nn.Linear."""
    b_dec = ae.b_dec if hasattr(ae, "b_dec") else ae.bias
    return {"W_enc": ae.encoder.weight, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight, "b_dec": b_dec}


def learning_topk(given: Given, aux: bool = False) -> Results:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = learning_trainer(TopKTrainer, given, k=int(given.k), auxk_alpha=float(given.aux) if aux else 0.0)
    if aux:
        # Firing resets the count before AuxK reads it, so the dead must not fire in this batch either.
        trainer.num_tokens_since_fired[given.dead] = trainer.dead_feature_threshold
    parameters = linear_of(trainer.ae)
    fill(parameters, given)
    return learning_code(trainer.ae, given) | differentiate(trainer.loss(given.x, step=0), parameters, given)


def learning_batch_wide(trainer: Any, parameters: dict[str, Tensor], given: Given) -> Results:
    """BatchTopK and its Matryoshka form: batch-wide in training, by threshold afterwards."""
    fill(parameters, given)
    trained = trainer.ae.encode(given.x, use_threshold=False).detach()
    results = differentiate(trainer.loss(given.x, step=trainer.threshold_start_step + 1), parameters, given)
    level = trainer.ae.threshold
    trainer.ae.threshold = given.level
    return results | {"trained_code": trained, "level": level} | learning_code(trainer.ae, given)


def learning_batchtopk(given: Given) -> Results:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = learning_trainer(BatchTopKTrainer, given, k=int(given.k))
    return learning_batch_wide(trainer, linear_of(trainer.ae), given)


def learning_matryoshka(given: Given) -> Results:
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    sizes = given.widths.diff(prepend=given.widths.new_zeros(1)).tolist()
    # Rounded down to sizes; half a latent more keeps them safe from rounding, and the last group takes what is left.
    fractions = [(size + 0.5) / given.n_latents for size in sizes[:-1]]
    fractions.append(1 - sum(fractions))
    # By default weights are 1 / n and the mean divides by n again (matryoshka_batch_top_k.py:175 and 292).
    weights = [1.0] * len(sizes)
    trainer = learning_trainer(
        MatryoshkaBatchTopKTrainer, given, k=int(given.k), group_fractions=fractions, group_weights=weights
    )
    parameters = {name: getattr(trainer.ae, name) for name in LINEAR}
    return learning_batch_wide(trainer, parameters, given)


def learning_standard(given: Given, april: bool = False) -> Results:
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate

    trainer_class = StandardTrainerAprilUpdate if april else StandardTrainer
    penalty = float(given.sparsity) / given.d
    trainer = learning_trainer(trainer_class, given, l1_penalty=penalty, sparsity_warmup_steps=None)
    parameters = linear_of(trainer.ae)
    fill(parameters, given)
    return learning_code(trainer.ae, given) | differentiate(trainer.loss(given.x, step=0), parameters, given)


def learning_gated(given: Given) -> Results:
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    penalty = float(given.sparsity) / given.d
    trainer = learning_trainer(GatedSAETrainer, given, l1_penalty=penalty, sparsity_warmup_steps=None)
    ae = trainer.ae
    parameters = {"W_enc": ae.encoder.weight, "b_enc": ae.gate_bias, "r_mag": ae.r_mag, "b_mag": ae.mag_bias}
    parameters |= {"W_dec": ae.decoder.weight, "b_dec": ae.decoder_bias}
    fill(parameters, given)
    return learning_code(ae, given) | differentiate(trainer.loss(given.x, step=0), parameters, given)


def learning_jumprelu(given: Given, penalty: bool = True) -> Results:
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    settings = {"bandwidth": float(given.bandwidth), "target_l0": float(given.target_l0), "sparsity_warmup_steps": None}
    trainer = learning_trainer(JumpReluTrainer, given, sparsity_penalty=float(given.sparsity) if penalty else 0.0, **settings)
    parameters = {name: getattr(trainer.ae, name) for name in (*LINEAR, "threshold")}
    fill(parameters, given)
    # Inference subtracts b_dec if told to; the trainer's loss never does (jumprelu.py:155), so there it is taken off first.
    trainer.ae.apply_b_dec_to_input = True
    results = learning_code(trainer.ae, given)
    parameters.pop("b_dec").data.zero_()
    return results | differentiate(trainer.loss(given.centred, step=0), parameters, given)


def learning_gradient_pursuit(given: Given) -> Results:
    from dictionary_learning.grad_pursuit import grad_pursuit

    code = grad_pursuit(given.centred, given.W_dec.T, target_l0=int(given.k))
    return {"code": code, "y_hat": code @ given.W_dec + given.b_dec}


DICTIONARY_LEARNING: dict[str, Callable[[Given], Results]] = {
    "topk": learning_topk,
    "topk_auxk": lambda given: learning_topk(given, aux=True),
    "batchtopk": learning_batchtopk,
    "matryoshka": learning_matryoshka,
    # Its penalty does not weigh atoms, which it keeps at norm 1.
    "standard": lambda given: learning_standard(given.with_unit_atoms()),
    "standard_april": lambda given: learning_standard(given, april=True),
    "gated": learning_gated,
    "jumprelu": learning_jumprelu,
    "jumprelu_unpenalised": lambda given: learning_jumprelu(given, penalty=False),
    "gradient_pursuit": learning_gradient_pursuit,
}


# --- sparsify


def sparsify_topk(given: Given, aux: bool = False) -> Results:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(given.d, SparseCoderConfig(num_latents=given.n_latents, k=int(given.k)), dtype=given.x.dtype)
    parameters = {"W_enc": coder.encoder.weight, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    fill(parameters, given)
    # They divide every term by this sum of squares; the number of tokens makes it our mean over tokens.
    output = coder(given.x, dead_mask=given.dead if aux else None, total_variance=torch.tensor(len(given.x)))
    loss = output.fvu + aux_weight(given, output.sae_out) * output.auxk_loss
    results = differentiate(loss, parameters, given)
    with torch.no_grad():
        values, latents, _ = coder.encode(given.x)
        code = torch.zeros(len(given.x), given.n_latents).scatter_(1, latents, values)
        return results | {"code": code, "y_hat": coder.decode(values, latents)}


SPARSIFY: dict[str, Callable[[Given], Results]] = {
    "topk": sparsify_topk,
    "topk_auxk": lambda given: sparsify_topk(given, aux=True),
}


# --- overcomplete: no bias on the decoder's side at all, so everything is centred


def overcomplete(given: Given, sae: Any, thresholds: bool = False) -> Results:
    """``sae``: a module of theirs whose dictionary is used as it is."""
    from overcomplete.sae.losses import mse_l1

    parameters = {"W_dec": sae.dictionary._weights}
    if hasattr(sae.encoder, "final_block"):
        parameters |= {"W_enc": sae.encoder.final_block[0].weight, "b_enc": sae.encoder.final_block[0].bias}
    fill(parameters, given)
    if thresholds:
        # They learn logarithms.
        parameters["threshold"] = sae.thresholds
        sae.thresholds.data.copy_(given.threshold.log())
    sae.train()
    pre_codes, trained, x_hat = sae(given.centred)
    # The mean runs over dimensions as well; with a penalty of 0 this loss is its squared error.
    loss = given.d * mse_l1(given.centred, x_hat, pre_codes, trained, sae.get_dictionary(), penalty=0.0)
    results = {"trained_code": trained.detach()} | differentiate(loss, parameters, given)
    if hasattr(sae, "running_threshold"):
        results["level"] = sae.running_threshold
        sae.running_threshold = given.level
    if thresholds:
        # To the threshold from its logarithm. Their rectangle has integral 1 (kernels.py:31) and is divided by the bandwidth
        # once more (jump_sae.py:68); the paper's has height 1.
        results["grad.threshold"] = results["grad.threshold"] / given.threshold * given.bandwidth
    # Training mode normalises the weights in place, eval mode reads a copy made here.
    sae.eval()
    with torch.no_grad():
        _, code, x_hat = sae(given.centred)
    return results | {"code": code, "y_hat": x_hat + given.b_dec}


AS_IT_IS = {"dictionary_params": {"normalization": "identity"}}


def overcomplete_topk(given: Given) -> Results:
    from overcomplete.sae import TopKSAE

    return overcomplete(given, TopKSAE(given.d, given.n_latents, top_k=int(given.k), **AS_IT_IS))


def overcomplete_batchtopk(given: Given) -> Results:
    from overcomplete.sae import BatchTopKSAE

    # Their top_k counts the whole batch.
    return overcomplete(given, BatchTopKSAE(given.d, given.n_latents, top_k=int(given.k) * len(given.x), **AS_IT_IS))


def overcomplete_jumprelu(given: Given) -> Results:
    from overcomplete.sae import JumpSAE

    sae = JumpSAE(given.d, given.n_latents, kernel="rectangle", bandwidth=float(given.bandwidth), **AS_IT_IS)
    return overcomplete(given, sae, thresholds=True)


def overcomplete_pursuit(given: Given) -> Results:
    from overcomplete.sae import MpSAE

    return overcomplete(given, MpSAE(given.d, given.n_latents, k=int(given.pursuit_k), **AS_IT_IS))


@torch.no_grad()
def overcomplete_orthogonal(given: Given) -> Results:
    from overcomplete.sae import OMPSAE

    # Projected gradient steps until the batch's gradient is below 1e-5 (omp_sae.py:116), 10 at most by default. Inputs are
    # enlarged, as values are with them, so that this leaves an error of about 1e-8.
    scale = 1000.0
    sae = OMPSAE(given.d, given.n_latents, k=int(given.orthogonal_k), max_iter=100_000, **AS_IT_IS)
    fill({"W_dec": sae.dictionary._weights}, given)
    sae.eval()
    _, code, x_hat = sae(given.centred * scale)
    return {"code": code / scale, "y_hat": x_hat / scale + given.b_dec}


OVERCOMPLETE: dict[str, Callable[[Given], Results]] = {
    "topk": overcomplete_topk,
    "batchtopk": overcomplete_batchtopk,
    "jumprelu": overcomplete_jumprelu,
    "matching_pursuit": lambda given: overcomplete_pursuit(given.with_unit_atoms()),
    "orthogonal_matching_pursuit": lambda given: overcomplete_orthogonal(given.with_unit_atoms()),
}

LIBRARIES = {
    "saelens": SAELENS,
    "dictionary_learning": DICTIONARY_LEARNING,
    "sparsify": SPARSIFY,
    "overcomplete": OVERCOMPLETE,
}


def main() -> None:
    """Run the cases and write what they gave."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("given", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read when sparsify is imported; its kernels do not run on a CPU
    if arguments.library in ("dictionary_learning", "overcomplete"):
        skip_package_init(arguments.library)
    given = Given(**load_file(arguments.given))
    # The peers create many a tensor in the default precision.
    torch.set_default_dtype(given.x.dtype)
    cases = LIBRARIES[arguments.library]
    results: Results = {}
    for name in arguments.cases or cases:
        results |= {f"{name}/{key}": value.contiguous() for key, value in cases[name](given).items()}
    save_file(results, arguments.out)


if __name__ == "__main__":
    main()
