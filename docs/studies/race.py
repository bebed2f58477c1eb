"""Race from text to a trained SAE: sparsary, SAELens and sparsify on a GPT-2 small with random weights, one after the other.

    make peers
    .venv/bin/python docs/studies/race.py --text TEXT.jsonl --tokenizer openai-community/gpt2 --tokens 90112 --json race.json

TopK, 24,576 latents, k 32, on the output of block 5 of 12; contexts of 128 tokens, steps of 2,048, one pass. The model is
built from GPT-2's configuration and saved as a Hugging Face directory; TEXT.jsonl has a {"text": ...} per line, of which as
much is given to each library as it needs. All of them train on every token, special ones included. What else there is to set
is each library's default; `race_runs.py` says how the others are run. Ours streams from the model, as theirs do; ``--library
stored`` runs ours with a store on disk in between.

Prints a row per library: wall time of its process from start to saved SAE, processor time, peak resident memory, largest size
of its files on disk (the model's and the text's not counted), and held-out fvu, as a sign that it was trained: rates and
optimizers are each library's own and were not tuned. Then the ratios to the first row. Times are of one run on a machine that
should be otherwise idle.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# The standard library only: a child's peak memory is at least that of the process that starts it.
ROOT = Path(__file__).parents[2]
RUNS = Path(__file__).with_name("race_runs.py")
CONTEXT, BATCH, LATENTS, K, LAYER = 128, 2048, 24_576, 32, 5
LIBRARIES = ("sparsary", "stored", "saelens", "sparsify")
# Shuffle buffer of ours, half of its default, as a buffer is computed whole: give --tokens a little below a multiple of it.
BUFFER = 32_768
# Seconds between two looks at the files.
PAUSE = 0.25


def folder_bytes(folder: Path) -> int:
    """Return the size of all files of a folder; files that vanish meanwhile do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def measured(command: list[str], folder: Path, threads: int) -> dict[str, float]:
    """Run a command, and return its seconds, processor seconds, peak resident bytes, and its folder's largest size.

    Raises:
        SystemExit: If the command fails.
    """
    own = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1"}
    env = os.environ | own | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    start, disk = time.perf_counter(), 0
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=folder)
        while True:
            # wait4 has the peak memory of this child alone.
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            disk = max(disk, folder_bytes(folder))
            if done:
                break
            time.sleep(PAUSE)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: failed with status {process.returncode}. Read {folder / 'log.txt'}.")
    unit = 1 if sys.platform == "darwin" else 1024
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "processor_seconds": processor, "memory_bytes": usage.ru_maxrss * unit, "disk_bytes": disk}


def recipe(work: Path, tokens: int, stored: bool) -> dict[str, Any]:
    """Return our recipe: the defaults, but every token of the text, as in the other libraries."""
    hook = f"transformer.h.{LAYER}:out"
    harvest: dict[str, Any] = {"hooks": [hook], "heldout": 0.0, "exclude_special": False, "exclude_leading": 0}
    harvest["live_buffer_tokens"] = BUFFER
    if stored:
        harvest |= {"tokens": tokens, "store": "activations", "dtype": "int8"}
    return {
        "model": {"id": str(work / "model")},
        "text": {"source": "files", "files": [str(work / "text.jsonl")], "context_length": CONTEXT},
        "harvest": harvest,
        "dictionary": {"hook": hook, "n_latents": LATENTS, "encoder": {"name": "topk", "k": K}},
        "tokens": tokens,
        "batch_tokens": BATCH,
        "lr_warmup_steps": max(1, tokens // BATCH // 10),
        # TopK has no thresholds; the scale is measured on the first buffer, which is computed anyway.
        "calibration_tokens": min(tokens, BUFFER),
        "out_dir": "sae",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a text each")
    parser.add_argument("--tokenizer", required=True, help="tokenizer of GPT-2: a directory or a hub id")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens")
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=["sparsary", "saelens", "sparsify"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="the peers' Python")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "race", help="folder of the model and of all runs")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    work = options.work.resolve()
    # Whole steps, so that all do the same number of them.
    tokens = -(-options.tokens // BATCH) * BATCH
    work.mkdir(parents=True, exist_ok=True)
    sizes = {"tokens": tokens, "context": CONTEXT, "batch": BATCH, "latents": LATENTS, "k": K, "layer": LAYER}
    order = sizes | {"text": str(options.text.resolve()), "tokenizer": options.tokenizer, "work": str(work)}
    (work / "order.json").write_text(json.dumps(order) + "\n")
    runs = [str(RUNS), str(work / "order.json")]
    subprocess.run([sys.executable, *runs, "prepare"], check=True)
    found: dict[str, dict[str, float]] = {}
    for library in options.library:
        folder = work / library
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if library in ("sparsary", "stored"):
            # JSON is YAML too.
            (folder / "recipe.yaml").write_text(json.dumps(recipe(work, tokens, library == "stored")) + "\n")
            command = [sys.executable, "-m", "sparsary", "train", "recipe.yaml"]
        else:
            # Not resolved: the link's target would be the Python outside the environment.
            command = [str(options.peers.absolute()), *runs, library]
        found[library] = measured(command, folder, options.threads)
        judged = subprocess.run([sys.executable, *runs, "judge", library], check=True, stdout=subprocess.PIPE, text=True)
        found[library] |= json.loads(judged.stdout)
        print(library, json.dumps(found[library]), flush=True)
    print(f"\n{tokens:,} tokens, {options.threads} threads\n")
    print("| library | seconds | processor seconds | memory, GB | disk, GB | held-out fvu |\n|" + "---|" * 6)
    for library, row in found.items():
        cells = [f"{row['seconds']:.0f}", f"{row['processor_seconds']:.0f}"]
        cells += [f"{row[key] / 1e9:.2f}" for key in ("memory_bytes", "disk_bytes")]
        print(f"| {library} | {' | '.join(cells)} | {row['fvu']:.3f} |")
    first, *others = found
    for library in others:
        ratios = [f"{found[library][key] / found[first][key]:.2f}" for key in ("seconds", "processor_seconds", "memory_bytes")]
        print(f"{library} : {first}  seconds {ratios[0]}, processor {ratios[1]}, memory {ratios[2]}")
    if options.json:
        options.json.write_text(json.dumps(sizes | {"threads": options.threads, "libraries": found}) + "\n")


if __name__ == "__main__":
    main()
