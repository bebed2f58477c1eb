"""Pursuits against their definitions: what is removed, what is orthogonal, what the gradients are."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsary.sae import pursuit
from sparsary.sae.pursuit import (
    descends_by_gram,
    gradient_pursuit,
    gram_is_cheaper,
    matching_pursuit,
    orthogonal_matching_pursuit,
    selected_atoms,
)
from sparsary.sae.sparse_ops import decode

TOKENS, D, LATENTS, K = 13, 11, 31, 7


def plain(patch):
    """From here on as on a machine without the compiler."""
    patch.setattr(pursuit, "has_numba", lambda: False)


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def path(request, monkeypatch):
    """Every test here holds for the compiled loops and without them."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        plain(monkeypatch)
    assert (pursuit._kernels(torch.zeros(1)) is None) == (request.param == "plain")
    return request.param


@pytest.fixture
def compiled_only(path):
    if path == "plain":
        pytest.skip("compares the compiled loops with the plain path")


def problem(tokens=TOKENS, d=D, n_latents=LATENTS, seed=1):
    """Inputs and unit atoms in float64, without structure."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    return x, F.normalize(torch.randn(n_latents, d, generator=generator, dtype=torch.float64), dim=1)


def rows(code):
    """Latents and values, one row per token."""
    return code.latents.view(code.n_tokens, -1), code.values.view(code.n_tokens, -1)


def unrolled(x, atoms, latents, fires):
    """Values and residuals of a pursuit whose selection is given, left to autograd."""
    residuals, values = [x], []
    for latent, fire in zip(latents.T, fires.T, strict=True):
        atom = atoms[latent]
        values.append(torch.where(fire, (atom * residuals[-1]).sum(1), 0))
        residuals.append(residuals[-1] - values[-1][:, None] * atom)
    return torch.stack(values, 1), residuals


def errors(code, x, atoms):
    return (x - decode(code, atoms)).pow(2).sum(1)


# Matching pursuit


@pytest.mark.parametrize("use_gram", [True, False])
def test_each_step_takes_the_best_atom_and_removes_its_component(use_gram):
    # Three blocks of the search for the best, the last one not full.
    x, atoms = problem(n_latents=307)
    latents, values = selected_atoms(x, atoms, K, 0.0, use_gram)
    residual = x
    for latent, value in zip(latents.T, values.T, strict=True):
        best = (residual @ atoms.T).max(1)
        assert torch.equal(latent, best.indices)
        torch.testing.assert_close(value, best.values)
        after = residual - value[:, None] * atoms[latent]
        assert (after.norm(dim=1) < residual.norm(dim=1)).all()
        torch.testing.assert_close((after * atoms[latent]).sum(1), torch.zeros(TOKENS, dtype=x.dtype))
        residual = after


def test_energy_is_split_between_values_and_residual():
    x, atoms = problem()
    code = matching_pursuit(x, atoms, K)
    split = rows(code)[1].pow(2).sum(1) + errors(code, x, atoms)
    torch.testing.assert_close(split, x.pow(2).sum(1))


def test_reconstruction_plus_residual_is_the_input():
    x, atoms = problem()
    code = matching_pursuit(x, atoms, K)
    latents, values = rows(code)
    residual = unrolled(x, atoms, latents, values > 0)[1][-1]
    torch.testing.assert_close(decode(code, atoms) + residual, x)


# 131 latents and 257 tokens fill neither their last block nor their last chunk.
@pytest.mark.parametrize("tolerance", [0.0, 0.6])
def test_gram_equals_naive_in_float32(tolerance):
    x, atoms = (tensor.float() for tensor in problem(tokens=257, n_latents=131))
    (latents, values), (expected_latents, expected_values) = (selected_atoms(x, atoms, K, tolerance, g) for g in (True, False))
    assert torch.equal(latents, expected_latents)
    torch.testing.assert_close(values, expected_values)


def test_gram_of_several_blocks_is_the_product(monkeypatch):
    monkeypatch.setattr(pursuit, "GRAM_BLOCK", 7)
    _, atoms = problem()
    torch.testing.assert_close(pursuit._gram(atoms), atoms @ atoms.T)


@pytest.mark.parametrize("method", [matching_pursuit, orthogonal_matching_pursuit, gradient_pursuit])
def test_chunked_equals_unchunked(method, monkeypatch):
    x, atoms = problem()
    x.requires_grad_()
    atoms.requires_grad_()
    results = []
    for budget in (pursuit.CHUNK_NUMBERS_CPU, 1):
        monkeypatch.setattr(pursuit, "CHUNK_NUMBERS_CPU", budget)
        monkeypatch.setattr(pursuit, "MIN_TOKENS_GRAM", min(budget, 3))
        monkeypatch.setattr(pursuit, "MIN_TOKENS_NAIVE", min(budget, 3))
        code = method(x, atoms, K)
        sent = torch.autograd.grad(code.values.pow(2).sum(), [x, atoms]) if code.values.requires_grad else ()
        results.append([code.latents, code.values, *sent])
    torch.testing.assert_close(results[0], results[1])


def test_an_atom_taken_again_is_another_entry_and_adds_up():
    # The second atom leans away from the first: taking it out brings some of the first back.
    x = torch.tensor([[1.0, 1.0]])
    atoms = torch.tensor([[1.0, 0.0], [-0.6, 0.8]])
    code = matching_pursuit(x, atoms, 3)
    assert code.latents.tolist() == [0, 1, 0]
    torch.testing.assert_close(code.values, torch.tensor([1.0, 0.8, 0.48]))
    torch.testing.assert_close(code.to_dense(2), torch.tensor([[1.48, 0.8]]))
    assert errors(code, x, atoms).item() < errors(matching_pursuit(x, atoms, 2), x, atoms).item()


@pytest.mark.parametrize("method", [matching_pursuit, orthogonal_matching_pursuit])
def test_orthonormal_atoms_give_the_projection_on_the_largest_positive_coordinates(method):
    x, _ = problem()
    atoms = torch.linalg.qr(problem(tokens=D)[0]).Q
    coordinates = (x @ atoms.T).relu()
    for k in (3, D):
        best = coordinates.topk(k, dim=1)
        expected = torch.zeros_like(coordinates).scatter(1, best.indices, best.values)
        code = method(x, atoms, k)
        torch.testing.assert_close(code.to_dense(D), expected)
        assert torch.equal(code.l0(), (expected > 0).sum(1)), "rounding must not fire"


@pytest.mark.parametrize("method", [matching_pursuit, orthogonal_matching_pursuit, gradient_pursuit])
def test_one_step_is_topk_of_one(method):
    x, atoms = problem()
    best = (x @ atoms.T).max(1)
    code = method(x, atoms, 1)
    assert torch.equal(code.latents, best.indices)
    torch.testing.assert_close(code.values, best.values)


@pytest.mark.parametrize("method", [matching_pursuit, orthogonal_matching_pursuit, gradient_pursuit])
def test_more_steps_leave_less_error(method):
    x, atoms = problem()
    by_k = [errors(method(x, atoms, k), x, atoms).mean() for k in range(9)]
    torch.testing.assert_close(by_k[0], x.pow(2).sum(1).mean())
    assert all(after < 0.95 * before for before, after in pairwise(by_k))


@pytest.mark.parametrize("use_gram", [True, False])
@pytest.mark.parametrize("steps", [17, 37])
def test_tolerance_stops_each_token_when_its_own_residual_is_small(use_gram, steps):
    x, atoms = problem()
    x[2] = 3.0 * atoms[5] + 1e-3 * x[2]
    full_latents, full_values = selected_atoms(x, atoms, steps, 0.0, use_gram)
    residuals = unrolled(x, atoms, full_latents, full_values > 0)[1][:-1]
    live = torch.stack([r.norm(dim=1) > 0.3 * x.norm(dim=1) for r in residuals], 1)
    latents, values = selected_atoms(x, atoms, steps, 0.3, use_gram)
    assert live[2].sum() == 1
    assert len(set(live.sum(1).tolist())) > 2
    torch.testing.assert_close(values, full_values.where(live, 0))
    assert torch.equal(latents, full_latents.where(live, 0))


@pytest.mark.parametrize("use_gram", [True, False])
def test_atoms_of_any_norm_are_selected_and_subtracted_with_their_norm(use_gram):
    x, atoms = problem()
    atoms = atoms * torch.linspace(0.7, 1.2, LATENTS, dtype=atoms.dtype)[:, None]
    latents, values = selected_atoms(x, atoms, K, 0.0, use_gram)
    residual = x
    for latent, value in zip(latents.T, values.T, strict=True):
        best = (residual @ atoms.T).max(1)
        assert torch.equal(latent, best.indices)
        torch.testing.assert_close(value, best.values)
        residual = residual - value[:, None] * atoms[latent]
    x.requires_grad_()
    atoms.requires_grad_()
    code = matching_pursuit(x, atoms, K)
    found = torch.autograd.grad(code.values.pow(3).sum(), [x, atoms])
    expected = unrolled(x, atoms, latents, values > 0)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected.pow(3).sum(), [x, atoms]))


def test_gradcheck_of_values_and_reconstruction():
    x, atoms = problem(tokens=3, d=5, n_latents=11)
    # The first token stops early.
    x[0] = 2.0 * atoms[4] + 0.01 * x[0]

    def run(x, atoms):
        code = matching_pursuit(x, atoms, 4, tolerance=0.2)
        return code.values, decode(code, atoms)

    silent = (rows(matching_pursuit(x, atoms, 4, tolerance=0.2))[1] == 0).sum(1)
    assert silent[0] == 3
    assert silent[1:].max() == 0
    assert torch.autograd.gradcheck(run, [x.requires_grad_(), atoms.requires_grad_()])


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_gradients_equal_unrolled_autograd(tolerance):
    # 2 dimensions and 3 atoms: many repeats.
    for d, n_latents in ((D, LATENTS), (2, 3)):
        x, atoms = problem(d=d, n_latents=n_latents)
        x.requires_grad_()
        atoms.requires_grad_()
        latents, values = rows(matching_pursuit(x, atoms, K, tolerance))
        expected, residuals = unrolled(x, atoms, latents, values > 0)
        assert (values == 0).any() == (tolerance > 0 or d == 2)
        weight = torch.randn(TOKENS, K, dtype=x.dtype)
        sent = torch.autograd.grad((values * weight).sum(), [x, atoms])
        torch.testing.assert_close(sent, torch.autograd.grad((expected * weight).sum(), [x, atoms], retain_graph=True))

        # What training minimises: the residual of the last step.
        code = matching_pursuit(x, atoms, K, tolerance)
        sent = torch.autograd.grad(errors(code, x, atoms).sum(), [x, atoms])
        torch.testing.assert_close(sent, torch.autograd.grad(residuals[-1].pow(2).sum(), [x, atoms]))


@pytest.mark.parametrize("method", [matching_pursuit, orthogonal_matching_pursuit, gradient_pursuit])
def test_zero_rows_duplicate_rows_and_no_tokens(method):
    x, atoms = problem()
    x[3], x[5] = 0.0, x[4]
    x.requires_grad_()
    code = method(x, atoms, K)
    assert code.l0()[3] == 0
    latents, values = rows(code)
    assert torch.equal(latents[5], latents[4])
    torch.testing.assert_close(values[5], values[4])
    if values.requires_grad:
        (sent,) = torch.autograd.grad(values.sum(), x)
        assert sent[3].eq(0).all()
        torch.testing.assert_close(sent[5], sent[4])
    empty = method(x[:0], atoms, K)
    assert empty.n_tokens == 0
    assert decode(empty, atoms).shape == (0, D)


def test_low_precision_is_pursued_in_float32():
    x, atoms = (tensor.bfloat16() for tensor in problem())
    with torch.autocast("cpu", torch.bfloat16):
        code = matching_pursuit(x, atoms, K)
    exact = matching_pursuit(x.double(), atoms.double(), K)
    assert code.values.dtype == torch.float32
    assert torch.equal(code.latents, exact.latents)
    torch.testing.assert_close(code.values, exact.values.float(), rtol=1e-5, atol=1e-6)


# Fewer latents than lanes, one round of them and a rest, and whole rounds only.
@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize("n_latents", [19, 131, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [0.0, 0.5])
@pytest.mark.parametrize("use_gram", [True, False])
def test_compiled_equals_plain(n_latents, dtype, tolerance, use_gram):
    # 2 blocks of columns, the last one not full, and more steps than the small dictionary has use for.
    x, atoms = (tensor.to(dtype) for tensor in problem(tokens=53, d=71, n_latents=n_latents))
    x[3], x[5], x[7] = 0.0, x[4], 2.0 * atoms[11]
    x.requires_grad_()
    atoms.requires_grad_()
    found = []
    for has_compiler in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not has_compiler:
                plain(patch)
            latents, values = selected_atoms(x, atoms, 23, tolerance, use_gram)
            code = pursuit._PursuitValues.apply(x, atoms, latents, values)
            weight = torch.linspace(-1.0, 1.0, code.numel(), dtype=dtype).view_as(code)
            found.append([latents, values, *torch.autograd.grad((code * weight).sum(), [x, atoms])])
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] > 0).sum(1).unique().numel() > 2
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-4 if dtype is torch.float32 else 1e-9, atol=1e-5)


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize("use_gram", [True, False])
def test_compiled_gradient_pursuit_equals_plain(use_gram, monkeypatch):
    monkeypatch.setattr(pursuit, "descends_by_gram", lambda *_: use_gram)
    x, atoms = (tensor.float() for tensor in problem(tokens=53, d=71, n_latents=131))
    x[3], x[5] = 0.0, x[4]
    found = []
    for has_compiler in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not has_compiler:
                plain(patch)
            code = gradient_pursuit(x, atoms, torch.arange(53) % 6)
            found.append((code.l0(), code.to_dense(131)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [matching_pursuit, orthogonal_matching_pursuit, gradient_pursuit])
@pytest.mark.parametrize("k", [1, 5])
def test_ties_go_to_the_lowest_latent(method, k):
    # 5 directions, each many times over, in all lanes and beyond the last round; small whole numbers have no rounding.
    which = torch.randint(5, (401,))
    atoms, x = torch.eye(5)[which], torch.rand(TOKENS, 5).argsort(1) + 1.0
    first = torch.stack([(which == direction).nonzero()[0, 0] for direction in range(5)])
    latents, values = rows(method(x, atoms, k))
    assert torch.equal(latents, first[x.argsort(1, descending=True)[:, :k]])
    if method is not gradient_pursuit:
        assert torch.equal(values, x.sort(1, descending=True).values[:, :k])


def test_a_token_that_is_no_number_is_silent_and_alone():
    x, atoms = problem()
    expected = matching_pursuit(x, atoms, K).to_dense(LATENTS)
    x[3], expected[3] = torch.nan, 0.0
    torch.testing.assert_close(matching_pursuit(x, atoms, K).to_dense(LATENTS), expected)


@pytest.mark.usefixtures("compiled_only")
def test_gradients_are_the_same_for_every_number_of_threads(monkeypatch):
    x, atoms = problem(tokens=101, d=257)
    latents, values = selected_atoms(x, atoms, K, 0.0, True)
    dv, found = torch.randn_like(values), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(pursuit._back_compiled(pursuit._kernels(x), x, atoms, latents, values, dv))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_memory_of_the_gram_matrix_is_used_again_where_it_fits():
    _, atoms = problem(n_latents=37)
    with torch.inference_mode():
        pursuit._gram(atoms)
    first = pursuit._gram(atoms)
    torch.testing.assert_close(first, atoms @ atoms.T)
    assert pursuit._gram(atoms.flip(0)).data_ptr() == first.data_ptr()
    torch.testing.assert_close(first, atoms.flip(0) @ atoms.flip(0).T)
    assert pursuit._gram(atoms.float()).dtype == torch.float32


def test_loops_are_compiled_for_float_tensors_on_the_cpu_only():
    assert pursuit._kernels(torch.zeros(1, device="meta")) is None
    assert pursuit._kernels(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)) is None


def test_cost_model_counts_tokens_and_memory():
    assert gram_is_cheaper(2048, 512, 4096, 32)
    assert not gram_is_cheaper(16, 512, 16384, 4)
    # One step needs no updates; a million tokens would pay for any matrix that fits.
    assert not gram_is_cheaper(2048, 512, 4096, 1)
    assert gram_is_cheaper(2**20, 512, 16384, 32)
    assert not gram_is_cheaper(2**20, 512, 16384, 32, bytes_per_number=8)
    # Gradient pursuit needs more rows at every step.
    assert descends_by_gram(2048, 512, 4096, 32)
    assert gram_is_cheaper(2**20, 64, 4096, 128)
    assert not descends_by_gram(2**20, 64, 4096, 128)


# Orthogonal matching pursuit


def lengthened(atoms):
    return atoms * torch.linspace(0.3, 3.0, atoms.shape[0], dtype=atoms.dtype)[:, None]


@pytest.mark.parametrize("seed", range(5))
def test_orthogonal_values_are_least_squares_on_their_support(seed):
    x, atoms = problem(seed=seed)
    atoms = lengthened(atoms)
    code = orthogonal_matching_pursuit(x, atoms, K)
    residual = x - decode(code, atoms)
    for token, (latents, values) in enumerate(zip(*rows(code), strict=True)):
        support = latents[values > 0]
        assert len(support.unique()) == len(support) >= 1
        torch.testing.assert_close(atoms[support] @ residual[token], torch.zeros(len(support), dtype=x.dtype))
        brute, *_ = np.linalg.lstsq(atoms[support].T.numpy(), x[token].numpy())
        torch.testing.assert_close(values[values > 0], torch.from_numpy(brute))


def test_orthogonal_selection_is_the_textbook_one():
    x, atoms = problem()
    latents, _ = rows(orthogonal_matching_pursuit(x, lengthened(atoms), 4))
    for token in range(TOKENS):
        support, residual = [], x[token]
        for _ in range(4):
            support.append(int((atoms @ residual).argmax()))
            chosen = atoms[support].T
            residual = x[token] - chosen @ torch.linalg.lstsq(chosen, x[token, :, None]).solution[:, 0]
        assert latents[token].tolist() == support


def test_orthogonal_error_is_at_most_that_of_matching_pursuit():
    x, atoms = problem(tokens=101)
    for k in range(1, 5):
        plain, orthogonal = (errors(f(x, atoms, k), x, atoms) for f in (matching_pursuit, orthogonal_matching_pursuit))
        assert orthogonal.mean() <= plain.mean() + 1e-12
        assert (orthogonal <= plain + 1e-12).float().mean() > 0.9


def test_a_value_that_turns_negative_is_dropped_and_the_rest_refitted():
    # What lies between the two axes is taken first; with both of them there it is left with a part it should not have.
    atoms = torch.tensor([[1.0, 1.0, 0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double()
    x = torch.tensor([[1.3, 1.0, -0.05], [1.3, 1.0, 0.05]]).double()
    unsigned = torch.linalg.solve(atoms.T, x.T).T
    assert unsigned[0, 0] < 0 < unsigned.min(1).values[1]
    code = orthogonal_matching_pursuit(x, atoms, 3)
    assert rows(code)[0].tolist() == [[0, 1, 2], [0, 1, 2]]
    expected = torch.stack([torch.tensor([0.0, 1.3, 1.0]).double(), unsigned[1]])
    torch.testing.assert_close(code.to_dense(3), expected)


def test_orthogonal_pursuit_stops_at_the_tolerance_and_when_nothing_is_left():
    x, atoms = problem()
    x[2] = 3.0 * atoms[5] + 1e-3 * x[2]
    assert orthogonal_matching_pursuit(x, atoms, K, tolerance=0.3).l0()[2] == 1
    code = orthogonal_matching_pursuit(torch.cat([x, atoms[:1]]), torch.cat([atoms, torch.zeros_like(atoms)]), 3 * D)
    assert code.l0().max() <= D
    assert code.l0()[-1] == 1
    assert code.values.isfinite().all()
    assert (code.latents < LATENTS).all()


def test_nearly_equal_atoms_are_not_combined():
    # In float32 their products would be singular.
    x, centres = problem(n_latents=5)
    atoms = centres.repeat(6, 1) + 1e-4 * problem(tokens=30, seed=2)[0]
    code = orthogonal_matching_pursuit(x.float(), atoms.float(), D)
    assert code.l0().max() <= 5
    assert code.values.max() < 10 * x.norm(dim=1).max()


# Gradient pursuit


def reference_gradient_pursuit(x, atoms, steps):
    """One token, dense, straight from the definition."""
    z, support = torch.zeros(atoms.shape[0], dtype=x.dtype), torch.zeros(atoms.shape[0], dtype=torch.bool)
    for _ in range(steps):
        residual = x - z @ atoms
        gradient = atoms @ residual
        support[gradient.argmax()] = True
        gradient = gradient * support
        moved = gradient @ atoms
        z = (z + (moved @ residual) / (moved @ moved) * gradient).relu()
    return z


@pytest.mark.parametrize("use_gram", [True, False])
@pytest.mark.parametrize(("d", "n_latents"), [(D, LATENTS), (3, 7), (D, 307)])
def test_gradient_pursuit_is_its_definition_with_a_budget_per_token(d, n_latents, use_gram, monkeypatch):
    monkeypatch.setattr(pursuit, "descends_by_gram", lambda *_: use_gram)
    x, atoms = problem(d=d, n_latents=n_latents)
    atoms = lengthened(atoms)
    budgets = torch.arange(TOKENS) % 6
    code = gradient_pursuit(x, atoms, budgets)
    dense = code.to_dense(n_latents)
    for token in range(TOKENS):
        torch.testing.assert_close(dense[token], reference_gradient_pursuit(x[token], atoms, int(budgets[token])))
    assert (code.l0() <= budgets).all()
    assert torch.equal(gradient_pursuit(x, atoms, 4).values, gradient_pursuit(x, atoms, torch.full((TOKENS,), 4)).values)


def test_gradient_pursuit_clips_at_zero():
    # As for orthogonal matching pursuit: the atom taken first ends superfluous.
    atoms = torch.tensor([[1.0, 1.0, 0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double()
    x = torch.tensor([[1.3, 1.0, -0.05]]).double()
    dense = gradient_pursuit(x, atoms, 101).to_dense(3)
    torch.testing.assert_close(dense[0], reference_gradient_pursuit(x[0], atoms, 101))
    torch.testing.assert_close(dense, torch.tensor([[0.0, 1.3, 1.0]]).double(), rtol=0, atol=0.01)


def test_gradient_pursuit_names_an_atom_once():
    # Two atoms that oppose each other in part need many steps, all on the same support.
    x = torch.tensor([[1.0, 1.0]]).double()
    atoms = torch.tensor([[1.0, 0.0], [-0.6, 0.8]]).double()
    code = gradient_pursuit(x, atoms, 19)
    assert code.l0().item() == 2
    assert (code.values > 0).sum() == 2
    assert errors(code, x, atoms).item() < 1e-6


def test_gradient_pursuit_with_nothing_to_gain_is_silent():
    atoms = torch.eye(3)
    # Orthogonal to all atoms, against all atoms, and explained exactly after one step.
    x = torch.tensor([[0.0, 0.0, 0.0, 1.0], [-1.0, -1.0, -1.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    code = gradient_pursuit(x, F.pad(atoms, (0, 1)), 5)
    assert code.values.isfinite().all()
    assert code.to_dense(3).tolist() == [[0, 0, 0], [0, 0, 0], [2, 0, 0]]
