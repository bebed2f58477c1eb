"""Latents as Neuronpedia imports them: every column of its tables, and figures that records do not hold."""

import gzip
import json
import math

import numpy as np
import pytest
import torch

from sparsary import NeuronpediaExport
from sparsary.eval.features.collect import Limits
from sparsary.eval.features.neuronpedia import export
from sparsary.eval.features.neuronpedia.neurons import NeuronMoments, alignment, latent_cosines, value_histogram
from sparsary.eval.features.run import features
from sparsary.sae import ENCODERS, SAE, SparseCode, load_dictionary
from sparsary.training.activations.contexts import ContextBatch
from sparsary.training.recipe import HarvestSection, TextSection
from sparsary.training.text import Cursor

HOOK = "transformer.h.2:out"
N, D = 67, 128
# Columns of Neuronpedia's database that an import fills.
COLUMNS = {
    "features": """modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel vectorDefaultSteerStrength
        hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
        correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
        correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero
        freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values
        decoder_weights_dist sourceSetName""",
    "activations": """id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource dataIndex
        dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax binContains
        qualifyingTokenIndex""",
    "model": """id instruct creatorId displayNameShort displayName tlensId dimension visibility defaultSourceSetName
        defaultSourceId inferenceEnabled layers neuronsPerLayer createdAt owner updatedAt website""",
    "release": """name description creatorName creatorId visibility isNewUi featured descriptionShort urls creatorEmail
        creatorNameShort defaultSourceSetName defaultSourceId defaultUmapSourceIds createdAt""",
    "sourceset": """modelId name creatorId hasDashboards visibility description type creatorName urls creatorEmail releaseName
        defaultOfModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap createdAt""",
    "source": """id modelId setName creatorId hasDashboards inferenceEnabled inferenceHosts saelensConfig saelensRelease
        saelensSaeId hfRepoId hfFolderId visibility defaultOfModelId hasUmap hasUmapLogSparsity hasUmapClusters num_prompts
        num_tokens_in_prompt dataset notes createdAt""",
}


def rows_of(path):
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neuronpedia") / "tiny sae"
    torch.manual_seed(2)
    harvest = HarvestSection(hooks=(HOOK,), exclude_leading=2).model_dump(mode="json")
    about = {
        "model": {"id": "embedded", "device": "cpu"},
        "hook": HOOK,
        "text": TextSection(context_length=32).model_dump(mode="json"),
        "harvest": {key: harvest[key] for key in ("dtype", "heldout", "exclude_special", "exclude_leading")},
    }
    SAE(D, N, ENCODERS["topk"](k=5)).save(folder, about)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """Records, and the folder of the source, in batches of 32 latents."""
    directory = tmp_path_factory.mktemp("exports")
    stale = directory / "gpt2-small-embedded" / "2-tiny-sae" / "features" / "batch-9.jsonl.gz"
    stale.parent.mkdir(parents=True)
    stale.touch()
    limits = Limits(top=4, sample=12, before=5, after=2, background=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "BATCH", 32)
        found = features(str(checkpoint), tokens=3000, limits=limits, neuronpedia=directory)
    assert found["neuronpedia_path"] == str(directory / "gpt2-small-embedded" / "2-tiny-sae")
    assert not stale.exists()
    return found.records_of(range(N)), directory / "gpt2-small-embedded" / "2-tiny-sae"


def test_every_row_has_the_columns_of_its_table(exported):
    _, folder = exported
    for table, columns in COLUMNS.items():
        many = sorted(folder.glob(f"{table}/batch-*.jsonl.gz"))
        for path in many or [folder / f"{table}.jsonl"]:
            for row in rows_of(path):
                assert set(row) == set(columns.split()), table
    assert [path.name for path in sorted((folder / "features").iterdir())] == [f"batch-{i}.jsonl.gz" for i in range(3)]
    source, model = rows_of(folder / "source.jsonl")[0], rows_of(folder / "model.jsonl")[0]
    assert (source["id"], source["setName"], source["modelId"]) == ("2-tiny-sae", "tiny-sae", "gpt2-small-embedded")
    assert source["num_prompts"] > 90
    assert source["num_tokens_in_prompt"] == 32
    assert (model["dimension"], model["layers"], model["neuronsPerLayer"]) == (128, 4, 512)


