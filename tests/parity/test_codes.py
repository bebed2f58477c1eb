"""Our codes, reconstructions and loss gradients against those of published libraries, with the same weights on both sides.

The peers run in their own environment (``make peers``) through reference_codes.py, which also translates their conventions
into ours. Everything is float64 except where a peer insists on float32. The dictionary is small and its sizes are distinct
primes. Atoms have free norms unless the case says ``unit_atoms``: a code here never depends on what training does to them.

Gradients are compared where theirs are right; the table says which are left out and why, with the file and line of the
peer as installed by peers.txt and peers-nodeps.txt.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sparsary.sae import SAE
from sparsary.sae.batch_encoder import BatchWide
from sparsary.sae.encoders import build_encoder
from sparsary.sae.encoders.jumprelu import PACE, JumpReLU
from sparsary.sae.pursuit import gradient_pursuit, orthogonal_matching_pursuit
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.objective import AuxSettings, LatentUsage, Objective

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the peers' environment, .venv-peers: make peers"),
]

D, LATENTS, TOKENS, DEAD, K = 13, 67, 29, 37, 5
# Far enough that some tokens take an atom twice.
PURSUIT_K = 11
ORTHOGONAL_K = 3
WIDTHS = [7, 19, LATENTS]
SPARSITY, TARGET_L0, BANDWIDTH, LEVEL, TOLERANCE, AUX = 0.3, 7.0, 0.25, 1.1, 0.2, 1 / 32

EXACT = 1e-10
# What is left once a peer has rounded an intermediate result to float32.
SINGLE = 1e-5

TOPK = {"name": "topk", "k": K}
BATCH_TOPK = {"name": "batch_topk", "k": K}
MUTUAL_CHOICE = {"name": "mutual_choice", "k": K}
MATRYOSHKA = {"name": "matryoshka", "k": K, "shares": [width / LATENTS for width in WIDTHS]}
RELU = {"name": "relu", "sparsity": SPARSITY}
GATED = {"name": "gated", "sparsity": SPARSITY}
JUMPRELU = {"name": "jumprelu", "target_l0": TARGET_L0, "sparsity": SPARSITY, "bandwidth": BANDWIDTH}
UNPENALISED = JUMPRELU | {"sparsity": 0.0}
PURSUIT = {"name": "matching_pursuit", "k": PURSUIT_K}
LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec")
GATES = ("W_enc", "b_enc", "r_mag", "b_mag")


@dataclass(frozen=True)
class Case:
    """One architecture of one library; ``gradients`` are compared, and the loss itself unless ``loss`` is false.

    ``tangent``: the part of an atom's gradient along the atom is not compared, since a trainer that keeps atoms at norm 1
    removes it. ``tolerance`` is relative to the largest entry of a tensor.
    """

    library: str
    name: str
    encoder: dict[str, Any]
    gradients: tuple[str, ...]
    unit_atoms: bool = False
    unit_inputs: bool = False
    aux: bool = False
    tangent: bool = False
    loss: bool = True
    tolerance: float = EXACT

    def __str__(self) -> str:
        return f"{self.library}-{self.name}-{self.encoder['name']}"


CASES = (
    Case("saelens", "topk", TOPK, LINEAR),
    Case("saelens", "topk_rescaled", TOPK, LINEAR, unit_atoms=True),
    # They leave out the ReLU after selecting the dead (topk_sae.py:572). Here enough dead latents are positive on each token.
    # Left out here and below: b_dec, which AuxK moves through the encoder there; ours takes the centred input as data.
    Case("saelens", "topk_auxk", TOPK, ("W_enc", "b_enc", "W_dec"), aux=True),
    Case("saelens", "batchtopk", BATCH_TOPK, LINEAR),
    Case("saelens", "batchtopk", MUTUAL_CHOICE, LINEAR),
    Case("saelens", "matryoshka", MATRYOSHKA, LINEAR),
    Case("saelens", "standard", RELU, LINEAR),
    # Left out: W_dec and b_dec, which their auxiliary term moves (gated_sae.py:212) and the paper's does not. Their penalty
    # weighs atoms (gated_sae.py:208), the paper's does not, so atoms have norm 1 here.
    Case("saelens", "gated", GATED, GATES, unit_atoms=True),
    # Their penalty is linear, ours quadratic: equal gradients, see reference_codes.py, but another value. Thresholds are
    # float32 there whatever the dtype (jumprelu_sae.py:268).
    Case("saelens", "jumprelu", JUMPRELU, (*LINEAR, "threshold"), loss=False, tolerance=SINGLE),
    Case("saelens", "matching_pursuit", PURSUIT, ("W_dec", "b_dec"), unit_atoms=True),
    Case("saelens", "matching_pursuit_free_norms", PURSUIT, ("W_dec", "b_dec")),
    Case(
        "saelens",
        "matching_pursuit_tolerance",
        PURSUIT | {"tolerance": TOLERANCE},
        ("W_dec", "b_dec"),
        unit_atoms=True,
        unit_inputs=True,
    ),
    Case("dictionary_learning", "topk", TOPK, LINEAR),
    # AuxK is computed in float32 (top_k.py:237).
    Case("dictionary_learning", "topk_auxk", TOPK, ("W_enc", "b_enc", "W_dec"), aux=True, tolerance=SINGLE),
    Case("dictionary_learning", "batchtopk", BATCH_TOPK, LINEAR),
    Case("dictionary_learning", "batchtopk", MUTUAL_CHOICE, LINEAR),
    # The double 1 / n of their default group weights (matryoshka_batch_top_k.py:175 and 292) is set aside.
    Case("dictionary_learning", "matryoshka", MATRYOSHKA, LINEAR),
    Case("dictionary_learning", "standard", RELU, LINEAR, unit_atoms=True, tangent=True),
    Case("dictionary_learning", "standard_april", RELU, LINEAR),
    Case("dictionary_learning", "gated", GATED, (*LINEAR, "r_mag", "b_mag")),
    # Left out: the thresholds' gradient, because the kernel is applied to what is left after the jump (jumprelu.py:170) and
    # so sees only one side of the threshold; and b_dec, which their trainer never subtracts from the input (jumprelu.py:155).
    # The count of firing latents is float32.
    Case("dictionary_learning", "jumprelu", JUMPRELU, ("W_enc", "b_enc", "W_dec"), tolerance=SINGLE),
    # Without the penalty the thresholds' gradient is right.
    Case("dictionary_learning", "jumprelu_unpenalised", UNPENALISED, ("W_enc", "b_enc", "W_dec", "threshold")),
    Case("sparsify", "topk", TOPK, LINEAR),
    # Left out: W_enc and b_enc, which AuxK gives no gradient, since the fused encoder drops that of the pre-activations
    # (fused_encoder.py:53). It is divided by the variance of the input, not of the error: set aside.
    Case("sparsify", "topk_auxk", TOPK, ("W_dec", "b_dec"), aux=True),
    # Their AuxK is left out: it takes the strongest latents that did not fire, dead or not, and moves the live ones through
    # the error as well (losses.py:147).
    Case("overcomplete", "topk", TOPK, ("W_enc", "b_enc", "W_dec")),
    Case("overcomplete", "batchtopk", BATCH_TOPK, ("W_enc", "b_enc", "W_dec")),
    # There is no penalty on the number of firing latents. A factor of 1 / bandwidth too many in the thresholds' gradient
    # (jump_sae.py:68 with kernels.py:31) is set aside. Their kernel sees zeros for negative pre-activations (jump_sae.py:298):
    # thresholds here are above half the bandwidth, where that does no harm.
    Case("overcomplete", "jumprelu", UNPENALISED, ("W_enc", "b_enc", "W_dec", "threshold")),
    Case("overcomplete", "matching_pursuit", PURSUIT, ("W_dec",), unit_atoms=True),
)


@pytest.fixture(scope="module")
def given():
    """Inputs, weights and settings for both sides."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[torch.randperm(LATENTS, generator=generator)[:DEAD]] = True
    # Dead latents see so little that no budget is spent on them, but enough of them are positive for AuxK.
    seen = torch.where(dead, 0.02, 1.0).double()
    return {
        "x": normal(TOKENS, D) + normal(D),
        "W_enc": F.normalize(normal(LATENTS, D), dim=-1) * seen[:, None],
        "b_enc": 0.3 * normal(LATENTS) * seen,
        "W_dec": F.normalize(normal(LATENTS, D), dim=-1) * (0.5 + uniform(LATENTS, 1)),
        "b_dec": normal(D),
        "r_mag": 0.3 * normal(LATENTS),
        "b_mag": 0.2 * normal(LATENTS),
        # Numbers of float32, for the peer that keeps them so.
        "threshold": (0.3 + 0.5 * uniform(LATENTS)).float().double(),
        "dead": dead,
        "widths": torch.tensor(WIDTHS),
        "k": torch.tensor(K),
        "pursuit_k": torch.tensor(PURSUIT_K),
        "orthogonal_k": torch.tensor(ORTHOGONAL_K),
        "sparsity": torch.tensor(SPARSITY, dtype=torch.float64),
        "target_l0": torch.tensor(TARGET_L0, dtype=torch.float64),
        "bandwidth": torch.tensor(BANDWIDTH, dtype=torch.float64),
        "level": torch.tensor(LEVEL, dtype=torch.float64),
        "tolerance": torch.tensor(TOLERANCE, dtype=torch.float64),
        "aux": torch.tensor(AUX, dtype=torch.float64),
    }


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory):
    """Results of a library, all of its cases in one process, run when first asked for."""
    folder, found = tmp_path_factory.mktemp("codes"), {}
    save_file(given, folder / "given.safetensors")

    def results(library, name):
        if library not in found:
            out = folder / f"{library}.safetensors"
            script = ROOT / "tests" / "parity" / "reference_codes.py"
            command = [PEERS_PYTHON, script, library, folder / "given.safetensors", out]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert process.returncode == 0, process.stderr
            found[library] = load_file(out)
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in found[library].items() if key.startswith(prefix)}

    return results


