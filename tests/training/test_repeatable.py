"""Two runs with the same seed and as many threads are the same run, for every encoder."""

import pytest
import torch
from safetensors.torch import load_file

from sparsary.sae import ENCODERS
from sparsary.sae.sparse_code import SparseCode
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe

D, LATENTS, BATCH, STEPS = 17, 67, 2003, 3


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rows():
    torch.manual_seed(5)
    return [(torch.randn(BATCH, D), torch.randn(BATCH, D)) for _ in range(STEPS)]


@pytest.mark.parametrize("name", sorted(ENCODERS))
@pytest.mark.usefixtures("two_threads")
def test_training_on_two_threads_repeats_itself_bit_for_bit(name, recipe_values, encoder_arguments, tmp_path):
    """With so many entries per latent that threads which add to one number meet."""
    arguments = encoder_arguments[name] | ({"k": 19} if "k" in encoder_arguments[name] else {"target_l0": 19})
    recipe_values["dictionary"] |= {"encoder": {"name": name, **arguments}, "n_latents": LATENTS}
    recipe_values |= {"tokens": STEPS * BATCH, "batch_tokens": BATCH, "lr_warmup_steps": 0, "dead_after_tokens": BATCH}
    recipe_values["harvest"]["gradients"] = True
    written = []
    for run in ("first", "second", "third"):
        recipe = check_recipe(recipe_values | {"out_dir": str(tmp_path / run)}, "recipe")
        train_recipe(resolve_recipe(recipe), rows())
        written.append(load_file(tmp_path / run / "state.safetensors"))
    first, *others = written
    assert any(key.startswith("optimizer/") for key in first)
    for other in others:
        assert [key for key in first if not torch.equal(first[key], other[key])] == []


@pytest.mark.usefixtures("two_threads")
def test_matrices_of_codes_repeat_themselves_where_latents_are_repeated():
    torch.manual_seed(6)
    latents, values = torch.randint(0, 3, (40, 2000)), torch.randn(40, 2000)
    code = SparseCode.from_rows(latents, values)
    first, columns = code.to_dense(3), code.columns(torch.tensor([2, 0]))
    for _ in range(5):
        assert torch.equal(code.to_dense(3), first)
        assert torch.equal(code.columns(torch.tensor([2, 0])), columns)
    torch.testing.assert_close(columns, first[:, [2, 0]])
