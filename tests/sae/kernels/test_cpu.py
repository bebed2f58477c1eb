"""Every compiled loop against numpy or torch, on what shortcuts break on; and the threads that share a loop's rows."""

import importlib.util
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("numba")

from sparsary.sae.kernels import AdamStep, RowGrad, backend
from sparsary.sae.kernels import numba_loops as loops
from sparsary.sae.kernels.cpu import CpuKernels
from sparsary.sae.kernels.parallel import loops_together, over_rows
from sparsary.sae.sparse_code import ByLatent, SparseCode, bounds

cpu = CpuKernels()
TOKENS, D, LATENTS = 13, 7, 29
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
# Around a block and four rounds of the lanes of the first bound.
WIDTHS = [1, 2, 31, 63, 64, 65, 127, 128, 129, 200, 300]


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


def close(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    tolerance = TOLERANCE[found.dtype] * scale
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def code_of(counts: list[int], n_latents: int, dtype: torch.dtype) -> SparseCode:
    """Random entries, so many for each token; latents repeat."""
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
    values = torch.randn(sum(counts), dtype=dtype)
    values[::5] = 0
    return SparseCode(torch.randint(n_latents, (sum(counts),)), values, starts)


CODES = {
    "ordinary": [3] * TOKENS,
    "ragged with empty rows": [0, 0, 5, 1, 0, 40, 0],
    "one row": [4],
    "no entries": [0, 0, 0],
    "no tokens": [],
    "more rows than a part": [2] * 71,
}


@pytest.fixture(params=sorted(CODES))
def code(request, dtype):
    return code_of(CODES[request.param], LATENTS, dtype)


# Sums over entries.


@pytest.mark.parametrize("d", [1, D, 67])
def test_decode_is_the_dense_product(code, dtype, d):
    atoms = torch.randn(LATENTS, d, dtype=dtype)
    found = cpu.decode(bounds(code.latents, code.starts), code.latents, code.values, atoms)
    close(found, code.to_dense(LATENTS) @ atoms, 10)


@pytest.mark.parametrize("d", [1, D, 67])
def test_dots_are_entries_of_the_dense_product(code, dtype, d):
    left, rows = torch.randn(code.n_tokens, d, dtype=dtype), torch.randn(LATENTS, d, dtype=dtype)
    found = cpu.dots(bounds(code.latents, code.starts), code.latents, left, rows)
    close(found, (left @ rows.T)[code.token_ids(), code.latents], 10)


def test_groups_list_every_place_once_by_key_and_in_order(code):
    firsts, order = cpu.group(code.latents, LATENTS)
    assert order.tolist() == code.latents.argsort(stable=True).tolist()
    assert firsts.tolist() == [0, *torch.bincount(code.latents, minlength=LATENTS).cumsum(0).tolist()]


def test_spread_is_the_transposed_product(code, dtype):
    rows = torch.randn(code.n_tokens, D, dtype=dtype)
    group = code.by_latent(LATENTS)
    close(cpu.spread(group.firsts, group.tokens, code.values[group.order], rows), code.to_dense(LATENTS).T @ rows, 10)


def test_infinite_numbers_stay_infinite(dtype):
    latents, starts = torch.tensor([0, 1]), torch.tensor([0])
    left, rows = torch.tensor([[torch.inf, 1.0]], dtype=dtype), torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=dtype)
    assert cpu.dots(bounds(latents, starts), latents, left, rows).tolist() == [torch.inf, -torch.inf]
    values = torch.tensor([torch.inf, 1.0], dtype=dtype)
    assert cpu.decode(bounds(latents, starts), latents, values, rows).tolist() == [[torch.inf, torch.inf]]


@pytest.mark.parametrize("where", ["values", "atoms"])
def test_nan_in_an_entry_that_counts_reaches_its_token_and_no_other(dtype, where):
    latents, starts = torch.tensor([0, 1, 1]), torch.tensor([0, 2])
    values, atoms = torch.ones(3, dtype=dtype), torch.ones(2, D, dtype=dtype)
    (values if where == "values" else atoms)[0] = torch.nan
    found = cpu.decode(bounds(latents, starts), latents, values, atoms)
    assert found.isnan().all(1).tolist() == [True, False]


# Gradients of rows, and Adam.


