"""The Triton kernels against plain arithmetic in float64: on a CUDA GPU, and without one in Triton's interpreter.

The tests marked ``gpu`` run on whichever there is. The interpreter has to be chosen before Triton is imported: one ordinary
test runs them all in a process of its own. It is lax about types, so another compiles every kernel for real GPUs.
"""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sparsary.sae import SAE
from sparsary.sae.encoders import ENCODERS
from sparsary.sae.kernels import AdamStep, RowGrad
from sparsary.sae.screen import quantize
from sparsary.sae.sparse_code import SparseCode, bounds, group_by_latent
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.fused_adam import FusedAdam
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.training.optim import DictionaryAdam
from sparsary.training.phases import Phases
from sparsary.training.recipe import check_recipe

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOKENS, LATENTS, D, K = 7, 5, 19, 3
# Of a result's own rounding, and of float32 sums of some dozen numbers around 1.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which the platform does not have")
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_either = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def gpu():
    from sparsary.sae.kernels.gpu import GpuKernels

    return GpuKernels()


@pytest.fixture(params=["as they are", "small"])
def sizes(request, monkeypatch):
    """Block sizes as they are, which hold these shapes whole, or so small that every loop is entered."""
    if request.param == "small":
        for name, size in (("COLUMNS", 16), ("SOME", 2), ("WHOLE_ROW", 16), ("CHUNK", 4)):
            monkeypatch.setattr(f"sparsary.sae.kernels.gpu.{name}", size)
    return request.param


# Codes on which shortcuts break.
def ordinary():
    return torch.stack([torch.randperm(LATENTS)[:K] for _ in range(TOKENS)]).flatten(), torch.arange(0, TOKENS * K, K)


def repeated():
    latents, starts = ordinary()
    latents[: K + 1] = 2
    return latents, starts


def empty_rows():
    latents, starts = ordinary()
    starts[0], starts[5] = 0, starts[6]
    starts[-1] = len(latents)
    return latents, starts


def one_latent_has_all():
    return torch.full((TOKENS * 5,), LATENTS - 1), torch.arange(0, TOKENS * 5, 5)


def no_entries():
    return torch.empty(0, dtype=torch.long), torch.zeros(TOKENS, dtype=torch.long)


CODES = [ordinary, repeated, empty_rows, one_latent_has_all, no_entries]


class Case:
    """A code with some silent entries, rows for its tokens and for its latents, and what they should give, in float64."""

    def __init__(self, make, dtype):
        latents, starts = make()
        values = torch.randn(len(latents)) * (torch.rand(len(latents)) > 0.2)
        self.values, self.x, self.W = (part.to(dtype) for part in (values, torch.randn(TOKENS, D), torch.randn(LATENTS, D)))
        self.latents, self.bounds = latents, bounds(latents, starts)
        code = SparseCode(latents, self.values.double(), starts)
        self.token_ids, self.group, self.dense = code.token_ids(), code.by_latent(LATENTS), code.to_dense(LATENTS)

    def grouped(self):
        """The entries by latent, as kernels take them."""
        return self.group.firsts, self.group.tokens, self.values[self.group.order]

    def gradient(self, written):
        """The spread of ``x`` as a gradient of ``W``, with rows for some latents ``written`` out besides."""
        dense_of = torch.full((LATENTS,), -1)
        some = torch.randperm(LATENTS)[:written]
        dense_of[some] = torch.arange(written)
        dense = torch.randn(written, self.W.shape[1]).to(self.W.dtype)
        parts = RowGrad(*self.grouped(), self.x, dense_of, dense)
        expected = self.dense.T @ self.x.double()
        return here(parts), expected.index_add(0, some, dense.double())


def here(part):
    """The same where the kernels run."""
    if isinstance(part, RowGrad):
        return RowGrad(*map(here, part))
    return part.to(DEVICE)


def assert_near(found, expected, dtype, scale=1.0):
    torch.testing.assert_close(
        found.cpu().double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale, check_dtype=False
    )