def atoms_and_inputs(case, given):
    """The weights of the case: atoms at norm 1, or inputs at distance 1 from ``b_dec``, if it asks for them."""
    atoms = F.normalize(given["W_dec"], dim=-1) if case.unit_atoms else given["W_dec"]
    x = given["x"]
    return atoms, F.normalize(x - given["b_dec"], dim=-1) + given["b_dec"] if case.unit_inputs else x


def build(case, given):
    """Our autoencoder with the weights of the case, and its parameters by name."""
    sae = SAE(D, LATENTS, build_encoder(case.encoder)).double()
    values = given | {"W_dec": atoms_and_inputs(case, given)[0], "log_threshold": given["threshold"].log() / PACE}
    parameters = {path.rpartition(".")[2]: parameter for path, parameter in sae.named_parameters()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    if isinstance(sae.encoder, JumpReLU):
        # Thresholds are given; none are to be chosen on the first batch.
        sae.encoder.started.fill_(1)
    return sae, parameters


def gradient(parameters, name, given):
    """The gradient of one of our parameters, that of the threshold derived from the one of what is stored."""
    if name != "threshold":
        return parameters[name].grad
    # threshold = exp(PACE * log_threshold)
    return parameters["log_threshold"].grad / (PACE * given["threshold"])


def assert_close(ours, theirs, tolerance, what):
    largest = float(theirs.abs().max())
    assert largest > 0, f"{what}: nothing to compare"
    assert ours.shape == theirs.shape, what
    difference = float((ours.detach() - theirs).abs().max()) / largest
    assert difference <= tolerance, f"{what}: differs by {difference:.1e} of its largest entry"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_code_and_reconstruction_agree_in_eval_mode(case, given, theirs):
    expected = theirs(case.library, case.name)
    sae, _ = build(case, given)
    sae.eval()
    if isinstance(sae.encoder, BatchWide):
        sae.encoder.level.fill_(LEVEL)
        sae.encoder.batches.fill_(1)
    with torch.no_grad():
        code = sae.encode(atoms_and_inputs(case, given)[1])
        assert_close(code.to_dense(LATENTS), expected["code"], EXACT, "code")
        assert_close(sae.decode(code), expected["y_hat"], EXACT, "y_hat")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_code_of_training_agrees(case, given, theirs):
    expected = theirs(case.library, case.name)
    sae, _ = build(case, given)
    code = sae.train().encode(atoms_and_inputs(case, given)[1])
    # Peers that know no difference between the modes give one code.
    assert_close(code.to_dense(LATENTS), expected.get("trained_code", expected["code"]), EXACT, "code")
    if isinstance(sae.encoder, BatchWide):
        # The smallest value that the first batch keeps; theirs is float32.
        assert_close(sae.encoder.level, expected["level"], SINGLE, "level")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradients_agree(case, given, theirs):
    expected = theirs(case.library, case.name)
    sae, parameters = build(case, given)
    atoms, x = atoms_and_inputs(case, given)
    # variance 1: a squared error per token, as theirs.
    objective = Objective(sae, 1.0, AuxSettings(AUX if case.aux else 0.0, D // 2)).train()
    loss, _ = objective(ActivationBatch(x), LatentUsage(given["dead"], torch.zeros(LATENTS)))
    loss.backward()
    if case.loss:
        assert_close(loss.detach(), expected["loss"], case.tolerance, "loss")
    for name in case.gradients:
        grad, wanted = gradient(parameters, name, given), expected[f"grad.{name}"]
        if name == "W_dec" and case.tangent:
            grad, wanted = (g - (g * atoms).sum(-1, keepdim=True) * atoms for g in (grad, wanted))
        assert_close(grad, wanted, case.tolerance, f"gradient of {name}")
        if case.aux and len(grad) == LATENTS:
            # AuxK alone moves the dead, far less than the main term moves the others: by its own measure, too.
            assert_close(grad[given["dead"]], wanted[given["dead"]], case.tolerance, f"gradient of {name}, dead latents")


def test_orthogonal_matching_pursuit_agrees_while_values_stay_positive(given, theirs):
    # Theirs keeps values above zero at every step, ours refits freely and drops negative values at the end. Where no step
    # makes a value negative both are least squares; elsewhere they may go on to choose other atoms.
    expected = theirs("overcomplete", "orthogonal_matching_pursuit")
    atoms, x = F.normalize(given["W_dec"], dim=-1), given["x"] - given["b_dec"]
    positive = torch.ones(TOKENS, dtype=torch.bool)
    for k in range(1, ORTHOGONAL_K + 1):
        code = orthogonal_matching_pursuit(x, atoms, k)
        positive &= code.l0() == k
    assert positive.sum() > TOKENS // 2
    dense = code.to_dense(LATENTS)
    assert_close(dense[positive], expected["code"][positive], 1e-7, "code")
    assert_close((dense @ atoms + given["b_dec"])[positive], expected["y_hat"][positive], 1e-7, "y_hat")


def test_gradient_pursuit_agrees(given, theirs):
    expected = theirs("dictionary_learning", "gradient_pursuit")
    code = gradient_pursuit(given["x"] - given["b_dec"], given["W_dec"], K).to_dense(LATENTS)
    assert_close(code, expected["code"], EXACT, "code")
    assert_close(code @ given["W_dec"] + given["b_dec"], expected["y_hat"], EXACT, "y_hat")


def test_the_cases_reach_what_they_are_for(given, theirs):
    """The weights and inputs above meet the assumptions that the table makes."""
    pre_acts = (given["x"] - given["b_dec"]) @ given["W_enc"].T + given["b_enc"]
    # AuxK: the dead are silent, and each token has enough that are positive for all implementations to select the same.
    assert not theirs("saelens", "topk")["code"][:, given["dead"]].any()
    assert (pre_acts[:, given["dead"]] > 0).sum(1).min() >= D // 2
    # Budgets: every token could spend its own.
    assert (pre_acts > 0).sum(1).min() >= K
    # Batch-wide: tokens differ in how much they got.
    assert len(set((theirs("saelens", "batchtopk")["trained_code"] > 0).sum(1).tolist())) > 2
    # Pursuits: some token took an atom twice; the tolerance stopped some earlier, and some not at all.
    taken = (theirs("saelens", "matching_pursuit")["code"] > 0).sum(1)
    stopped = (theirs("saelens", "matching_pursuit_tolerance")["code"] > 0).sum(1)
    assert taken.min() < PURSUIT_K
    assert (stopped < taken).any()
    assert (stopped == taken).any()
    # JumpReLU: pre-activations lie within the window on both sides of the threshold, which is above its lower half.
    offset = pre_acts - given["threshold"]
    assert ((offset > 0) & (offset < BANDWIDTH / 2)).sum() >= TOKENS // 2
    assert ((offset < 0) & (offset > -BANDWIDTH / 2)).sum() >= TOKENS // 2
    assert given["threshold"].min() > BANDWIDTH / 2
