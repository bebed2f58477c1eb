"""Other libraries running what we exported, in their own environment; compare_tools.py sets their figures beside ours.

    .venv-peers/bin/python tests/parity/run_tools.py TOOL FOLDER

FOLDER holds ``given.json`` (``model``: a directory that transformers loads, ``exported``: our export, and settings of the tool)
and ``given.safetensors`` (``token_ids`` of contexts, ``x``: activations). The tool's figures go to ``theirs.json``.
"""

import argparse
import json
import logging
import os
import sys
import urllib.request
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_peers import HOOKPOINT, RowNumbers, RowTable, skip_package_init

Given = dict[str, Any]
# Steps of a continued training; the first loss is that of what was exported.
STEPS, BATCH = 50, 1024


def hooked_transformer(kind: Any, path: str) -> Any:
    """A GPT-2 from a directory as ``kind``, a HookedTransformer, with its weights as they are."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(path).eval()
    config = module.config
    cfg = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_heads=config.n_head,
        d_head=config.n_embd // config.n_head,
        d_mlp=4 * config.n_embd,
        n_ctx=config.n_positions,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        model_name=Path(path).name,
        tokenizer_name=path,
        original_architecture="GPT2LMHeadModel",
        device="cpu",
    )
    model = kind(cfg, tokenizer=AutoTokenizer.from_pretrained(path))
    folding = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(convert_gpt2_weights(module, cfg), **folding)
    return model.eval()


def token_store(model: Any, sae: Any, token_ids: Tensor) -> Any:
    """SAELens's own store of activations, over contexts that are given as token ids."""
    from datasets import Dataset
    from sae_lens import ActivationsStore

    rows = Dataset.from_dict({"tokens": token_ids.tolist()})
    return ActivationsStore.from_sae(
        model,
        sae,
        rows,
        context_size=token_ids.shape[1],
        streaming=False,
        store_batch_size_prompts=8,
        disable_concat_sequences=True,
    )