def everywhere(test):
    """Over all codes, and all precisions of one."""
    cases = [(make, torch.float32) for make in CODES] + [(repeated, torch.bfloat16), (repeated, torch.float16)]
    return pytest.mark.gpu(on_either(pytest.mark.parametrize(("make", "dtype"), cases)(test)))


@everywhere
def test_decoding_and_its_gradients(gpu, sizes, make, dtype):
    case = Case(make, dtype)
    latents, ends = here(case.latents), here(case.bounds)
    y_hat = gpu.decode(ends, latents, here(case.values), here(case.W))
    to_values = gpu.dots(ends, latents, here(case.x), here(case.W))
    to_atoms = gpu.spread(*map(here, case.grouped()), here(case.x))
    assert y_hat.dtype == to_values.dtype == to_atoms.dtype == dtype
    assert_near(y_hat, case.dense @ case.W.double(), dtype)
    assert_near(to_values, (case.x.double()[case.token_ids] * case.W.double()[case.latents]).sum(1), dtype, scale=4)
    assert_near(to_atoms, case.dense.T @ case.x.double(), dtype, scale=4)


def tangential(gradient, W):
    return gradient - (gradient * W).sum(1, keepdim=True) * W


@everywhere
@pytest.mark.parametrize(("unit", "written"), [(True, 3), (False, 0)])
def test_norms_and_steps(gpu, sizes, make, dtype, unit, written):
    case = Case(make, dtype)
    if unit:
        case.W = torch.nn.functional.normalize(case.W.float(), dim=1).to(dtype)
    parts, gradient = case.gradient(written)
    gradient = tangential(gradient, case.W.double()) if unit else gradient
    assert_near(gpu.squared_norms(here(case.W), unit, parts), gradient.pow(2).sum(1), torch.float32, scale=50)

    mean, square = torch.randn(LATENTS, D).to(dtype), torch.rand(LATENTS, D).to(dtype) + 0.1
    step, factor = AdamStep(0.9, 0.99, 0.01, 1.7, 1e-8), torch.tensor(0.3)
    found = [here(part.clone()) for part in (case.W, mean, square)]
    gpu.adam_(found[0], unit, parts, *found[1:], here(factor), step)
    gradient = gradient * factor.double()
    m = mean.double() * 0.9 + gradient * 0.1
    v = square.double() * 0.99 + gradient.pow(2) * 0.01
    W = case.W.double() - 0.01 * m / (1.7 * v.sqrt() + 1e-8)
    W = torch.nn.functional.normalize(W, dim=1) if unit else W
    for part, expected in zip(found, (W, m, v), strict=True):
        assert_near(part, expected, dtype)


@pytest.mark.gpu
@on_either
def test_a_nan_does_not_go_unseen(gpu):
    case = Case(ordinary, torch.float32)
    case.values[0] = torch.nan
    y_hat = gpu.decode(here(case.bounds), here(case.latents), here(case.values), here(case.W))
    assert y_hat[0].isnan().all()
    assert not y_hat[1:].isnan().any()


@pytest.fixture
def train(gpu, monkeypatch, recipe_values):
    """Trains with the kernels and one of the two optimizers: the weights and moments after two steps."""
    if INTERPRETED:
        for module in ("sparsary.sae.sparse_ops", "sparsary.training.fused_adam"):
            monkeypatch.setattr(f"{module}.backend", lambda *tensors: gpu)

    def train(kind, name, clip):
        torch.manual_seed(1)
        sae = SAE(D, LATENTS, ENCODERS[name](**{"topk": {"k": K}, "relu": {}}[name])).to(DEVICE)
        recipe = check_recipe(recipe_values | {"grad_clip": clip, "lr": 0.01}, "test")
        optimizer = kind(sae, Phases(sae, recipe), recipe)
        # Dead latents bring an auxiliary loss, whose gradients come as rows.
        dead = torch.arange(LATENTS, device=DEVICE) % 3 == 0
        usage = LatentUsage(dead, torch.full((LATENTS,), 0.1, device=DEVICE, dtype=torch.float64))
        objective = Objective(sae, float(D), AuxSettings(1 / 32, 2)).to(DEVICE)
        sae.train()
        for _ in range(2):
            objective(ActivationBatch(torch.randn(11, D).to(DEVICE)), usage)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        moments = [optimizer.state[p][part] for p in sae.parameters() for part in ("exp_avg", "exp_avg_sq")]
        return [*(p.detach() for p in sae.parameters()), *moments]

    return train


