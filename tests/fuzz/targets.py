"""Fuzzing targets: readers of files, each with valid files to damage, and the damage.

A reader must return, or raise a ``ValueError`` of this package, whatever the bytes are: no other exception, no hang, no memory
beyond ``MEMORY_BYTES``. ``atheris_fuzz.py`` and ``test_fuzz.py`` share this file.
"""

import json
import logging
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MEMORY_BYTES = 1 << 30
HOOK = "transformer.h.2:out"


@dataclass(frozen=True)
class Target:
    """Files that ``build`` writes into a folder, and ``read``, which reads the folder after one of ``names`` was damaged."""

    name: str
    names: tuple[str, ...]
    build: Callable[[Path], None]
    read: Callable[[Path], Any]


class Finding(AssertionError):  # noqa: N818 - it is no error of the fuzzer
    """Raised when a reader broke its promise."""


# Damage of bytes, then of what the bytes mean.

ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"))
ODD = (*ODD_NUMBERS, None, True, "", "x" * 5000, "../../x", "\ud800", "\0", [], {}, [[]], {"": {}}, [None] * 50, "1e-4", "é")


def _bytes(content: bytes, draw: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(out)) if out else 0
        match draw.randrange(6):
            case 0 if out:
                out[place] ^= 1 << draw.randrange(8)
            case 1 if out:
                out[place] = draw.choice((0, 10, 34, 44, 58, 91, 123, 127, 255))
            case 2:
                del out[place:]
            case 3:
                del out[place : place + draw.randrange(1, 40)]
            case 4:
                out[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
            case _:
                out[place:place] = out[place : place + draw.randrange(1, 200)]
    return bytes(out)


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in entries:
        yield (*above, key)
        yield from _places(below, (*above, key))


def _values(value: Any, draw: random.Random) -> Any:
    """Replace, remove or rename something in nested values."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2))):
        places = list(_places(value))
        if not places:
            return draw.choice(ODD)
        *above, key = draw.choice(places)
        parent = value
        for step in above:
            parent = parent[step]
        match draw.randrange(5):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw.choice(("", "x", str(key).upper(), "__class__"))] = parent.pop(key)
            case 2:
                nested: Any = parent[key]
                for _ in range(draw.choice((1, 3, 300))):
                    nested = [nested] if draw.random() < 0.5 else {"a": nested}
                parent[key] = nested
            case _:
                parent[key] = draw.choice(ODD)
    return value


def _json(content: bytes, draw: random.Random) -> bytes:
    return json.dumps(_values(json.loads(content), draw)).encode("utf-8", "surrogatepass")


def _json_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines()
    place = draw.randrange(len(lines))
    lines[place] = _json(lines[place], draw)
    return b"\n".join(lines) + b"\n"


def _safetensors(content: bytes, draw: random.Random) -> bytes:
    """Damage the header's values, metadata that are JSON included, and keep its length right."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    inner = [key for key, text in header.get("__metadata__", {}).items() if text.startswith("{")]
    # A checksum would only be found to differ.
    header.get("__metadata__", {}).pop("crc32", None)
    if inner and draw.random() < 0.5:
        key = draw.choice(inner)
        header["__metadata__"][key] = json.dumps(_values(json.loads(header["__metadata__"][key]), draw))
    else:
        header = _values(header, draw)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = len(text) if draw.random() < 0.9 else draw.choice((0, 7, 2**20, 2**40, 2**63))
    return size.to_bytes(8, "little") + text + content[8 + length :]


MEANT = {".json": _json, ".yaml": _json, ".jsonl": _json_lines, ".safetensors": _safetensors}


def damaged(name: str, content: bytes, draw: random.Random) -> bytes:
    """Return a damaged copy of a file's content, by bytes or by meaning."""
    meant = MEANT.get(Path(name).suffix)
    if meant is not None and draw.random() < 0.6:
        # Recipes may be YAML that is no JSON.
        with suppress(json.JSONDecodeError):
            return meant(content, draw)
    return _bytes(content, draw)


# Running a reader.


@contextmanager
def limited_memory() -> Iterator[None]:
    """Refuse memory beyond what is in use and ``MEMORY_BYTES``."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(target: Target, folder: Path) -> None:
    """Read a damaged folder.

    Raises:
        Finding: If the reader neither returned nor told the user what is wrong.
    """
    import sparsary

    logger = logging.getLogger("sparsary")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with limited_memory():
            target.read(folder)
    except ValueError as error:
        if not sparsary._is_ours(error):
            raise Finding(f"{target.name}: {type(error).__name__} of a library: {str(error)[:500]}") from error
        if not str(error).strip() or len(str(error)) > 20_000:
            raise Finding(f"{target.name}: a message of {len(str(error))} characters") from error
    except Exception as error:
        raise Finding(f"{target.name}: {type(error).__name__}: {str(error)[:500]}") from error
    finally:
        logger.setLevel(level)


def copied(valid: Path, folder: Path) -> Path:
    """Replace ``folder`` by a copy of valid files."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(valid, folder))


def disturb(target: Target, valid: Path, folder: Path, draw: random.Random) -> None:
    """Copy valid files to ``folder``, with one of them damaged."""
    copied(valid, folder)
    path = folder / draw.choice(target.names)
    path.write_bytes(damaged(path.name, path.read_bytes(), draw))


# Targets.

RECIPE: dict[str, Any] = {
    "text": {"context_length": 32, "files": ["text.txt"]},
    "harvest": {"hooks": [HOOK], "tokens": 1000, "store": "store", "heldout": 0.05},
    "dictionary": {"hook": HOOK, "n_latents": 19, "encoder": {"name": "topk", "k": 3}},
    "phases": [{"start": 0.5, "encoder": {"name": "topk", "k": 2}}],
    "tokens": 400,
    "batch_tokens": 100,
    "lr": 1e-3,
    "out_dir": "run",
}


def _write_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | {"grid": {"seed": [0, 1], "dictionary.encoder.k": [2, 3]}}))