def saelens(given: Given) -> dict[str, float]:
    """SAELens's evaluation: cross-entropy with the SAE spliced in, sparsity, variance; and its transformer with the SAE."""
    from sae_lens import SAE, HookedSAETransformer
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    model, token_ids = hooked_transformer(HookedSAETransformer, given["model"]), given["token_ids"]
    sae = SAE.load_from_disk(given["exported"], device="cpu").eval()
    sae.cfg.metadata.prepend_bos = False
    batches = len(token_ids) // 8
    store = token_store(model, sae, token_ids)
    everything = get_eval_everything_config(8, batches, batches)
    found, features = run_evals(sae, store, model, ActivationScaler(), everything, exclude_special_tokens=False)
    with torch.no_grad():
        loss = model.run_with_saes(token_ids[:8], saes=[sae], return_type="loss")
        _, cache = model.run_with_cache_with_saes(token_ids[:8], saes=[sae])
    codes = cache[f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"]
    figures = {key: value for group in found.values() for key, value in group.items()}
    alive = sum(density > 0 for density in features["feature_density"])
    figures["frac_alive"] = alive / sae.cfg.d_sae
    return figures | {"hooked_loss": loss.item(), "hooked_l0": (codes != 0).sum(-1).float().mean().item()}


def saebench_core(given: Given) -> dict[str, float]:
    """SAEBench's core evaluation of our dictionary through the adapter."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from transformer_lens import HookedTransformer

    model, adapter, token_ids = hooked_transformer(HookedTransformer, given["model"]), adapted(given), given["token_ids"]
    batches = len(token_ids) // 8
    config = CoreEvalConfig(
        model_name="embedded",
        batch_size_prompts=8,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        exclude_special_tokens_from_reconstruction=False,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    found, _ = run_evals(adapter, TokenBatches(token_ids), model, config, ignore_tokens=set())
    return {key: value for group in found.values() for key, value in group.items()}


class TokenBatches:
    """Store for SAEBench's core evaluation: batches of contexts, in order and again from the first."""

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids, self.at, self.context_size, self.store_batch_size_prompts = token_ids, 0, token_ids.shape[1], 8

    def get_batch_tokens(self, size: int) -> Tensor:
        batch = self.token_ids[self.at : self.at + size]
        self.at += size
        return batch

    def reset_input_dataset(self) -> None:
        self.at = 0

    def apply_norm_scaling_factor(self, x: Tensor) -> Tensor:
        return x

    unscale = apply_norm_scaling_factor


def adapted(given: Given) -> Any:
    """Our adapter of our own checkpoint; sparsary is on the path that compare_tools.py gives."""
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    import sparsary
    from sparsary.eval.probing.saebench.adapter import SaeBenchAdapter

    adapter = SaeBenchAdapter(sparsary.load(given["checkpoint"]), "embedded", given["hook"])
    return load_and_format_sae("ours", adapter, "cpu")[1]


def fvu_of_mean_squares(loss: float, x: Tensor) -> float:
    """The fraction of variance unexplained that a mean of squared errors per token is."""
    return loss / (x - x.mean(0)).square().sum(-1).mean().item()


def coder_folder(given: Given) -> Path:
    """The folder of the one hook point of an export to sparsify."""
    (config,) = Path(given["exported"]).rglob("cfg.json")
    return config.parent


def sparsify(given: Given) -> dict[str, float]:
    """sparsify's Trainer, finetuning what we exported: its fvu at the first and at the last step."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from safetensors.torch import load_model
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    x, folder = given["x"], coder_folder(given)
    k = json.loads((folder / "cfg.json").read_text())["k"]
    settings = SparseCoderConfig(num_latents=given["n_latents"], k=k)
    cfg = TrainConfig(settings, batch_size=1, lr=1e-4, hookpoints=[HOOKPOINT], optimizer="adam", lr_warmup_steps=5)
    cfg.log_to_wandb, cfg.run_name, cfg.save_dir, cfg.finetune = False, "continued", str(Path(given["folder"])), str(folder)
    losses: list[float] = []
    forward = SparseCoder.forward

    def noted(self: Any, *arguments: Any, **named: Any) -> Any:
        out = forward(self, *arguments, **named)
        losses.append(out.fvu.item())
        return out

    SparseCoder.forward = noted
    table: Any = RowTable(x, [])
    rows: Any = RowNumbers(STEPS, BATCH)
    trainer = Trainer(cfg, rows, table)
    for coder in trainer.saes.values():
        # As its command line does for --finetune.
        load_model(coder, f"{folder}/sae.safetensors", device="cpu")
    trainer.fit()
    return {"first_fvu": losses[0], "last_fvu": losses[-1], "steps": len(losses)}


def dictionary_learning(given: Given) -> dict[str, float]:
    """dictionary_learning's TopKTrainer on what we exported."""
    skip_package_init("dictionary_learning")
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    x, path = given["x"], Path(given["exported"]) / "ae.pt"
    ae = AutoEncoderTopK.from_pretrained(path)
    k = int(ae.k)
    trainer = TopKTrainer(STEPS + 1, ae.activation_dim, ae.dict_size, k, 0, "embedded", lr=1e-4, warmup_steps=5, device="cpu")
    trainer.ae.load_state_dict(ae.state_dict())
    # Step 0 would put the geometric median in place of b_dec.
    losses = [trainer.update(1 + step, x[step * BATCH : (step + 1) * BATCH]) for step in range(STEPS)]
    first, last = x[:BATCH], x[(STEPS - 1) * BATCH : STEPS * BATCH]
    return {
        "first_fvu": fvu_of_mean_squares(losses[0], first),
        "last_fvu": fvu_of_mean_squares(losses[-1], last),
        "steps": len(losses),
    }


class LinearCodes(nn.Module):
    """Encoder for overcomplete: what a linear map gives, and its positive part."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight.data, self.linear.bias.data = weight.clone(), bias.clone()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre_codes = self.linear(x)
        return pre_codes, pre_codes.relu()


def overcomplete(given: Given) -> dict[str, float]:
    """overcomplete's train_sae on the tensors of what we exported to sparsify; its dictionaries have no bias, so x has none."""
    skip_package_init("overcomplete")
    from overcomplete.sae import TopKSAE, train_sae
    from overcomplete.sae.losses import mse_l1

    tensors = load_file(coder_folder(given) / "sae.safetensors")
    k = json.loads((coder_folder(given) / "cfg.json").read_text())["k"]
    x = given["x"] - tensors["b_dec"]
    encoder = LinearCodes(tensors["encoder.weight"], tensors["encoder.bias"])
    sae = TopKSAE(x.shape[1], given["n_latents"], top_k=k, encoder_module=encoder)
    sae.dictionary._weights.data = tensors["W_dec"].clone()
    batches = [x[step * BATCH : (step + 1) * BATCH] for step in range(STEPS)]
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4)
    logs = train_sae(sae, batches, lambda *all_: mse_l1(*all_, penalty=0.0), adam, nb_epochs=1, monitoring=1)
    losses = [loss * x.shape[1] for loss in logs["step_loss"]]
    return {
        "first_fvu": fvu_of_mean_squares(losses[0], batches[0]),
        "last_fvu": fvu_of_mean_squares(losses[-1], batches[-1]),
        "steps": len(losses),
    }