@pytest.fixture(params=["none", "some", "all"])
def gradient(request, code, dtype):
    """A gradient made of a code's entries and of written rows for no, some or all latents; and the same written out."""
    rows = torch.randn(code.n_tokens, D, dtype=dtype)
    count = {"none": 0, "some": 5, "all": LATENTS}[request.param]
    dense, dense_of = torch.randn(count, D, dtype=dtype), torch.full((LATENTS,), -1)
    dense_of[torch.randperm(LATENTS)[:count]] = torch.arange(count)
    group = code.by_latent(LATENTS)
    whole = code.to_dense(LATENTS).T @ rows
    whole[dense_of >= 0] += dense[dense_of[dense_of >= 0]]
    return RowGrad(group.firsts, group.tokens, code.values[group.order], rows, dense_of, dense), whole


def tangential(whole: Tensor, weights: Tensor, unit: bool) -> Tensor:
    return whole - (whole * weights).sum(1, keepdim=True) * weights if unit else whole


@pytest.mark.parametrize("unit", [True, False])
def test_squared_norms_are_those_of_the_gradient_s_tangential_rows(gradient, dtype, unit):
    entries, whole = gradient
    weights = F.normalize(torch.randn(LATENTS, D, dtype=dtype), dim=-1)
    close(cpu.squared_norms(weights, unit, entries), tangential(whole, weights, unit).pow(2).sum(1), 100)


