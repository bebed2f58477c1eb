"""SAEBench-style tasks on planted texts with known answers, labelled files, and the adapter against its interface."""

import json

import numpy as np
import pytest
import torch
from scipy import sparse

from sparsary.eval.probing.datasets import Labelled, Pooled, pool, read_labelled
from sparsary.eval.probing.saebench.absorption import absorption
from sparsary.eval.probing.saebench.adapter import SaeBenchAdapter, transformer_lens_hook
from sparsary.eval.probing.saebench.datasets import embedded_data
from sparsary.eval.probing.saebench.output import result_file
from sparsary.eval.probing.saebench.scr_tpp import scr, tpp
from sparsary.eval.probing.saebench.sparse_probing import sparse_probing
from sparsary.eval.probing.subject import probe_target
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats.hooks import ARCHITECTURES, to_module
from sparsary.transcoders import Transcoder

SOURCE = {
    "hook": "transformer.h.2:out",
    "model": {"id": "embedded", "device": "cpu"},
    "text": {"source": "embedded", "context_length": 64},
    "harvest": {"heldout": 0.05},
}


@pytest.fixture(scope="module")
def subject(embedded_model):
    torch.manual_seed(3)
    return probe_target(SAE(128, 131, build_encoder({"name": "topk", "k": 8})).eval(), embedded_model, SOURCE)


def planted(subject, labels, spurious=None, latents=None, noise=0.02, name="planted"):
    """Texts whose activations are their labels' atoms: latent i is the i-th label's, those of the second label come after."""
    generator = np.random.default_rng(0)
    d = subject.dictionary
    writes = (d.atoms * d.out_scale).detach().numpy()
    codes = np.zeros((len(labels), d.n_latents), np.float32)
    for offset, values in ((0, labels), (10, spurious)):
        if values is not None:
            for index, value in enumerate(sorted(set(values))):
                codes[np.array(values) == value, offset + index] = 1.0
    x = codes @ writes + noise * generator.normal(size=(len(labels), 128))
    shown = codes if latents is None else latents(codes)
    second = None if spurious is None else np.array(spurious)
    return Pooled(name, x.astype(np.float32), sparse.csc_array(shown), np.array(labels), second, np.ones(len(labels)))


def four_quadrants(n):
    return ["a", "a", "b", "b"] * n, ["u", "v", "u", "v"] * n


def test_a_label_s_own_latent_is_enough_and_noise_is_chance(subject):
    labels = ["a", "b", "c"] * 60
    good = sparse_probing(subject, [planted(subject, labels)])
    assert good.summary["sparse_probing_sae_top_1_test_accuracy"] == 1
    assert good.summary["sparse_probing_llm_test_accuracy"] == 1
    bad = sparse_probing(subject, [planted(subject, labels, latents=lambda codes: np.random.default_rng(1).permutation(codes))])
    assert bad.summary["sparse_probing_sae_top_1_test_accuracy"] == pytest.approx(0.5, abs=0.15)
    low, high = (bad.summary[f"sparse_probing_sae_top_1_test_accuracy_{end}"] for end in ("low", "high"))
    assert low < bad.summary["sparse_probing_sae_top_1_test_accuracy"] < high
    dead = sparse_probing(subject, [planted(subject, labels, latents=np.zeros_like)])
    assert dead.summary["sparse_probing_sae_test_accuracy"] == 0.5


def test_silencing_the_spurious_label_s_latents_brings_the_accuracy_back(subject):
    labels, spurious = four_quadrants(60)
    task = scr(subject, [planted(subject, labels, spurious)])
    assert task.summary["scr_clean_accuracy"] == 1
    # Two latents stand for either label: without them a biased probe reads the other.
    directions = [task.summary[f"scr_dir{direction}_threshold_2"] for direction in (1, 2)]
    assert max(directions) == 1
    assert task.summary["scr_metric_threshold_2"] == max(directions)
    nothing = scr(subject, [planted(subject, labels, spurious, latents=np.zeros_like)])
    assert nothing.summary["scr_metric_threshold_20"] == 0
    with pytest.raises(ValueError, match=r"scr: expected labelled text with two labels and a second key, spurious"):
        scr(subject, [planted(subject, labels)])
    with pytest.raises(ValueError, match="for each of the four pairs of label and spurious"):
        scr(subject, [planted(subject, labels, [*labels[:-4], "b", "a", "b", "a"])])