def circuit_tracer(given: Given) -> dict[str, float]:
    """circuit-tracer's attribution with what we exported, its scores, its server with its graph and with ours."""
    import huggingface_hub.constants
    import yaml

    # Version 0.5.0 asks for a constant that huggingface_hub no longer has.
    huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.frontend.local_server import serve
    from circuit_tracer.graph import compute_graph_scores
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    from circuit_tracer.utils import create_graph_files

    folder, device = Path(given["exported"]), torch.device("cpu")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    hooks = {key: config[key] for key in ("feature_input_hook", "feature_output_hook")}
    if config["model_kind"] == "cross_layer_transcoder":
        transcoders = load_clt(str(folder), scan="ours", device=device, dtype=torch.float32, **hooks)
    else:
        paths = {int(path.stem.rpartition("_")[2]): str(path) for path in folder.glob("layer_*.safetensors")}
        transcoders = load_transcoder_set(paths, "ours", device=device, dtype=torch.float32, **hooks)
    model = hooked_transformer(TransformerLensReplacementModel, given["model"])
    model._configure_replacement_model(transcoders)
    graph = attribute(given["prompt"], model, batch_size=64)
    replacement, completeness = compute_graph_scores(graph)
    save_file({"adjacency": graph.adjacency_matrix.contiguous()}, Path(given["folder"]) / "graph.safetensors")
    files = Path(given["folder"]) / "graphs"
    create_graph_files(graph, "theirs", str(files))
    # Ours, by the names that its page asks for.
    (files / "ours.json").write_text(Path(given["graph"]).read_text())
    server = serve(str(files), port=given["port"])
    try:
        served = [
            json.loads(urllib.request.urlopen(f"http://localhost:{given['port']}/graph_data/{name}.json", timeout=60).read())
            for name in ("theirs", "ours")
        ]
        page = urllib.request.urlopen(f"http://localhost:{given['port']}/index.html", timeout=60).read()
    finally:
        server.stop()
    assert set(served[0]) <= set(served[1]), set(served[0]) - set(served[1])
    assert b"<script" in page.lower()
    return {
        "replacement_score": replacement,
        "completeness_score": completeness,
        "active_latents": len(graph.active_features),
        "nodes": graph.adjacency_matrix.shape[0],
        "served_nodes": len(served[1]["nodes"]),
        "top_logit": graph.logit_probabilities.max().item(),
    }


def saebench_probing(given: Given) -> dict[str, float]:
    """SAEBench's sparse probing of our dictionary through the adapter, on labelled texts that are given, split for it."""
    from jaxtyping import jaxtyped
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from transformer_lens import HookedTransformer

    # It has beartype's decorator and not jaxtyping's, so that its shapes are compared with those of the function that calls
    # it, whose tensors hold one class: twice as many rows are refused whatever the data.
    probing.probe_training.train_sklearn_probe = jaxtyped(typechecker=None)(probing.probe_training.train_sklearn_probe)
    model, texts = hooked_transformer(HookedTransformer, given["model"]), given["texts"]
    probing.dataset_utils.get_multi_label_train_test_data = lambda name, *_: (texts[name]["train"], texts[name]["test"])
    for name, sides in texts.items():
        probing.dataset_info.chosen_classes_per_dataset[name] = list(sides["train"])
    probing.HookedTransformer = type("Loaded", (), {"from_pretrained_no_processing": staticmethod(lambda *_, **__: model)})
    config = SparseProbingEvalConfig(
        model_name="embedded",
        dataset_names=list(texts),
        probe_train_set_size=2 * max(len(some) for sides in texts.values() for some in sides["train"].values()),
        probe_test_set_size=2 * max(len(some) for sides in texts.values() for some in sides["test"].values()),
        llm_batch_size=32,
        llm_dtype="float32",
    )
    folder = Path(given["folder"])
    found = probing.run_eval(
        config, [("ours", adapted(given))], "cpu", str(folder / "out"), artifacts_path=str(folder), save_activations=False
    )
    (result,) = found.values()
    figures = {key: value for side in ("llm", "sae") for key, value in result["eval_result_metrics"][side].items()}
    for row in result["eval_result_details"]:
        figures |= {f"{row['dataset_name'].removesuffix('_results')}_{key}": value for key, value in row.items()}
    return {key: value for key, value in figures.items() if isinstance(value, float)}