# Atoms of norm 1 and free ones.
@pytest.mark.gpu
@on_either
@pytest.mark.parametrize(("name", "clip"), [("topk", 0.003), ("relu", None)])
def test_a_run_with_the_fused_optimizer_is_the_same_run(train, name, clip):
    fused, plain = train(FusedAdam, name, clip), train(DictionaryAdam, name, clip)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * float(b.abs().max()))


@pytest.mark.gpu
@on_gpu
def test_results_repeat_bit_for_bit_and_no_function_waits(gpu):
    latents = torch.cat([torch.randint(0, 1009, (4099 * 15,)), torch.zeros(4099, dtype=torch.long)])
    code = SparseCode.from_rows(latents.view(16, -1).T.contiguous(), torch.randn(4099, 16))
    code = SparseCode(*(part.cuda() for part in (code.latents, code.values, code.starts)))
    x, W = torch.randn(4099, 769, device="cuda"), torch.randn(1009, 769, device="cuda")

    def everything():
        by_latent, ends = code.by_latent(1009), bounds(code.latents, code.starts)
        none = torch.full((1009,), -1, device="cuda"), W[:0]
        grouped = by_latent.firsts, by_latent.tokens, code.values[by_latent.order]
        gradient = RowGrad(*grouped, x, *none)
        moved = [W.clone(), torch.zeros_like(W), torch.zeros_like(W)]
        gpu.adam_(moved[0], True, gradient, *moved[1:], torch.ones((), device="cuda"), AdamStep(0.9, 0.99, 0.1, 1.0, 1e-8))
        found = gpu.decode(ends, code.latents, code.values, W), gpu.dots(ends, code.latents, x, W)
        return [*found, gpu.spread(*grouped, x), gpu.squared_norms(W, True, gradient), *moved]

    first = everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@on_gpu
def test_matrices_of_more_than_2_to_the_31_numbers(gpu):
    rows, d = 2**19 + 3, 4099
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of GPU memory")
    W = torch.zeros(rows, d, dtype=torch.bfloat16, device="cuda")
    W[-1], W[-2] = 1.0, 2.0
    code = SparseCode.from_rows(torch.tensor([[rows - 1, rows - 2]]), torch.tensor([[3.0, 5.0]]))
    code = SparseCode(code.latents.cuda(), code.values.bfloat16().cuda(), code.starts.cuda())
    ends, x = bounds(code.latents, code.starts), torch.ones(1, d, dtype=torch.bfloat16, device="cuda")
    assert gpu.decode(ends, code.latents, code.values, W).eq(13).all()
    assert gpu.dots(ends, code.latents, x, W).tolist() == [4096, 8192]
    by_latent = code.by_latent(rows)
    assert gpu.spread(by_latent.firsts, by_latent.tokens, code.values[by_latent.order], x)[-2:, -1].tolist() == [5, 3]


@pytest.mark.parametrize("make", CODES)
def test_entries_are_grouped_on_gpus_as_by_the_cpu_s_kernel(make, monkeypatch):
    latents, _ = make()
    # The way that tensors on a GPU go.
    monkeypatch.setattr("sparsary.sae.sparse_code.cpu_kernels", lambda: None)
    firsts, order = group_by_latent(latents, LATENTS)
    expected = [(latents == i).nonzero().squeeze(1).tolist() for i in range(LATENTS)]
    assert [order[first:last].tolist() for first, last in itertools.pairwise(firsts)] == expected


def test_rounding_low_precision_to_int8_keeps_the_largest_number_s_sign():
    rows = torch.randn(101, 8).bfloat16()
    levels, scale = quantize(rows)
    # Half a level, and the scale's own rounding.
    assert ((levels.float() * scale.float()[:, None] - rows.float()).abs() <= 1.1 * scale.float()[:, None]).all()