def test_features_and_activations_are_those_of_the_records(exported, checkpoint):
    records, folder = exported
    rows = [row for i in range(3) for row in rows_of(folder / "features" / f"batch-{i}.jsonl.gz")]
    shown = [row for path in (folder / "activations").iterdir() for row in rows_of(path)]
    assert len({row["id"] for row in shown}) == len(shown)
    assert [row["index"] for row in rows] == [str(latent) for latent in range(N)]
    atoms = load_dictionary(checkpoint).atoms
    for record, row in zip(records, rows, strict=True):
        contexts = [activation for activation in shown if activation["index"] == row["index"]]
        assert len(contexts) == len(record["top"]) + sum(len(part["contexts"]) for part in record["quantiles"])
        assert row["hookName"] == "blocks.2.hook_resid_post"
        assert row["neuron_alignment_indices"] == atoms[record["latent"]].topk(3).indices.tolist()
        assert row["pos_str"] == [entry["token"] for entry in record["logits"]["promoted"]]
        assert row["neg_values"] == [entry["effect"] for entry in record["logits"]["suppressed"]]
        assert row["correlated_features_indices"] == [entry["latent"] for entry in record["correlated"]][:3]
        assert row["correlated_features_pearson"] == [entry["correlation"] for entry in record["correlated"]][:3]
        # All of the text is sampled, as it is short.
        assert sum(row["freq_hist_data_bar_heights"]) == record["firings"]
        effects = np.repeat(row["logits_hist_data_bar_values"], row["logits_hist_data_bar_heights"])
        assert effects[0] == pytest.approx(row["neg_values"][0], abs=0.05 * (effects[-1] - effects[0]))
        assert not record["top"] or row["maxActApprox"] == max(activation["maxValue"] for activation in contexts)
        for activation in contexts:
            assert activation["values"][activation["maxValueTokenIndex"]] == activation["maxValue"]


def test_an_explanation_is_exported(exported):
    records, _ = exported
    identity = export.SourceIdentity("gpt2-small", "8-res-jb", "me", "now")
    explained = records[0] | {"explanation": {"text": "years", "detection": 1.0}}
    (row,) = export.explanation_rows(explained, identity, "explainer")
    assert (row["description"], row["modelId"], row["layer"], row["index"]) == ("years", "gpt2-small", "8-res-jb", "0")
    assert not list(export.explanation_rows(records[0], identity, None))


def batch(tokens):
    blank = np.zeros((1, tokens), np.int64)
    return ContextBatch(blank, blank, blank, np.ones((1, tokens), bool), Cursor(0, 0))


def test_correlations_with_neurons_are_numpy_s():
    torch.manual_seed(1)
    x, moments = torch.randn(60, 7).double() + torch.tensor([0, 0, 0, 50, 0, 0, 0]), NeuronMoments(11, 7)
    rows = torch.stack([torch.randperm(10)[:3] for _ in range(60)])
    code = SparseCode.from_rows(rows, torch.rand(60, 3).double())
    for part in (slice(0, 23), slice(23, 60)):
        some = SparseCode.from_rows(rows[part], code.values.view(60, 3)[part])
        moments.update(batch(len(x[part])), x[part], some)
    found, z = moments.correlations(), code.to_dense(11).numpy()
    with np.errstate(invalid="ignore"):
        pearson = np.corrcoef(z.T, x.T.numpy())[:11, 11:]
    cosine = (z.T @ x.numpy()) / (np.linalg.norm(z, axis=0)[:, None] * np.linalg.norm(x.numpy(), axis=0) + 1e-30)
    assert np.allclose(found.pearson[:10], -np.sort(-pearson[:10], 1)[:, :3])
    assert np.allclose(found.cosine[:10], np.take_along_axis(cosine[:10], found.neurons[:10], 1))
    # The last latent never fires.
    assert found.pearson[10].tolist() == [0, 0, 0]
    others = np.arange(10)[:, None][::-1]
    given = np.corrcoef(z.T[:10])[np.arange(10)[:, None], others]
    squares = (z**2).sum(0)[:10]
    cosines = latent_cosines(z.sum(0)[:10], squares, 60, others, given)
    products = z.T @ z
    assert np.allclose(cosines.ravel(), [products[i, 9 - i] / math.sqrt(squares[i] * squares[9 - i]) for i in range(10)])


def test_alignment_and_histograms():
    found = alignment(torch.tensor([[0.0, -4.0, 1.0, 3.0]]), 2)
    assert (found.neurons.tolist(), found.values.tolist(), found.shares.tolist()) == ([[3, 2]], [[3, 1]], [[0.375, 0.125]])
    assert value_histogram(np.array([0.0, 1.0, 3.0, 4.0]), 2) == ([2, 2], [1.0, 3.0])
    assert value_histogram(np.zeros(0), 2) == ([], [])


def test_ids_that_neuronpedia_has_not_are_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="MODEL/LAYER-SET, such as gpt2-small/8-res-jb, got 'gpt2'"):
        NeuronpediaExport(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="expected a hook in a layer, got lm_head:in"):
        NeuronpediaExport(tmp_path).source("runs/x", "lm_head:in", "embedded")
    assert NeuronpediaExport(tmp_path).source("runs/x", "transformer.h.8:out", "openai-community/gpt2") == (
        "gpt2-small",
        8,
        "x",
    )