def saebench_absorption(given: Given) -> dict[str, Any]:
    """SAEBench's absorption of first letters through the adapter; what it scored goes to ``scored.safetensors``."""
    from functools import partial

    from sae_bench.evals.absorption import main as absorption
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    from transformer_lens import HookedTransformer

    folder, model = Path(given["folder"]), hooked_transformer(HookedTransformer, given["model"])
    absorption.HookedTransformer = type("Loaded", (), {"from_pretrained_no_processing": staticmethod(lambda *_, **__: model)})
    # By default its intermediate files are in its package's folder, where a later run would take them for its own.
    places = {"probes_dir": folder / "probes", "sparse_probing_experiment_dir": folder / "sparse_probing"}
    probing = {"experiment_dir": places["sparse_probing_experiment_dir"], "probes_dir": places["probes_dir"]}
    absorption.run_k_sparse_probing_experiment = partial(absorption.run_k_sparse_probing_experiment, **probing)
    absorption.run_feature_absortion_experiment = partial(
        absorption.run_feature_absortion_experiment, experiment_dir=folder / "absorption", **places
    )
    adapter, scored = adapted(given), AbsorptionRecord()
    calculate, encode = FeatureAbsorptionCalculator.calculate_absorption, adapter.encode

    def noted(self: Any, sae: Any, words: list[str], probe_direction: Tensor, main_feature_ids: list[int], **named: Any) -> Any:
        seen: list[Tensor] = []
        sae.encode = lambda x: (seen.append(x), encode(x))[1]
        try:
            found = calculate(self, sae, words, probe_direction, main_feature_ids, **named)
        finally:
            sae.encode = encode
        scored.add(seen, probe_direction, main_feature_ids, found.word_results)
        return found

    FeatureAbsorptionCalculator.calculate_absorption = noted
    # By default it measures nothing unless its probes find 20 letters with an F1 of 0.6. Here every letter is taken.
    config = AbsorptionEvalConfig(model_name="embedded", llm_batch_size=64, min_feats_for_eval=1, min_GT_probe_f1=0.0)
    os.chdir(folder)
    Path("out").mkdir()
    results = absorption.run_eval(config, [("ours", adapter)], "cpu", "out")
    (result,) = results.values()
    details = result["eval_result_details"]
    scored.save(folder / "scored.safetensors", [ord(row["first_letter"]) - ord("a") for row in details])
    (probing_file,) = (folder / "artifacts" / "absorption").glob("*_k_sparse_probing.json")
    probe_f1 = [row["f1_probe"] for row in json.loads(probing_file.read_text())]
    found = {"probe_f1": sum(probe_f1) / len(probe_f1), "letters_with_f1_above_0.6": sum(f1 > 0.6 for f1 in probe_f1)}
    return result["eval_result_metrics"]["mean"] | found | {"letters": len(details), "words": len(scored.letters)}


class AbsorptionRecord:
    """Words that SAEBench's absorption scored, with activation and letter, and the probe and latents found for each letter."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.letters: list[int] = []
        self.probes: list[Tensor] = []
        self.main: list[list[int]] = []

    def add(self, x: list[Tensor], probe: Tensor, main: list[int], results: list[Any]) -> None:
        """Note the words of the next letter."""
        assert sum(map(len, x)) == len(results)
        self.x += x
        self.letters += [len(self.probes)] * len(results)
        self.probes.append(probe)
        self.main.append(main)

    def save(self, path: Path, counted: list[int]) -> None:
        """Write all of it; ``counted`` are the letters that enter the means."""
        main = torch.full((len(self.main), max(map(len, self.main))), -1)
        for letter, some in enumerate(self.main):
            main[letter, : len(some)] = torch.tensor([int(one) for one in some])
        tensors = {"x": torch.cat(self.x), "letters": torch.tensor(self.letters), "probes": torch.stack(self.probes).detach()}
        save_file(
            {key: one.contiguous() for key, one in (tensors | {"main": main, "counted": torch.tensor(counted)}).items()}, path
        )


def saedashboard(given: Given) -> dict[str, Any]:
    """SAEDashboard's page of some latents of what we exported, and its tables of them."""
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE, HookedSAETransformer

    model = hooked_transformer(HookedSAETransformer, given["model"])
    sae = SAE.load_from_disk(given["exported"], device="cpu").eval()
    sae.cfg.metadata.prepend_bos = False
    config = SaeVisConfig(
        hook_point=sae.cfg.metadata.hook_name, features=given["latents"], minibatch_size_features=len(given["latents"])
    )
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=given["token_ids"])
    page = Path(given["folder"]) / "page.html"
    save_feature_centric_vis(sae_vis_data=data, filename=page)
    rows = []
    for latent in given["latents"]:
        found = data.feature_data_dict[latent]
        tables = found.feature_tables_data
        rows.append(
            {
                "density": float(found.acts_histogram_data.title.split(" = ")[1].split("%")[0]) / 100,
                "aligned": tables.neuron_alignment_indices,
                "aligned_shares": tables.neuron_alignment_l1,
                "correlated": tables.correlated_neurons_indices,
                "pearson": tables.correlated_neurons_pearson,
                "cosine": tables.correlated_neurons_cossim,
                "promoted": [model.tokenizer.decode([token]) for token in found.logits_table_data.top_token_ids],
                "suppressed": [model.tokenizer.decode([token]) for token in found.logits_table_data.bottom_token_ids],
            }
        )
    return {"rows": rows, "page_bytes": page.stat().st_size}


