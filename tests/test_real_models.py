"""Real checkpoints that are not ours: harvest, train and judge on them. Skipped where they are not at hand."""

import pytest

from sparsary.eval.report.evaluate import evaluate
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe


@pytest.mark.parametrize(("name", "hook"), [("stories3M", "model.layers.3:out"), ("gpt2-stories", "transformer.h.2.mlp:out")])
def test_a_dictionary_of_a_real_model(shared_data, tmp_path, name, hook):
    values = {
        "model": {"id": str(shared_data / "models" / name)},
        "text": {"source": "files", "files": [str(shared_data / "text" / "tinystories_valid.jsonl")]},
        "harvest": {"hooks": [hook], "tokens": 30_000, "store": str(tmp_path / "store"), "heldout": 0.2, "dtype": "int8"},
        "dictionary": {"hook": hook, "n_latents": 512, "encoder": {"name": "topk", "k": 16}},
        "tokens": 60_000,
        "batch_tokens": 1000,
        "lr": 3e-3,
        "lr_warmup_steps": 10,
        "out_dir": str(tmp_path / "run"),
    }
    report = evaluate(str(train_recipe(resolve_recipe(check_recipe(values, "recipe")))), tokens=6000)
    assert report["fvu"] < 0.6
    assert report["ce_clean"] < report["ce_spliced"] < report["ce_zero"]
    assert report["ce_recovered_mean"] > 0.4