def test_silencing_a_class_s_latent_hurts_its_own_probe_only(subject):
    labels = ["a", "b", "c", "d"] * 60
    task = tpp(subject, [planted(subject, labels)])
    own, others = (task.summary[f"tpp_threshold_2_{kind}_diff_only"] for kind in ("intended", "unintended"))
    assert own > 0.3
    assert others < 0.1
    assert task.summary["tpp_threshold_2_total_metric"] == pytest.approx(own - others)
    dead = tpp(subject, [planted(subject, labels, latents=np.zeros_like)])
    assert dead.summary["tpp_threshold_2_total_metric"] == 0
    with pytest.raises(ValueError, match="tpp: expected labelled text of at least three classes"):
        tpp(subject, [planted(subject, ["a", "b"] * 30)])


def test_absorption_of_texts_and_of_a_dead_dictionary(subject):
    labels = ["a", "b", "c"] * 60
    clean = absorption(subject, [planted(subject, labels)])
    assert clean.summary["absorption_labels"] == 3
    assert clean.summary["absorption_mean_full_absorption_score"] == 0
    assert clean.summary["absorption_mean_num_split_features"] == 1
    dead = absorption(subject, [planted(subject, labels, latents=np.zeros_like)])
    assert dead.summary["absorption_mean_absorption_fraction_score"] is None
    assert dead.summary["absorption_why"] == "no latent fires on it"
    json.dumps([clean.summary, dead.summary], allow_nan=False)


def test_absorption_against_the_activation_less_the_bias_has_a_name_of_its_own(subject):
    """A bias along the probe is no latent's doing: only where it is left in do main latents seem to miss a part."""
    labels = ["a", "b", "c"] * 60
    data = planted(subject, labels)
    plain = absorption(subject, [data])
    names = ("absorption_mean_absorption_fraction_score", "absorption_mean_absorption_fraction_less_bias_score")
    # Without a bias both are one figure.
    assert plain.summary[names[0]] == plain.summary[names[1]]
    with torch.no_grad():
        shifted = 3.0 * subject.dictionary.atoms[0]
        subject.dictionary.b_dec += shifted
    try:
        moved = Pooled(data.name, data.x + shifted.numpy(), data.codes, data.labels, data.spurious, data.counts)
        task = absorption(subject, [moved])
        less_bias = task.summary[names[1]]
    finally:
        with torch.no_grad():
            subject.dictionary.b_dec -= shifted
    assert less_bias == pytest.approx(plain.summary[names[1]], abs=0.02)
    # SAEBench's own file has SAEBench's names alone.
    assert not [key for key in (*task.metrics["mean"], *task.details[0]) if "less_bias" in key]


def test_scr_and_tpp_carry_their_doubt(subject):
    labels, spurious = four_quadrants(30)
    found = scr(subject, [planted(subject, labels, spurious)]), tpp(subject, [planted(subject, ["a", "b", "c"] * 60)])
    for name, task in zip(("scr", "tpp"), found, strict=True):
        assert "arXiv:2605.18229" in task.summary[f"{name}_warning"]
        assert any("arXiv:2605.18229" in words for _, words in task.notes)


def test_the_same_seed_gives_the_same_and_files_are_saebench_s(subject):
    data = [planted(subject, ["a", "b", "c"] * 30)]
    one, two = (result_file(subject, "x", "sparse_probing", sparse_probing(subject, data, seed=4)) for _ in range(2))
    assert one.pop("datetime_epoch_millis") <= two.pop("datetime_epoch_millis")
    assert one == two
    assert one["eval_result_metrics"]["llm"].keys() >= {"llm_test_accuracy", "llm_top_1_test_accuracy"}
    assert one["eval_result_details"][0]["dataset_name"] == "planted"
    assert one["sae_cfg_dict"]["hook_name"] == "blocks.2.hook_resid_post"
    json.dumps(one, allow_nan=False)