def delphi(given: Given) -> dict[str, Any]:
    """delphi's cache and detection scorer on what we exported to sparsify; the judge looks for the explanation's word."""
    from unittest.mock import MagicMock

    # Of these only names are imported: vLLM serves judges on GPUs, tiktoken counts the tokens of others, and the rest finds
    # hard negatives with an embedding model.
    vllm = ("vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.inputs")
    for name in (*vllm, "tiktoken", "faiss", "sentence_transformers"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from functools import partial

    from delphi.clients.client import Client, Response
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentCache, LatentDataset
    from delphi.scorers import DetectionScorer
    from delphi.sparse_coders.load_sparsify import load_sparsify_sparse_coders, sae_dense_latents
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class WordJudge(Client):
        def __init__(self) -> None:
            super().__init__("word judge")

        async def generate(self, prompt: Any, **_: Any) -> Response:
            text = prompt[-1]["content"]
            word = text.split("Latent explanation: ")[1].split("\n")[0]
            examples = text.split("Text examples:")[1].split("Example ")[1:]
            return Response(str([int(word in example.partition(":")[2].split()) for example in examples]))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(given["model"]), AutoTokenizer.from_pretrained(given["model"])
    coder = coder_folder(given)
    name = given["hook"].rpartition(":")[0]
    coders = load_sparsify_sparse_coders(str(coder.parent), [coder.name], "cpu")
    encode = partial(sae_dense_latents, sae=coders[coder.name])
    token_ids = given["token_ids"]
    cache = LatentCache(model, {name: encode}, batch_size=8)
    cache.run(token_ids.numel(), token_ids)
    raw = Path(given["folder"]) / "latents"
    (raw / name).mkdir(parents=True)
    cache.save_splits(1, raw)
    (raw / name / "config.json").write_text(json.dumps({"ctx_len": token_ids.shape[1], "model_name": given["model"]}))
    # A tokenizer of words decodes single tokens without the spaces between them.
    tokenizer.batch_decode = lambda ids: [f" {tokenizer.decode([int(one)])}" for one in ids]
    words = dict(zip(given["latents"], given["words"], strict=True))
    dataset = LatentDataset(
        raw,
        SamplerConfig(n_examples_train=20, n_examples_test=20, n_quantiles=5),
        ConstructorConfig(min_examples=20, n_non_activating=25),
        tokenizer,
        modules=[name],
        latents={name: torch.tensor(sorted(words))},
    )
    scorer = DetectionScorer(WordJudge(), n_examples_shown=5)
    found = {}
    for record in dataset:
        record.explanation = words[record.latent.latent_index]
        claims = scorer.call_sync(record).score
        shares = [
            sum(claim.correct for claim in claims if claim.activating == side)
            / sum(claim.activating == side for claim in claims)
            for side in (True, False)
        ]
        found[str(record.latent.latent_index)] = sum(shares) / 2
    firings = cache.hookpoint_firing_counts[name]
    return {"detection": found, "firings": firings[given["latents"]].tolist()}


TOOLS: dict[str, Callable[[Given], dict[str, Any]]] = {
    "saelens": saelens,
    "saebench_core": saebench_core,
    "saebench_probing": saebench_probing,
    "saebench_absorption": saebench_absorption,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
    "circuit_tracer": circuit_tracer,
    "saedashboard": saedashboard,
    "delphi": delphi,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    given = json.loads((arguments.folder / "given.json").read_text()) | {"folder": str(arguments.folder)}
    given |= load_file(arguments.folder / "given.safetensors")
    # The libraries' own prints are of no use to a reader of the figures.
    sys.stdout = sys.stderr
    found = TOOLS[arguments.tool](given)
    (arguments.folder / "theirs.json").write_text(json.dumps(found, default=float))


if __name__ == "__main__":
    main()
