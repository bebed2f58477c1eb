"""Figures of other libraries on what we exported, beside ours on the same tokens.

    make peers
    .venv/bin/python tests/parity/compare_tools.py TOOL CHECKPOINT [--tokens N] [--out FILE.json]

TOOL is one of ``TOOLS``. CHECKPOINT is a TopK SAE of a GPT-2, such as runs/quickstart; for ``circuit_tracer`` a stack of
transcoders or a cross-layer transcoder, such as runs/transcoders/embedded/stack. Text is the embedded corpus in contexts of one
document each, without BOS, so that both sides count the same tokens. run_tools.py runs the other side.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

import sparsary
from sparsary.eval.attribution_graphs.graph import graph_of
from sparsary.eval.attribution_graphs.local_replacement_model import LocalReplacement
from sparsary.eval.attribution_graphs.run import open_graph_target, prompt_ids
from sparsary.eval.checkpoint import open_checkpoint, thresholds_of
from sparsary.eval.features.autointerp import evidence, score_explanations
from sparsary.eval.features.llm_client import Chat, LlmUsage
from sparsary.eval.features.neuronpedia.neurons import NeuronMoments, alignment
from sparsary.eval.features.run import described_checkpoint
from sparsary.eval.heldout import eval_data
from sparsary.eval.probing.absorption import absorbed
from sparsary.eval.probing.saebench.datasets import embedded_data, split_texts
from sparsary.sae.metrics import RunningFvu
from sparsary.training.activations.contexts import ContextBatch
from sparsary.training.embedded.corpus import embedded_document
from sparsary.training.text import Cursor
from sparsary.transcoders.stack import hooks_of_provenance

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
LENGTH = 128
STEPS, BATCH = 50, 1024
PROMPT = "Mary and John went to the store . John gave a coin to"

Figures = dict[str, Any]


class Compared(NamedTuple):
    """Figures of both sides by name, theirs first; and all that the tool gave."""

    pairs: dict[str, tuple[float, float]]
    theirs: Figures


def run_tool(tool: str, folder: Path, given: Figures, tensors: dict[str, torch.Tensor]) -> Figures:
    """Run a tool in the peers' environment and return its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given.json").write_text(json.dumps(given))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "given.safetensors")
    # The checkout is the package: a link by its name lets the other environment import it.
    link = folder / "path" / "sparsary"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(Path(sparsary.__file__).parent)
    command = [str(PEERS_PYTHON), str(ROOT / "tests" / "parity" / "run_tools.py"), tool, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(link.parent), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        raise SystemExit(f"{tool}: exit status {run.returncode}\n{run.stderr[-4000:]}")
    return json.loads((folder / "theirs.json").read_text())


def write_text(folder: Path, tokenizer: Any, contexts: int) -> Path:
    """Write documents of the embedded corpus, cut to one context each, as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, number = [], 0
    while len(lines) < contexts:
        text = " ".join(embedded_document(0, number + i, "heldout").text for i in range(4))
        number += 4
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:LENGTH]
        cut = tokenizer.decode(ids)
        if len(ids) == LENGTH and tokenizer(cut, add_special_tokens=False)["input_ids"] == ids:
            lines.append(json.dumps({"text": cut}))
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def exported(checkpoint: str, folder: Path, to: str) -> Path:
    """Export a checkpoint and return the folder; TopK transcoders are written with thresholds to circuit-tracer."""
    thresholds = thresholds_of(open_checkpoint(checkpoint), 20_000) if to == "circuit_tracer" else None
    sparsary.convert(checkpoint, folder / to, to, thresholds=thresholds or None)
    return folder / to


class Case:
    """A checkpoint, its language model, and text of ``tokens`` tokens to score, in a folder of its own."""

    def __init__(self, checkpoint: str, folder: Path, tokens: int):
        self.checkpoint, self.folder, self.tokens = checkpoint, folder, tokens
        member = open_checkpoint(checkpoint).completed().members[0]
        self.dictionary, self.hook = member.dictionary.eval(), hooks_of_provenance(member.provenance)[0][0]
        self.model = sparsary.LanguageModel.from_pretrained(str(member.provenance["model"]["id"]), device="cpu")
        embedded = Path(sparsary.__file__).parent / "training" / "embedded" / "model"
        self.directory = str(embedded.resolve() if self.model.id == "embedded" else Path(self.model.id).resolve())

    @cached_property
    def options(self) -> sparsary.CheckpointOptions:
        return sparsary.CheckpointOptions(
            model=self.model.id,
            text=(str(write_text(self.folder, self.model.tokenizer, 2 * self.tokens // LENGTH + 16)),),
            settings={
                "text.context_length": LENGTH,
                "text.bos": "none",
                "harvest.exclude_leading": 0,
                "harvest.exclude_special": False,
            },
        )

    def scored_tokens(self, export: Path) -> torch.Tensor:
        """Return the contexts that ``sparsary eval`` scores of an export."""
        member = open_checkpoint(str(export), self.options).completed().members[0]
        halves = eval_data(member.provenance, (self.hook,)).halves(2 * self.tokens)
        for _ in halves.fit():
            pass
        pieces = list(halves.score())
        assert all(bool(piece.kept.all()) and bool(piece.counted.all()) for piece in pieces)
        return torch.cat([piece.token_ids for piece in pieces])

    def activations(self) -> torch.Tensor:
        """Return activations for a short training, at the hook, on the text from the beginning."""
        text = [json.loads(line)["text"] for line in Path(self.options.text[0]).read_text().splitlines()]
        ids = torch.tensor([self.model.tokenizer(one, add_special_tokens=False)["input_ids"] for one in text])
        rows = [self.model.activations(some, (self.hook,))[self.hook].flatten(0, 1) for some in ids.split(32)]
        x = torch.cat(rows).float()
        if len(x) < STEPS * BATCH:
            raise SystemExit(f"--tokens: expected at least {STEPS * BATCH // 2} for {STEPS} steps, got {self.tokens}.")
        return x[: STEPS * BATCH]

    def given(self, export: Path) -> Figures:
        about = {"model": self.directory, "exported": str(export), "checkpoint": str(Path(self.checkpoint).resolve())}
        return about | {"hook": self.hook, "n_latents": self.dictionary.n_latents}


def saelens(case: Case) -> Compared:
    """SAELens's evaluation in its own transformer, of our export, beside ``sparsary eval``."""
    return _evaluated(case, "saelens")


def saebench_core(case: Case) -> Compared:
    """SAEBench's core evaluation through the adapter, beside ``sparsary eval``."""
    return _evaluated(case, "saebench_core")


def saebench_probing(case: Case) -> Compared:
    """SAEBench's sparse probing through the adapter, beside ``sparsary probe``, of the labelled texts of the embedded corpus.

    Training and test texts are the same on both sides; texts of other classes are drawn by each side.
    """
    texts = {}
    for data in embedded_data():
        labels = np.array(data.labels)
        split = split_texts(data, labels, seed=0)
        texts[data.name] = {
            side: {name: [data.texts[row] for row in rows if labels[row] == name] for name in split.classes}
            for side, rows in (("train", split.train), ("test", split.test))
        }
    given = case.given(Path(case.checkpoint)) | {"texts": texts}
    theirs = run_tool("saebench_probing", case.folder / "saebench_probing", given, {})
    found = sparsary.probe(case.checkpoint, ["sparse_probing"], out=case.folder / "probe", seed=0)
    tops = [f"{side}{top}_test_accuracy" for top in ("_top_1", "_top_2", "_top_5", "") for side in ("sae", "llm")]
    ours = {name: found.report[f"sparse_probing_{name}"] for name in tops}
    return Compared({name: (theirs[name], ours[name]) for name in tops}, theirs)


def saebench_absorption(case: Case) -> Compared:
    """SAEBench's absorption of first letters, in a model that spells (spelling_model.py), through the adapter.

    Ours is of the same activations, probes and latents; besides, ``ours_alone`` is that of ``sparsary probe`` on the words
    of ``words.jsonl`` beside the model, with probes and latents of our own.
    """
    folder = case.folder / "absorption"
    theirs = run_tool("saebench_absorption", folder, case.given(Path(case.checkpoint)), {})
    scored, dictionary = load_file(folder / "scored.safetensors"), case.dictionary
    writes = (dictionary.W_dec * dictionary.out_scale).detach().numpy()
    fractions, full = [], []
    for letter in scored["counted"].tolist():
        x, main = scored["x"][scored["letters"] == letter], scored["main"][letter]
        with torch.no_grad():
            codes = sparse.csr_array(dictionary.encode(x).to_dense(dictionary.n_latents).numpy())
        found = absorbed(x.numpy(), codes, writes, scored["probes"][letter].numpy(), main[main >= 0].numpy())
        fractions.append(found.fraction.mean())
        full.append(found.full.mean())
    labels = Path(case.directory).with_name("words.jsonl")
    alone = sparsary.probe(case.checkpoint, ["absorption"], str(labels), str(case.folder / "probe")).report
    names = ("absorption_fraction_score", "full_absorption_score", "num_split_features")
    theirs |= {f"ours_alone_{name}": alone[f"absorption_mean_{name}"] for name in names}
    theirs["ours_alone_letters"] = alone["absorption_labels"]
    ours = {"mean_absorption_fraction_score": np.mean(fractions), "mean_full_absorption_score": np.mean(full)}
    return Compared({name: (theirs[name], float(value)) for name, value in ours.items()}, theirs)


def _evaluated(case: Case, tool: str) -> Compared:
    export = exported(case.checkpoint, case.folder, "saelens")
    token_ids = case.scored_tokens(export)
    theirs = run_tool(tool, case.folder / tool, case.given(export), {"token_ids": token_ids})
    ours = sparsary.evaluate(str(export), case.folder / "report", tokens=2 * case.tokens, options=case.options, cache=False)
    assert ours["tokens"] == token_ids.numel()
    names = {
        "explained_variance": 1 - ours["fvu"],
        "l0": ours["l0_mean"],
        "cossim": ours["cosine"],
        "l2_ratio": ours["l2_ratio"],
        "relative_reconstruction_bias": ours["relative_reconstruction_bias"],
        "ce_loss_without_sae": ours["ce_clean"],
        "ce_loss_with_sae": ours["ce_spliced"],
        "ce_loss_with_ablation": ours["ce_zero"],
        "ce_loss_score": ours["ce_recovered_zero"],
        "kl_div_with_sae": ours["kl_spliced"],
        "kl_div_score": ours["kl_recovered_zero"],
    }
    names |= {"frac_alive": 1 - ours["dead_fraction"]}
    return Compared({name: (theirs[name], value) for name, value in names.items() if name in theirs}, theirs)


def sparsify(case: Case) -> Compared:
    """sparsify's Trainer with its ``finetune``, from our export."""
    return _continued(case, "sparsify", "sparsify")


def dictionary_learning(case: Case) -> Compared:
    """dictionary_learning's TopKTrainer from our export."""
    return _continued(case, "dictionary_learning", "dictionary_learning")


def overcomplete(case: Case) -> Compared:
    """overcomplete's train_sae from the tensors of our export to sparsify, because it has no format of its own."""
    return _continued(case, "overcomplete", "sparsify")


@torch.no_grad()
def _continued(case: Case, tool: str, to: str) -> Compared:
    export, x = exported(case.checkpoint, case.folder, to), case.activations()
    theirs = run_tool(tool, case.folder / tool, case.given(export), {"x": x})
    ours = {}
    for name, rows in (("first_fvu", x[:BATCH]), ("last_fvu", x[-BATCH:])):
        running = RunningFvu(case.dictionary.d_out)
        running.update(rows, case.dictionary(rows))
        ours[name] = float(running.value())
    return Compared({"first_fvu": (theirs["first_fvu"], ours["first_fvu"])}, theirs | {"untrained_last_fvu": ours["last_fvu"]})


class TokensAlone(LocalReplacement):
    """A local replacement model by circuit-tracer's rule: token nodes without position embeddings, which no node has."""

    @property
    def embeddings(self) -> torch.Tensor:
        return self.anatomy.W_E[self.token_ids]


def circuit_tracer(case: Case) -> Compared:
    """circuit-tracer's attribution on one prompt with our export, and its server, beside our graph of the same export.

    ``..._tokens_alone``: ours with its token nodes. ``edge_difference``: the largest difference between an edge of that graph
    and circuit-tracer's, divided by the largest edge.
    """
    export = exported(case.checkpoint, case.folder, "circuit_tracer")
    options = sparsary.CheckpointOptions(model=case.model.id, settings=dict(case.options.settings) | {"text.bos": "context"})
    graph = sparsary.attribution_graph(str(export), PROMPT, case.folder / "graph", context_tokens=0, options=options)
    opened = open_graph_target(str(export), options)
    ids = prompt_ids(opened, PROMPT)
    given = case.given(export) | {"graph": graph["json_path"], "port": _free_port(), "prompt": ids.tolist()}
    theirs = run_tool("circuit_tracer", case.folder / "circuit_tracer", given, {})
    names = ("replacement_score", "completeness_score")
    pairs = {name: (theirs[name], graph[name]) for name in names}
    alone = graph_of(TokensAlone(opened.replacement, ids, 1))
    pairs |= {
        f"{name}_tokens_alone": (theirs[name], value)
        for name, value in zip(names, (alone.scores().replacement, alone.scores().completeness), strict=True)
    }
    adjacency = load_file(case.folder / "circuit_tracer" / "graph.safetensors")["adjacency"]
    assert adjacency.shape == alone.adjacency.shape
    theirs["edge_difference"] = float((adjacency - alone.adjacency).abs().max() / adjacency.abs().max())
    return Compared(pairs | {"nodes": (theirs["nodes"], graph["n_nodes_all"])}, theirs)


@torch.no_grad()
def saedashboard(case: Case) -> Compared:
    """SAEDashboard's page and tables of eight latents, beside what ``features --neuronpedia`` computes on the same tokens."""
    export = exported(case.checkpoint, case.folder, "saelens")
    token_ids = case.scored_tokens(export)
    x = case.model.activations(token_ids, (case.hook,))[case.hook].flatten(0, 1).float()
    code, n_latents = case.dictionary.encode(x), case.dictionary.n_latents
    firings = code.firings(n_latents)
    latents = firings.argsort(descending=True, stable=True)[:64:8].tolist()
    blank = np.zeros(token_ids.shape, np.int64)
    moments = NeuronMoments(n_latents, x.shape[1])
    moments.update(ContextBatch(token_ids.numpy(), blank, blank, blank == 0, Cursor(0, 0)), x, code)
    neurons, aligned = moments.correlations(), alignment(case.dictionary.atoms)
    given = case.given(export) | {"latents": latents}
    theirs = run_tool("saedashboard", case.folder / "saedashboard", given, {"token_ids": token_ids})
    pairs = {}
    for latent, row in zip(latents, theirs.pop("rows"), strict=True):
        assert row["aligned"] == aligned.neurons[latent].tolist(), latent
        assert row["correlated"] == neurons.neurons[latent].tolist(), latent
        ours = {
            "density": float(firings[latent]) / len(x),
            "aligned_share": float(aligned.shares[latent][0]),
            "pearson": float(neurons.pearson[latent][0]),
            "cosine": float(neurons.cosine[latent][0]),
        }
        seen = {"density": row["density"], "aligned_share": row["aligned_shares"][0]}
        seen |= {"pearson": row["pearson"][0], "cosine": row["cosine"][0]}
        pairs |= {f"{latent}_{name}": (seen[name], value) for name, value in ours.items()}
    return Compared(pairs, theirs)


class WordJudge(Chat):
    """The judge of run_tools.py's ``delphi``, for ours: it explains a latent by a word, and looks for it in excerpts."""

    def __init__(self, word: str):
        self.name, self.usage, self.word = "word judge", LlmUsage(), word

    def require_ready(self) -> None:
        pass

    def close(self) -> None:
        pass

    def answer(self, system: str, prompt: str) -> str:
        if "Description: " not in prompt:
            return f"EXPLANATION: {self.word}"
        excerpts = prompt.split("Excerpt ")[1:]
        return json.dumps([int(self.word in re.split(r"\s|<<|>>", one.partition(":")[2])) for one in excerpts])


def delphi(case: Case) -> Compared:
    """delphi's detection scores of words as explanations, beside ours of the same latents, words and text, by one judge."""
    export = exported(case.checkpoint, case.folder, "sparsify")
    pass_ = described_checkpoint(open_checkpoint(str(export), case.options).completed(), case.tokens)
    words, ours, firings = {}, {}, {}
    for record in pass_.described.records():
        told = record["top_tokens"][:1]
        if record["dead"] or not told or len(told[0]["token"].strip()) < 2 or len(words) == 8:
            continue
        shown = evidence(pass_.described.collected, pass_.described.words, record["latent"])
        if isinstance(shown, str):
            continue
        words[record["latent"]] = told[0]["token"].strip()
        score = score_explanations(shown, *[WordJudge(words[record["latent"]])] * 2)
        ours[record["latent"]], firings[record["latent"]] = score.detection, record["firings"]
    text = [json.loads(line)["text"] for line in Path(case.options.text[0]).read_text().splitlines()]
    ids = torch.tensor([case.model.tokenizer(one, add_special_tokens=False)["input_ids"] for one in text])
    ids = ids[: pass_.about["tokens"] // LENGTH]
    given = case.given(export) | {"latents": list(words), "words": list(words.values())}
    theirs = run_tool("delphi", case.folder / "delphi", given, {"token_ids": ids})
    pairs = {f"{latent}_firings": (count, firings[latent]) for latent, count in zip(words, theirs.pop("firings"), strict=True)}
    found = theirs.pop("detection")
    pairs |= {f"{latent}_detection": (found[str(latent)], ours[latent]) for latent in words if str(latent) in found}
    known = [latent for latent in words if str(latent) in found]
    means = sum(found[str(latent)] for latent in known) / len(known), sum(ours[latent] for latent in known) / len(known)
    return Compared(pairs | {"mean_detection": means}, theirs)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


TOOLS: dict[str, Callable[[Case], Compared]] = {
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens that are scored")
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    arguments = parser.parse_args()
    if not PEERS_PYTHON.exists():
        raise SystemExit("needs the peers' environment, .venv-peers: make peers")
    with tempfile.TemporaryDirectory() as folder:
        found = TOOLS[arguments.tool](Case(arguments.checkpoint, Path(folder), arguments.tokens))
    width = max(map(len, found.pairs))
    print(f"{'':{width}}  {'theirs':>12}  {'ours':>12}")
    for name, (theirs, ours) in found.pairs.items():
        print(f"{name:{width}}  {theirs:12.6g}  {ours:12.6g}")
    rest = {name: value for name, value in found.theirs.items() if name not in found.pairs}
    print(", ".join(f"{name} {value:.6g}" for name, value in rest.items()))
    if arguments.out is not None:
        told = {name: {"theirs": theirs, "ours": ours} for name, (theirs, ours) in found.pairs.items()}
        arguments.out.write_text(json.dumps({"figures": told, "theirs": found.theirs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