# One process with those, for every kernel and loop in some precision; the other parts together run all.
SAMPLE = [
    "test_decoding_and_its_gradients[small-repeated-dtype1]",
    "test_decoding_and_its_gradients[small-empty_rows-dtype2]",
    "test_decoding_and_its_gradients[as they are-repeated-dtype5]",
    "test_norms_and_steps[small-True-3-repeated-dtype1]",
    "test_norms_and_steps[small-False-0-empty_rows-dtype2]",
    "test_norms_and_steps[as they are-True-3-repeated-dtype5]",
    "test_a_nan_does_not_go_unseen",
]
# What is run, and how many of those need a GPU.
PARTS = {
    "a sample": ([f"{__file__}::{name}" for name in SAMPLE], 0),
    "decoding": (["-k", "test_decoding", __file__], 0),
    "steps": (["-k", "test_norms_and_steps", __file__], 0),
    "the rest": (["-k", "not test_decoding and not test_norms_and_steps", __file__], 2),
}


@needs_triton
@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_in_triton_s_interpreter(part):
    chosen, skipped = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", "-p", "no:cacheprovider", *chosen]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stdout[-5000:]
    assert f"{len(SAMPLE)} passed" in run.stdout if part == "a sample" else " passed" in run.stdout
    # All but those that need a GPU.
    assert (f"{skipped} skipped" in run.stdout) if skipped else "skipped" not in run.stdout, run.stdout[-5000:]


def compiled_for(capability):
    """Stands in for the GPU module's ``_launch``: compiles for GPUs of a capability what is launched, unless that was done."""
    from triton import compile as compile_
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", int: "i32"}
    done = {}

    def launch(kernel, programs, *arguments, num_warps=4, **sizes):
        types = [kinds[a.dtype] if isinstance(a, torch.Tensor) else kinds.get(type(a), "fp32") for a in arguments]
        key = kernel.__name__, *types, *sizes.items(), num_warps
        if key not in done:
            signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(sizes), strict=True))
            options = {"num_warps": num_warps, "enable_fp_fusion": True}
            done[key] = compile_(ASTSource(kernel, signature, sizes), GPUTarget("cuda", capability, 32), options)

    return launch, done


@needs_triton
@pytest.mark.parametrize(("capability", "d", "dtype"), [(80, 4096, torch.bfloat16), (90, 9001, torch.float32)])
def test_the_kernels_compile_for_gpus_that_are_not_here(gpu, monkeypatch, tmp_path, capability, d, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch, done = compiled_for(capability)
    monkeypatch.setattr("sparsary.sae.kernels.gpu._launch", launch)
    tokens, n_latents, k = 8192, 131072, 64
    # Tensors without numbers: a function that asks for one, and so would wait for a GPU, fails.
    meta = torch.device("meta")
    x, W = (torch.empty(rows, d, dtype=dtype, device=meta) for rows in (tokens, n_latents))
    latents, values = torch.empty(tokens * k, dtype=torch.long, device=meta), torch.empty(tokens * k, dtype=dtype, device=meta)
    code = SparseCode.from_rows(latents.view(tokens, k), values.view(tokens, k))
    ends, by_latent = bounds(code.latents, code.starts), code.by_latent(n_latents)
    assert gpu.decode(ends, latents, values, W).shape == x.shape
    assert gpu.dots(ends, latents, x, W).shape == latents.shape
    assert gpu.spread(by_latent.firsts, by_latent.tokens, values, x).shape == W.shape
    gradient = RowGrad(by_latent.firsts, by_latent.tokens, values, x, latents[:n_latents], W[:0])
    for unit in (True, False):
        assert gpu.squared_norms(W, unit, gradient).shape == (n_latents,)
        gpu.adam_(W, unit, gradient, W, W, torch.empty((), device=meta), AdamStep(0.9, 0.99, 0.1, 1.0, 1e-8))
    # Segments are split in spreading and not in decoding; atoms of norm 1 are another kernel.
    assert [key[0] for key in done] == [
        "sum_segments_block", "dots_block", "sum_chunks_block", "sum_segments_block", *("squared_norms_block", "adam_block") * 2
    ]  # fmt: skip
    for binary in done.values():
        assert binary.asm["cubin"]
