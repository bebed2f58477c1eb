"""A text that cannot be loaded is reported before the language model is loaded, by every command that reads text."""

import json

import pytest
import torch

from sparsary.eval.checkpoint import open_checkpoint, thresholds_of
from sparsary.eval.features.run import Explainer, features
from sparsary.eval.probing.run import probe
from sparsary.eval.report.evaluate import evaluate
from sparsary.eval.report.stack import evaluate_stack
from sparsary.sae import ENCODERS, SAE
from sparsary.training.recipe import HarvestSection, TextSection

HOOK = "transformer.h.2:out"
HUB = {"source": "hub", "dataset": "some/set"}


class ModelLoadedError(Exception):
    pass


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def loaded(*_):
        raise ModelLoadedError

    for place in ("heldout", "features.run", "probing.run"):
        monkeypatch.setattr(f"sparsary.eval.{place}.load_model", loaded)


@pytest.fixture
def offline(monkeypatch):
    import datasets
    import huggingface_hub

    def refuse(*_arguments, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)


@pytest.fixture
def checkpoint(tmp_path):
    """Return a builder of a checkpoint trained on a text."""

    def build(folder="sae", **text):
        harvest = HarvestSection(hooks=(HOOK,), exclude_leading=2).model_dump(mode="json")
        provenance = {
            "model": {"id": "embedded", "device": "cpu"},
            "hooks_in": [HOOK],
            "hooks_out": [HOOK],
            "text": TextSection(**({"context_length": 32} | text)).model_dump(mode="json"),
            "harvest": {key: harvest[key] for key in ("dtype", "heldout", "exclude_special", "exclude_leading")},
        }
        torch.manual_seed(2)
        SAE(128, 67, ENCODERS["topk"](k=5)).save(tmp_path / folder, provenance)
        return str(tmp_path / folder)

    return build


def stack(checkpoint):
    (folder,) = open_checkpoint(checkpoint).members
    return evaluate_stack(folder.directory.parent)


DOORS = {
    "eval": lambda checkpoint: evaluate(checkpoint, tokens=100),
    "stack": stack,
    "features": lambda checkpoint: features(checkpoint, tokens=100),
    "explained features": lambda checkpoint: features(checkpoint, tokens=100, explainer=Explainer("embedded")),
    "convert": lambda checkpoint: thresholds_of(open_checkpoint(checkpoint), 100),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_data_set_without_network(checkpoint, offline, door):
    with pytest.raises(ValueError, match=r"text\.dataset: 'some/set' could not be downloaded .*no network"):
        DOORS[door](checkpoint(**HUB))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("gone.jsonl",), r"text\.files: .*gone\.jsonl does not exist"),
        (("good.jsonl", "gone.jsonl"), r"text\.files: .*gone\.jsonl does not exist"),
        (("good.jsonl", "text.csv"), r"text\.files: expected \.txt, \.json, \.jsonl, \.parquet, got .*text\.csv"),
        (("other.jsonl",), r"other\.jsonl:1: expected a JSON object with the key 'text'"),
    ],
)
def test_files_that_are_not_there_or_not_text(checkpoint, tmp_path, door, names, message):
    (tmp_path / "good.jsonl").write_text(json.dumps({"text": "The war lasted."}) + "\n")
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "The war lasted."}) + "\n")
    (tmp_path / "text.csv").write_text("text\n")
    with pytest.raises(ValueError, match=message):
        DOORS[door](checkpoint(source="files", files=[str(tmp_path / name) for name in names]))


@pytest.mark.parametrize("door", DOORS)
def test_text_that_is_there_lets_the_model_be_loaded(checkpoint, door):
    """So that the tests above can fail."""
    with pytest.raises(ModelLoadedError):
        DOORS[door](checkpoint())


@pytest.mark.parametrize(
    ("task", "message"),
    [("factors", r"embedded on hub text are not known.*--labels FILE"), ("tpp", r"--labels: expected a JSONL file")],
)
def test_probing_that_needs_labels_says_so_before_the_model(checkpoint, offline, task, message):
    with pytest.raises(ValueError, match=message):
        probe(checkpoint(**HUB), tasks=["supervised", task])


def test_probing_labelled_text_needs_no_training_text(checkpoint, offline, tmp_path, caplog):
    """Neither to read it, nor to compare it with what the run saw."""
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"text": "The war lasted.", "label": label}) + "\n" for label in ("a", "b")))
    with pytest.raises(ValueError, match="embedded on hub text are not known"):
        probe(checkpoint(**HUB), tasks=["factors"], labels=labels)
    for tasks in (["tpp"], None):
        with pytest.raises(ModelLoadedError):
            probe(checkpoint(**HUB), tasks=tasks, labels=labels)
    assert not caplog.records