@pytest.mark.parametrize("unit", [True, False])
def test_adam_is_torch_s_adam_on_the_written_gradient(gradient, dtype, unit):
    entries, whole = gradient
    weights = F.normalize(torch.randn(LATENTS, D, dtype=dtype), dim=-1)
    mean, square = torch.randn(LATENTS, D, dtype=dtype), torch.rand(LATENTS, D, dtype=dtype)
    expected = torch.nn.Parameter(weights.clone())
    adam = torch.optim.Adam([expected], lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    # torch counts the step before it takes it.
    adam.state[expected] = {"step": torch.tensor(6.0), "exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
    expected.grad = tangential(whole, weights, unit) * 0.5
    adam.step()
    step = AdamStep(0.9, 0.999, 0.01 / (1 - 0.9**7), (1 - 0.999**7) ** -0.5, 1e-8)
    cpu.adam_(weights, unit, entries, mean, square, torch.tensor(0.5), step)
    close(weights, F.normalize(expected.detach(), dim=-1) if unit else expected.detach(), 10)
    close(mean, adam.state[expected]["exp_avg"], 10)
    close(square, adam.state[expected]["exp_avg_sq"], 10)
    if unit:
        close(weights.norm(dim=1), torch.ones(LATENTS, dtype=dtype))


def test_a_row_of_zeros_stays_finite_under_adam(dtype):
    none = SparseCode(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=dtype), torch.zeros(2, dtype=torch.long))
    group, rows = none.by_latent(3), torch.ones(2, D, dtype=dtype)
    entries = RowGrad(group.firsts, group.tokens, none.values, rows, torch.full((3,), -1), rows[:0])
    weights, mean, square = (torch.zeros(3, D, dtype=dtype) for _ in range(3))
    cpu.adam_(weights, True, entries, mean, square, torch.tensor(1.0), AdamStep(0.9, 0.999, 0.01, 1.0, 1e-8))
    assert not weights.any()


# The largest of every row.


def kept(scores: Tensor, k: int, tile: int) -> tuple[Tensor, Tensor]:
    """What ``keep_largest_`` keeps, and that it writes nowhere else."""
    rows = len(scores)
    values, latents = torch.full((rows + 2, k), -torch.inf, dtype=scores.dtype), torch.zeros(rows + 2, k, dtype=torch.long)
    for first in range(0, scores.shape[1], tile):
        part = scores[:, first : first + tile].contiguous()
        cpu.keep_largest_(part, first, values[1:-1], latents[1:-1])
    assert (values[[0, -1]] == -torch.inf).all()
    assert not latents[[0, -1]].any()
    return values[1:-1], latents[1:-1]


SCORES = {
    "distinct": lambda *shape: torch.rand(shape[0] * shape[1]).argsort().view(shape).to(torch.float64) - shape[1],
    "ties": lambda *shape: torch.randint(-2, 3, shape).double(),
    "all equal": lambda *shape: torch.full(shape, 0.25).double(),
    "all zero": lambda *shape: torch.zeros(shape).double(),
    "negative": lambda *shape: -torch.rand(shape).double() - 1,
    "huge": lambda *shape: 1e38 * torch.randn(shape).double().clamp(-3, 3),
    "tiny": lambda *shape: 1e-40 * torch.randn(shape).double(),
    "rising": lambda *shape: torch.arange(shape[1]).double().expand(shape).contiguous(),
    "falling": lambda *shape: -torch.arange(shape[1]).double().expand(shape).contiguous(),
    "few finite": lambda *shape: torch.randn(shape).double().where(torch.rand(shape) < 0.1, -torch.inf),
    "some infinite": lambda *shape: torch.randn(shape).double().where(torch.rand(shape) < 0.8, torch.inf),
}


@pytest.mark.parametrize("kind", sorted(SCORES))
def test_the_largest_of_every_row_are_kept(kind, dtype):
    for width in WIDTHS:
        for k in sorted({1, 2, 5, 33, width}):
            # By one tile, by tiles smaller than k, and by a last tile that is narrower.
            for tile in {width, max(1, width // 3), 64}:
                scores = SCORES[kind](TOKENS, width).to(dtype)
                values, latents = kept(scores, min(k, width), tile)
                assert torch.equal(values.sort(1).values, scores.topk(min(k, width)).values.sort(1).values), (width, k, tile)
                taken = values > -torch.inf
                assert torch.equal(scores.gather(1, latents)[taken], values[taken])
                # No latent twice: places hold a mark of their own where nothing was taken.
                marked = latents.where(taken, -1 - torch.arange(values.shape[1])).sort(1).values
                assert (marked.diff() != 0).all()


def test_among_equal_scores_those_kept_first_stay(dtype):
    scores = torch.zeros(3, 150, dtype=dtype)
    for tile in (150, 64, 7):
        assert kept(scores, 5, tile)[1].sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("width", [5, 64, 130, 513])
@pytest.mark.parametrize("k", [1, 3, 33])
def test_one_nan_makes_its_row_nan_wherever_it_stands_and_no_other(width, k, dtype):
    for tile in (width, 70):
        scores = torch.randn(3, width, dtype=dtype)
        # In wide rows around every border, and some others.
        for place in range(width) if width < 200 else sorted({*range(0, width, 7), 69, 70, 71, 139, 141, 511, 512}):
            with_nan = scores.clone()
            with_nan[1, place] = torch.nan
            values, latents = kept(with_nan, min(k, width), tile)
            assert values[1].isnan().any(), (place, tile)
            assert torch.equal(values[::2].sort(1).values, scores[::2].topk(min(k, width)).values.sort(1).values)
            assert ((latents >= 0) & (latents < width)).all()


def test_many_nan_write_nowhere_else(dtype):
    for trial in range(200):
        width = 1 + 37 * trial % 307
        k = 1 + trial % min(width, 40)
        scores = torch.randn(TOKENS, width, dtype=dtype)
        scores[torch.rand(scores.shape) < trial / 200] = torch.nan
        values, _ = kept(scores, k, width)
        assert torch.equal(values.isnan().any(1), scores.isnan().any(1))


def test_denormal_numbers_flushed_to_zero_lose_no_row(dtype):
    assert torch.set_flush_denormal(True)
    try:
        values, latents = kept(torch.zeros(3, 150, dtype=dtype), 5, 150)
    finally:
        torch.set_flush_denormal(False)
    assert not values.any()
    assert latents.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal", "negative", "some infinite"])
def test_ragged_rows_keep_as_many_as_they_have_room_for(kind, dtype):
    for width in WIDTHS:
        scores = SCORES[kind](LATENTS, width).to(dtype)
        room = torch.randint(0, min(width, 70) + 1, (LATENTS,))
        room[:3] = torch.tensor([0, min(width, 70), 1])
        values, columns = cpu.keep_largest_ragged(scores, room)
        assert len(values) == int(room.sum())
        for row, some, where in zip(scores, values.split(room.tolist()), columns.split(room.tolist()), strict=True):
            assert torch.equal(some.sort().values, row.topk(len(some)).values.sort().values)
            assert torch.equal(row[where], some)
            assert len(where.unique()) == len(where)


def test_ragged_rows_without_any_room(dtype):
    values, columns = cpu.keep_largest_ragged(torch.randn(5, 9, dtype=dtype), torch.zeros(5, dtype=torch.long))
    assert len(values) == len(columns) == 0


def test_one_nan_makes_its_ragged_row_nan_and_no_other(dtype):
    room = torch.tensor([2, 3, 1])
    scores = torch.randn(3, 130, dtype=dtype)
    for place in range(130):
        with_nan = scores.clone()
        with_nan[1, place] = torch.nan
        values, _ = cpu.keep_largest_ragged(with_nan, room)
        assert values[2:5].isnan().any(), place
        assert values[5] == scores[2].max()
        assert torch.equal(values[:2].sort().values, scores[0].topk(2).values.sort().values)


@pytest.mark.parametrize("nan", [False, True])
def test_everything_above_a_cut_is_found_in_order(nan, dtype):
    for width in WIDTHS:
        scores = torch.randint(-3, 4, (TOKENS, width)).to(dtype)
        scores[3], scores[4] = -9, torch.inf
        cut = torch.randint(-3, 4, (width,)).to(dtype)
        if nan:
            # Nothing is above NaN, and NaN is above nothing: counting and collecting have to agree on it.
            scores[torch.rand(scores.shape) < 0.2] = torch.nan
            cut[::7] = torch.nan
        counts, values, latents = cpu.above(scores, cut, 100)
        token, column = (scores > cut).nonzero(as_tuple=True)
        assert counts.tolist() == torch.bincount(token, minlength=TOKENS).tolist()
        assert torch.equal(values, scores[token, column])
        assert torch.equal(latents, column + 100)


def test_no_rows_and_one_row(dtype):
    counts, values, latents = cpu.above(torch.empty(0, 5, dtype=dtype), torch.zeros(5, dtype=dtype), 0)
    assert len(counts) == len(values) == len(latents) == 0
    values, latents = kept(torch.empty(0, 70, dtype=dtype), 3, 70)
    assert values.shape == latents.shape == (0, 3)
    assert kept(torch.ones(1, 1, dtype=dtype), 1, 1)[0].tolist() == [[1.0]]


# The screen's arithmetic.


def test_quantized_rows_give_the_original_to_half_a_level(dtype):
    rows = torch.randn(TOKENS, D, dtype=dtype) * torch.logspace(-20, 20, TOKENS, dtype=dtype)[:, None]
    rows[2] = 0
    rows[3] = 1e-42
    coarse, scale = cpu.quantize(rows, 127, 1e-30)
    assert coarse.dtype == torch.int8
    assert (coarse[torch.arange(TOKENS) != 3].abs().amax(1) == torch.tensor([127, 127, 0] + [127] * (TOKENS - 4))).all()
    assert ((coarse * scale[:, None] - rows).abs() <= scale[:, None] * 0.5001).all()
    assert torch.isfinite(1 / scale).all()


def test_rescaled_products_are_scores_over_the_token_s_scale(dtype):
    product = torch.randint(-(10**6), 10**6, (TOKENS, LATENTS), dtype=torch.int32)
    scale, token_scale, shift = (torch.rand(n, dtype=dtype) + 0.1 for n in (LATENTS, TOKENS, LATENTS))
    out = torch.empty(TOKENS, LATENTS, dtype=dtype)
    cpu.rescale_(product, scale, token_scale, shift, out)
    expected = (product.double() * scale * token_scale[:, None] + shift) / token_scale[:, None]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


# Threads.


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything() -> list[Tensor]:
    """One result of every kernel that shares out rows, on more rows than one part has."""
    generator = torch.Generator().manual_seed(5)
    rows, d, n = 331, D, 211

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = torch.randint(n, (rows, 3), generator=generator)
    code = SparseCode.from_rows(latents, randn(rows, 3))
    ends, group = bounds(code.latents, code.starts), code.by_latent(n)
    x, W, scores, cut = randn(rows, d), F.normalize(randn(n, d), dim=-1), randn(rows, n), randn(n)
    gradient = RowGrad(group.firsts, group.tokens, code.values[group.order], x, torch.full((n,), -1), x[:0])
    best, names = torch.full((rows, 5), -torch.inf), torch.zeros(rows, 5, dtype=torch.long)
    cpu.keep_largest_(scores, 0, best, names)
    room = torch.randint(0, 9, (rows,), generator=generator)
    moved, mean, square = W.clone(), randn(n, d), randn(n, d).abs()
    cpu.adam_(moved, True, gradient, mean, square, torch.tensor(1.0), AdamStep(0.9, 0.999, 0.01, 1.0, 1e-8))
    coarse, scale = cpu.quantize(x, 127, 1e-30)
    out = torch.empty(rows, n)
    cpu.rescale_(scores.mul(1000).int(), cut.abs(), scale, cut, out)
    return [
        cpu.decode(ends, code.latents, code.values, W),
        cpu.dots(ends, code.latents, x, W),
        cpu.spread(group.firsts, group.tokens, code.values[group.order], x),
        cpu.squared_norms(W, True, gradient),
        *(moved, mean, square, best, names, coarse, scale, out),
        *cpu.keep_largest_ragged(scores, room),
        *cpu.above(scores, cut, 0),
    ]


def test_results_do_not_depend_on_the_number_of_threads(threads):
    threads(1)
    alone = everything()
    for number in (2, 3):
        threads(number)
        assert all(torch.equal(a, b) for a, b in zip(everything(), alone, strict=True))


def test_kernels_may_be_entered_from_several_threads_at_once(threads):
    threads(2)
    expected, found = everything(), []

    def work() -> None:
        found.extend(everything() for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 15
    assert all(torch.equal(a, b) for results in found for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("at_fault", [0, 96])
def test_what_a_kernel_raises_reaches_its_caller(threads, number, at_fault):
    threads(number)

    def kernel(first: int, last: int) -> None:
        if first <= at_fault < last:
            raise ZeroDivisionError("in a kernel")

    with pytest.raises(ZeroDivisionError, match="in a kernel"):
        over_rows(kernel, 97)
    # The threads are there for the next one.
    over_rows(lambda first, last: None, 97)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("least", [1, 10])
def test_every_row_is_worked_on_once(threads, number, least):
    threads(number)
    for rows in (0, 1, 2, 11, 97):
        times, parts = torch.zeros(rows), []

        def kernel(first: int, last: int, times=times, parts=parts) -> None:
            assert 0 <= first <= last <= len(times)
            times[first:last] += 1
            parts.append(last - first)

        over_rows(kernel, rows, least=least)
        assert (times == 1).all()
        assert all(part >= min(least, rows) or sum(parts) == rows for part in parts)


@pytest.mark.parametrize("number", [1, 3])
def test_loops_put_off_run_at_the_end_of_the_block_each_row_once(threads, number):
    threads(number)
    times = [torch.zeros(rows) for rows in (97, 0, 1, 40)]

    def kernel(first: int, last: int, counts: np.ndarray) -> None:
        counts[first:last] += 1

    with loops_together():
        for each in times:
            over_rows(kernel, len(each), each)
        with loops_together():
            over_rows(kernel, 40, times[3][:])
        assert not any(each.any() for each in times)
    assert [each.unique().tolist() for each in times] == [[1], [], [1], [2]]
    over_rows(kernel, 97, times[0])
    assert (times[0] == 2).all()


def test_a_block_that_fails_runs_none_of_its_loops_and_puts_off_no_later_ones():
    done = []

    def fails() -> None:
        with loops_together():
            over_rows(lambda first, last: done.append("put off"), 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    over_rows(lambda first, last: done.append("later"), 3)
    assert done == ["later"]


@pytest.mark.parametrize("fails", [False, True])
def test_other_threads_are_waited_for_and_what_they_raise_reaches_the_caller(threads, fails):
    threads(3)
    caller, done, begun = threading.current_thread(), torch.zeros(97), threading.Event()

    def kernel(first: int, last: int) -> None:
        if threading.current_thread() is caller:
            # Leaves a part to the others.
            assert begun.wait(600)
        else:
            begun.set()
            time.sleep(0.05)
            if fails:
                raise ZeroDivisionError("in another thread")
        done[first:last] += 1

    if fails:
        with pytest.raises(ZeroDivisionError, match="in another thread"):
            over_rows(kernel, 97)
    else:
        over_rows(kernel, 97)
        assert (done == 1).all()


FORK = """
import os, signal, torch
torch.set_num_threads(2)
from sparsary.sae.kernels.cpu import CpuKernels
cpu = CpuKernels()
latents = torch.arange(400) % 7
ends = torch.arange(0, 401, 4)
values, atoms = torch.ones(400), torch.randn(7, 5)
before = cpu.decode(ends, latents, values, atoms)
child = os.fork()
if not child:
    signal.alarm(30)
    same = torch.equal(cpu.decode(ends, latents, values, atoms), before)
    os._exit(0 if same else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(cpu.decode(ends, latents, values, atoms), before)
"""


def test_after_a_fork_the_child_has_threads_of_its_own():
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", FORK], cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


# Which kernels.


@pytest.mark.parametrize("name", ["numba_loops", "permuting", "pursuit", "reading", "storing"])
def test_kernels_compile_where_nothing_can_be_written(name, monkeypatch):
    """A read-only installation without a home: numba refuses to cache, and so to compile."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    path = Path(loops.__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{loops.__package__}.{name}_without_a_cache", path)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    if name != "numba_loops":
        return
    firsts, order = torch.zeros(4, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    again.group_loop(torch.tensor([1, 0, 1]).numpy(), firsts.numpy(), order.numpy())
    assert order.tolist() == [1, 0, 2]


def test_kernels_are_for_contiguous_tensors_of_one_dtype_they_know():
    a = torch.randn(4, 6)
    assert isinstance(backend(a, a), CpuKernels)
    assert backend(a.T) is None
    assert backend(a, a.double()) is None
    assert backend(a.bfloat16()) is None
    assert backend(a.to("meta")) is None


def test_grouped_entries_know_their_tokens(code):
    group = code.by_latent(LATENTS)
    assert isinstance(group, ByLatent)
    assert torch.equal(group.tokens, code.token_ids()[group.order])