def _read_recipe(folder: Path) -> None:
    from sparsary.training.recipe import dump_recipe
    from sparsary.training.recipe.grid import load_grid

    for recipe in load_grid(folder / "recipe.yaml").recipes:
        dump_recipe(recipe)


def _write_overrides(folder: Path) -> None:
    (folder / "overrides.txt").write_text("dictionary.encoder.k=4\nlr=1e-4\nharvest.exclude_leading=3\nout_dir=x\n")
    _write_recipe(folder)


def _read_overrides(folder: Path) -> None:
    from sparsary.training.recipe import parse_overrides
    from sparsary.training.recipe.grid import load_grid

    arguments = (folder / "overrides.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    load_grid(folder / "recipe.yaml", parse_overrides([each for each in arguments if each]))


def _write_store(folder: Path) -> None:
    import torch

    from sparsary.sae.files import sha256, write_json, write_tensors

    generator = torch.Generator().manual_seed(0)
    shards = []
    for split, rows in (("train", 37), ("heldout", 11)):
        labels = {name: torch.arange(rows, dtype=torch.int32) for name in ("token", "document", "position", "offset")}
        path = folder / f"{split}-00000.safetensors"
        x = {f"x:{HOOK}": torch.randint(-9, 9, (rows, 6), generator=generator).to(torch.int8)}
        scale = {f"scale:x:{HOOK}": torch.rand(rows, 2, generator=generator).half()}
        write_tensors(path, labels | x | scale, {"split": split})
        entry = {"name": path.name, "split": split, "unit": 0, "tokens": rows}
        shards.append(entry | {"bytes": path.stat().st_size, "sha256": sha256(path)})
    statistics = {"width": 6, "count": 37, "mean": [0.0] * 6, "deviation": [1.0] * 6, "rounding_fvu": 0.0}
    manifest = {"format": "sparsary-store", "format_version": 1, "dtype": "int8", "block": 3, "gradients": None}
    manifest |= {"model": {"id": "m", "revision": None, "dtype": "float32"}, "complete": True, "cursor": [3, 4]}
    write_json(folder / "manifest.json", manifest | {"hooks": {HOOK: statistics}, "shards": shards, "skipped": {}})


def _read_store(folder: Path) -> None:
    from sparsary.training.activations.shards import ActivationStore
    from sparsary.training.activations.store_stream import StoreStream

    store = ActivationStore.open(folder)
    store.problems()
    stream = StoreStream(store, (HOOK,), 7, seed=0, labels=True)
    try:
        for _ in range(3):
            next(stream)
        stream.sample(9)
        stream.moments()
    finally:
        stream.release()


@cache
def _rows() -> Any:
    import torch

    return torch.randn(500, 6, generator=torch.Generator().manual_seed(0))


def _trained(folder: Path, steps: int | None = None) -> None:
    """Train to the end, or be stopped after some steps."""
    from unittest import mock

    import sparsary
    from sparsary.training.signals import Stopped, StopRequest

    values = {key: value for key, value in RECIPE.items() if key not in ("text", "harvest", "dictionary", "out_dir")}
    values["dictionary"] = {"n_latents": 19, "encoder": {"name": "topk", "k": 3}}
    left = [10**6 if steps is None else steps]

    def requested(stop: Any) -> bool:
        left[0] -= 1
        stop.signal_number = 15 if left[0] < 0 else None
        return left[0] < 0

    with mock.patch.object(StopRequest, "requested", property(requested)):
        try:
            sparsary.train(values | {"log_every": 1, "calibration_tokens": 100}, _rows(), out_dir=str(folder / "run"))
        except Stopped:
            assert steps is not None


def _write_run(folder: Path) -> None:
    _trained(folder, 3)


def _write_dictionary(folder: Path) -> None:
    import torch

    from sparsary.sae import ENCODERS, SAE
    from sparsary.sae.training_usage import TrainingUsage

    dictionary = SAE(6, 19, ENCODERS["topk"](k=3))
    dictionary.training_usage = TrainingUsage(torch.zeros(19, dtype=torch.long), 100, 400)
    dictionary.save(folder, {"model": None, "recipe": RECIPE})


def _read_dictionary(folder: Path) -> None:
    import torch

    import sparsary

    dictionary = sparsary.load(folder)
    dictionary(torch.zeros(2, dictionary.d_in))
    sparsary.info(folder)


def _write_metrics(folder: Path) -> None:
    lines = [{"fvu": 0.5 / step, "loss": 2.0, "step": step, "tokens": 100 * step, "lr": 1e-3} for step in range(1, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_metrics(folder: Path) -> None:
    """Continue a log whose saved state says that it had 20 whole lines, then read what is there."""
    from sparsary.training.recipe import check_recipe
    from sparsary.training.report import TrainingLog
    from sparsary.training.state import Logged

    whole = folder / "metrics.jsonl"
    before = whole.read_bytes()
    values = {key: value for key, value in RECIPE.items() if key != "phases"}
    log = TrainingLog(check_recipe(values, "recipe"), folder, Logged(1200), 2000)
    log.handle.write("{}\n")
    log.flush()
    log.close()
    text = whole.read_bytes()
    if b"\0" in text[len(before) :]:
        raise Finding("metrics.jsonl: zeros where no line was written")
    if len(text) > 1200 + 3 + 1:
        raise Finding(f"metrics.jsonl: {len(text)} bytes are left of 1200")


def _write_tasks(folder: Path) -> None:
    record = {"clean": "The cat sat on the", "corrupted": "The dog sat on the", "answers": [" a"], "foils": [" the"]}
    more = record | {"position": 3, "task": "t", "metric": "logit_diff", "roles": {"subject": 1}}
    asked = {"clean": record["clean"], "corrupted": record["corrupted"]}
    asked["questions"] = [{"position": 2, "answers": [" a"], "foils": [" the"]}]
    tokens = {"clean": [5, 6, 7], "corrupted": [5, 8, 7], "answers": [9], "foils": [10]}
    (folder / "task.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (record, record, more, tokens)))
    (folder / "asked.jsonl").write_text(json.dumps(asked) + "\n")


@cache
def _model() -> Any:
    from sparsary.training.activations.model import load_model
    from sparsary.training.recipe import ModelSection

    return load_model(ModelSection(device="cpu"))


def _read_tasks(folder: Path) -> None:
    from sparsary.eval.circuits.tasks.files import read_pairs

    for name in ("task.jsonl", "asked.jsonl"):
        try:
            read_pairs(folder / name, _model())
        except ValueError as error:
            import sparsary

            if not sparsary._is_ours(error):
                raise


TARGETS = {
    target.name: target
    for target in (
        Target("recipe", ("recipe.yaml",), _write_recipe, _read_recipe),
        Target("overrides", ("overrides.txt",), _write_overrides, _read_overrides),
        Target("manifest", ("manifest.json",), _write_store, _read_store),
        Target("shard", ("train-00000.safetensors",), _write_store, _read_store),
        Target(
            "checkpoint",
            ("dictionary.safetensors", "dictionary.json", "usage.safetensors"),
            _write_dictionary,
            _read_dictionary,
        ),
        Target(
            "resumed run",
            ("run/state.safetensors", "run/recipe.yaml", "run/metrics.jsonl", "run/dictionary.json"),
            _write_run,
            _trained,
        ),
        Target("metrics", ("metrics.jsonl",), _write_metrics, _read_metrics),
        Target("task file", ("task.jsonl", "asked.jsonl"), _write_tasks, _read_tasks),
    )
}