# SAEBench's own classes use what pydantic no longer likes.
@pytest.mark.filterwarnings("ignore")
def test_results_pass_saebench_s_own_checks(subject):
    pytest.importorskip("sae_bench", reason="SAEBench is not installed")
    from sae_bench.evals.scr_and_tpp.eval_output import ScrEvalOutput, TppEvalOutput
    from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput

    labels, spurious = four_quadrants(30)
    three = [planted(subject, ["a", "b", "c"] * 30)]
    for kind, name, task in (
        (SparseProbingEvalOutput, "sparse_probing", sparse_probing(subject, three)),
        (ScrEvalOutput, "scr", scr(subject, [planted(subject, labels, spurious)])),
        (TppEvalOutput, "tpp", tpp(subject, three)),
    ):
        checked = kind(**result_file(subject, "x", name, task))
        assert checked.eval_type_id == name


def test_texts_are_averaged_over_their_own_tokens(subject):
    texts = ["The war lasted from the year 1732", "Mary went home because she", ""]
    found = pool(subject, Labelled("some", texts, ["a", "b", "b"]))
    assert found.labels.tolist() == ["a", "b"]
    for row, text in enumerate(texts[:2]):
        ids = [subject.model.tokenizer.bos_token_id, *subject.model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        x = subject.model.activations(torch.tensor([ids]), (subject.hook,))[subject.hook][0, 1:]
        assert torch.allclose(torch.from_numpy(found.x[row]), x.mean(0), atol=1e-5)
        dense = subject.dictionary.encode(x).to_dense(131).mean(0)
        assert torch.allclose(torch.from_numpy(found.codes[[row]].toarray()[0]), dense, atol=1e-5)
        assert found.counts[row] == len(ids) - 1
    with pytest.raises(ValueError, match="expected texts with valid tokens"):
        pool(subject, Labelled("none", ["", " "], ["a", "b"]))


def test_embedded_passages_have_their_labels():
    data = {one.name: one for one in embedded_data(seed=1, passages=9)}
    assert set(data["gender"].labels) == {"male", "female"}
    assert sorted(zip(data["gender"].labels, data["gender"].spurious, strict=True)) == sorted(
        [(gender, profession) for gender in ("male", "female") for profession in ("doctor", "nurse")] * 9
    )
    for text, profession in zip(data["gender"].texts, data["gender"].spurious, strict=True):
        assert profession in text
    assert len(set(data["task"].labels)) == 7
    assert embedded_data(seed=1, passages=9) == embedded_data(seed=1, passages=9)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a", "label": "x"}', "{"], r"labels\.jsonl:2: expected"),
        (['{"text": "a"}'], r"labels\.jsonl:1: expected"),
        (['{"text": 3, "label": "x"}'], r"labels\.jsonl:1: expected"),
        (['{"text": "a", "label": "x"}'] * 3, r"label: expected at least two classes, got \['x'\] in 3 lines"),
        ([], r"label: expected at least two classes, got \[\] in 0 lines"),
        (['{"text": "a", "label": 1, "spurious": 2}', '{"text": "b", "label": 2}'], "spurious: expected a label in every line"),
    ],
)
def test_labelled_files_are_checked(tmp_path, lines, message):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_labelled(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_labelled(tmp_path / "none.jsonl")


def test_labels_may_be_words_or_numbers(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"text": "a", "label": true, "spurious": "u"}\n\n{"text": "b", "label": 0, "spurious": 3}\n')
    found = read_labelled(path)
    assert found == Labelled("reviews", ["a", "b"], ["True", "0"], ["u", "3"])


def test_labelled_files_of_editors_are_read(tmp_path):
    """A byte order mark at the beginning, a line separator within a text; Latin-1 is named."""
    path = tmp_path / "reviews.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b", "label": 1}\n{"text": "b", "label": 0}\n', encoding="utf-8")
    assert read_labelled(path).texts == ["a\u2028b", "b"]
    path.write_bytes('{"text": "é", "label": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"reviews\.jsonl: expected UTF-8 text, got other bytes .* at byte 10\)\. Save it as"):
        read_labelled(path)


def test_activations_that_are_not_finite_are_refused(subject, monkeypatch):
    real = type(subject.model).activations

    def overflowing(self, *arguments, **options):
        return {hook: x * torch.inf for hook, x in real(self, *arguments, **options).items()}

    monkeypatch.setattr(type(subject.model), "activations", overflowing)
    data = embedded_data(seed=0, passages=9)[0]
    with pytest.raises(
        ValueError, match=rf"expected finite activations on {data.name}, got NaN or infinite ones from embedded"
    ):
        pool(subject, data)


def test_too_few_texts_of_a_class_are_said(subject):
    with pytest.raises(ValueError, match=r"at least two classes with 8 texts or more, got \{'a': 9, 'b': 3\}"):
        sparse_probing(subject, [planted(subject, ["a"] * 9 + ["b"] * 3)])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_adapter_is_the_dictionary(name, encoder_arguments):
    dictionary = SAE(17, 67, build_encoder({"name": name} | encoder_arguments[name]))
    # Thresholds of batch-wide encoders are measured in training.
    for _ in range(4):
        x = 3 * torch.randn(101, 17)
        dictionary.encode(x, x if dictionary.encoder.needs_gradient else None)
    dictionary.eval()
    with torch.no_grad():
        dictionary.W_dec.mul_(0.5 + torch.rand(67, 1)) if not dictionary.encoder.unit_atoms else None
        dictionary.b_dec.copy_(torch.randn(17))
        dictionary.in_scale.fill_(1.7)
        dictionary.out_scale.fill_(1.7)
    adapter = SaeBenchAdapter(dictionary, "gpt2", "transformer.h.3:out")
    x = 3 * torch.randn(3, 5, 17)
    codes = adapter.encode(x)
    assert codes.shape == (3, 5, 67)
    assert (adapter.W_enc.shape, adapter.W_dec.shape) == ((17, 67), (67, 17))
    assert (adapter.b_enc.shape, adapter.b_dec.shape) == ((67,), (17,))
    assert torch.allclose(adapter.W_dec.norm(dim=-1), torch.ones(67), atol=1e-5)
    flat = x.reshape(-1, 17)
    expected = dictionary(flat).view_as(x)
    assert torch.allclose(adapter(x), expected, atol=1e-4)
    assert torch.allclose(adapter.decode(codes), expected, atol=1e-4)
    assert (adapter.cfg.d_in, adapter.cfg.d_sae, adapter.cfg.hook_layer) == (17, 67, 3)
    assert adapter.cfg.to_dict()["architecture"] == name
    half = adapter.to(device=torch.device("cpu"), dtype=torch.bfloat16)
    assert half.dtype == half.W_dec.dtype == half.encode(x.bfloat16()).dtype == torch.bfloat16
    assert half.cfg.dtype == "bfloat16"
    assert dictionary.W_dec.dtype == torch.float32


def test_hooks_have_transformer_lens_names():
    assert transformer_lens_hook("model.layers.11:out") == (11, "blocks.11.hook_resid_post")
    assert transformer_lens_hook("gpt_neox.layers.3.mlp:out") == (3, "blocks.3.hook_mlp_out")
    with pytest.raises(ValueError, match="Give hook_layer and hook_name"):
        transformer_lens_hook("somewhere.else:out")
    # All that the formats know, whatever the model's name suggests.
    for name, family in ARCHITECTURES.items():
        for place, path in family.places:
            inner, side = path.rsplit(":", 1)
            hook = f"{family.blocks}.5{'.' * bool(inner)}{inner}:{side}"
            layer, found = transformer_lens_hook(hook, name)
            assert (layer, to_module(found, name)) == (5, hook), place
            assert transformer_lens_hook(hook)[0] == transformer_lens_hook(hook, "/models/llama-like/gpt2")[0] == 5
    assert transformer_lens_hook("transformer.wte:out") == (0, "hook_embed")
    with pytest.raises(ValueError, match="expected an SAE"):
        SaeBenchAdapter(Transcoder(5, 7, 11, build_encoder({"name": "topk", "k": 2}), False), "gpt2", "transformer.h.3:out")
