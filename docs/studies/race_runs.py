"""Parts of ``race.py``, each in a process of its own.

    race_runs.py ORDER.json (prepare | saelens | sparsify | judge LIBRARY)

``prepare`` and ``judge`` run in this project's environment, the others in the peers'. Each library's own entry point is used,
with its defaults but for the sizes:

- saelens: ``LanguageModelSAETrainingRunner`` on a model of transformers, which it stops after the hook; no logging, no
  checkpoints.
- sparsify: ``chunk_and_tokenize`` and ``Trainer.fit``, as its command line does, which itself wants a GPU; no logging. Its
  Trainer runs all blocks of the model.
"""

# The libraries are installed in the peers' environment only, sparsary in its own.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

# Contexts on which the trained SAEs are judged, from documents that no library trains on.
JUDGED_CONTEXTS = 16
# The text that is given to the libraries is this much longer than what they need, as some drop a part of it.
SPARE = 1.1


def texts_of(path: str) -> list[str]:
    """Return the texts of a file of JSON lines."""
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines if line.strip()]


def prepare(order: dict[str, Any]) -> None:
    """Write the model, the text to train on, and the token ids to judge on.

    Raises:
        SystemExit: If the text is too short.
    """
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    work = Path(order["work"])
    tokenizer = AutoTokenizer.from_pretrained(order["tokenizer"], trust_remote_code=False)
    texts = texts_of(order["text"])
    heldout, size = [], order["context"] - 1
    while texts and len(heldout) < JUDGED_CONTEXTS:
        ids = tokenizer(texts.pop())["input_ids"]
        heldout += [[tokenizer.eos_token_id, *ids[i : i + size]] for i in range(0, len(ids) - size, size)]
    counted, needed, kept = 0, SPARE * order["tokens"], []
    for text in texts:
        if counted >= needed:
            break
        kept.append(text)
        counted += len(tokenizer(text)["input_ids"])
    if counted < needed:
        raise SystemExit(
            f"--text: expected {needed:,.0f} tokens besides those that judge, got {counted:,}. Give more, or lower --tokens."
        )
    with (work / "text.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in kept)
    (work / "heldout.json").write_text(json.dumps(heldout[:JUDGED_CONTEXTS]) + "\n")
    if not (work / "model" / "config.json").exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")


def saelens(order: dict[str, Any]) -> None:
    """Train by ``LanguageModelSAETrainingRunner``."""
    from datasets import load_dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig

    work = Path(order["work"])
    width = json.loads((work / "model" / "config.json").read_text())["n_embd"]
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=width, d_sae=order["latents"], k=order["k"]),
        model_name=str(work / "model"),
        model_class_name="AutoModelForCausalLM",
        hook_name=f"transformer.h.{order['layer']}",
        is_dataset_tokenized=False,
        context_size=order["context"],
        training_tokens=order["tokens"],
        train_batch_size_tokens=order["batch"],
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path="sae",
        verbose=False,
    )
    text = load_dataset("json", data_files=str(work / "text.jsonl"), split="train", streaming=True, trust_remote_code=False)
    LanguageModelSAETrainingRunner(cfg, override_dataset=text).run()


def sparsify(order: dict[str, Any]) -> None:
    """Train by ``Trainer.fit``."""
    from datasets import load_dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from sparsify.data import chunk_and_tokenize
    from transformers import AutoModel, AutoTokenizer

    work = Path(order["work"])
    model = AutoModel.from_pretrained(work / "model", trust_remote_code=False)
    text = load_dataset("json", data_files=str(work / "text.jsonl"), split="train", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(work / "model", trust_remote_code=False)
    chunks = chunk_and_tokenize(text, tokenizer, max_seq_len=order["context"], num_proc=1)
    # The seed of its command line.
    chunks = chunks.shuffle(42).with_format("torch").select(range(order["tokens"] // order["context"]))
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=order["latents"], k=order["k"]),
        batch_size=order["batch"] // order["context"],
        hookpoints=[f"h.{order['layer']}"],
        log_to_wandb=False,
        run_name="sae",
        save_dir=".",
    )
    Trainer(cfg, chunks, model).fit()


@torch.no_grad()
def judge(order: dict[str, Any], library: str) -> None:
    """Print the held-out fvu of a library's SAE."""
    from transformers import AutoModel

    import sparsary
    from sparsary.sae.metrics import fvu

    work = Path(order["work"])
    token_ids = torch.tensor(json.loads((work / "heldout.json").read_text()))
    model = AutoModel.from_pretrained(work / "model", trust_remote_code=False).eval()
    # The first of the hidden states is the embedding.
    hidden = [model(ids, output_hidden_states=True).hidden_states[order["layer"] + 1] for ids in token_ids.split(16)]
    x = torch.cat(hidden)[:, 1:].flatten(0, 1)
    folder = work / library / "sae"
    sae = sparsary.load(folder / f"h.{order['layer']}" if library == "sparsify" else folder)
    assert isinstance(sae, sparsary.SparseDictionary)
    print(json.dumps({"fvu": float(fvu(x, torch.cat([sae(rows) for rows in x.split(1024)])))}))


def main() -> None:
    order, verb, *rest = sys.argv[1:]
    settings = json.loads(Path(order).read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    {"prepare": prepare, "saelens": saelens, "sparsify": sparsify, "judge": judge}[verb](settings, *rest)


if __name__ == "__main__":
    main()
