"""Activations of ``compare_families.py``: how dictionaries on them are trained here and judged."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsary.eval.heldout import TextBatch, text_batches
from sparsary.eval.synthetic.recovery import Recovery
from sparsary.eval.synthetic.truth import SCORED_SEED, Samples, truth_set
from sparsary.training.activations.harvest import harvest_activations
from sparsary.training.activations.hooked_model import next_token_loss
from sparsary.training.activations.model import LanguageModel, load_model
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.recipe import Recipe, check_recipe, load_recipe
from sparsary.training.text import Cursor

ROOT = Path(__file__).parents[2]
WARMUP, DECAY = 100, 0.2
DEAD_TOKENS, SCORED_TOKENS = 100_000, 15_000
# Samples of planted features: enough for the rarest to fire, as a latent that does not counts as an F1 of 0.
SAMPLES = 200_000
RECOVERY = ("latent_f1", "detector_f1", "distinct_features", "mcc")
# The cross-entropy costs a forward pass for each dictionary, so it is that of the first held-out tokens.
LOSS_TOKENS = 131_072
SAMPLER = ROOT / "docs" / "studies" / "sample_text.py"
TRANSCODERS = ("transcoder", "skip_transcoder")


@dataclass(frozen=True)
class Case:
    """Activations with a folder for them, and how dictionaries on them are trained and judged."""

    name: str
    folder: Path
    n_latents: int
    k: int
    lr: float
    batch: int
    steps: int

    @property
    def tokens(self) -> int:
        return self.batch * self.steps

    @property
    def prefixes(self) -> list[int]:
        """Widths of Matryoshka's nested dictionaries."""
        return [self.n_latents // n for n in (16, 8, 4, 2, 1)]

    @cached_property
    def train(self) -> dict[str, Tensor]:
        return load_file(self.folder / "train.safetensors")

    @cached_property
    def heldout(self) -> dict[str, Tensor]:
        return load_file(self.folder / "heldout.safetensors")

    def recipe(self, family: str, knob: float, seed: int, out_dir: Path) -> Recipe:
        """Return the recipe of a run here."""
        raise NotImplementedError

    @property
    def judges_codes(self) -> bool:
        """True if ``judge`` reads ``rows``, ``latents`` and ``values``, a held-out code's entries, beside ``y_hat``."""
        return False

    def judge(self, outputs: Mapping[str, Tensor]) -> dict[str, float]:
        """Return figures that only these activations have."""
        raise NotImplementedError


@dataclass(frozen=True)
class OfModel(Case):
    """Case of a language model, with its recipes' folder.

    ``hooks`` are those that dictionaries read and write, ``stored`` is the number of harvested tokens as a multiple of those of
    a run, ``scored`` that of held-out tokens; with ``sampled``, a file that is made if it is missing, these are stories sampled
    from the model itself. Transcoders keep their recipes' learning rate, which is larger than that of SAEs.
    """

    hooks: tuple[str, str] = ("transformer.h.2:out", "transformer.h.2:out")
    recipes: str = "embedded"
    stored: float = 2.0
    scored: int = SCORED_TOKENS
    sampled: Path | None = None

    @cached_property
    def source(self) -> Recipe:
        return load_recipe(ROOT / "recipes" / self.recipes / "topk.yaml", {"harvest.gradients": False})

    @cached_property
    def model(self) -> LanguageModel:
        return load_model(self.source.model)

    @cached_property
    def text(self) -> list[TextBatch]:
        text, section = self.source.text, self.source.harvest
        if self.sampled is not None:
            # Ends at once if the file has enough. A fiftieth more, for special tokens and documents that are not held out.
            tokens = ["--tokens", str(self.scored + self.scored // 50), "--out", str(self.sampled)]
            subprocess.run([sys.executable, str(SAMPLER), "--model", self.source.model.id, *tokens], check=True)
            text = text.model_copy(update={"files": [str(self.sampled)]})
            section = section.model_copy(update={"heldout": 0.9999})
        return list(text_batches(self.model, text, section, Cursor(0, 0), self.scored))

    def prepare(self) -> None:
        """Write the splits that are missing: training rows in their order, held-out rows in text order."""
        names = ("x", "y") if self.hooks[0] != self.hooks[1] else ("x",)
        hooks: dict[str, str] = dict(zip(names, self.hooks, strict=False))
        if not (self.folder / "train.safetensors").exists():
            self._prepare_train(hooks)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for batch in self.text:
            seen = self.model.activations(batch.token_ids, tuple(hooks.values()))
            for name, hook in hooks.items():
                found[name].append(seen[hook][batch.kept].float())
        heldout = {name: torch.cat(parts) for name, parts in found.items()}
        if len(heldout["x"]) < self.scored:
            raise SystemExit(
                f"{self.name}: expected {self.scored:,} held-out tokens, got {len(heldout['x']):,}. Sample more stories."
            )
        save_file(heldout, self.folder / "heldout.safetensors")

    def _prepare_train(self, hooks: Mapping[str, str]) -> None:
        section = self.source.harvest.model_copy(
            update={
                "hooks": tuple(hooks.values()),
                "tokens": round(self.stored * self.tokens),
                "store": str(self.folder / "store"),
            }
        )
        store = harvest_activations(self.model, self.source.text, section)
        stream = StoreStream(store, self.hooks[:1], 1, seed=0, hooks_out=self.hooks[1:] if len(hooks) > 1 else ())
        rows = np.concatenate([stream.order(i, self.batch) for i in range(0, self.tokens, self.batch)])
        roles = {"x": "x", "y": "target"}
        save_file({name: stream.rows[roles[name]].gather(rows) for name in hooks}, self.folder / "train.safetensors")
        stream.release()

    def recipe(self, family: str, knob: float, seed: int, out_dir: Path) -> Recipe:
        of_mlps = {"transcoder": "transcoder", "skip_transcoder": "skip"}
        path = f"transcoders/{self.recipes}/{of_mlps[family]}" if family in of_mlps else f"{self.recipes}/{family}"
        file = ROOT / "recipes" / f"{path}.yaml"
        overrides: dict[str, Any] = {"dictionary.n_latents": self.n_latents}
        if family == "matching_pursuit":
            # As SAELens trains.
            overrides["dictionary.encoder.unit_norm"] = False
        if family not in TRANSCODERS:
            overrides["harvest.gradients"] = False
        recipe = load_recipe(file, overrides | _budget(load_recipe(file, overrides).dictionary.encoder, knob))
        schedule: dict[str, Any] = {
            "tokens": self.tokens,
            "batch_tokens": self.batch,
            "lr": recipe.lr if family in TRANSCODERS else self.lr,
            "lr_warmup_steps": WARMUP,
            "lr_decay": DECAY,
        }
        logs = {"dead_after_tokens": DEAD_TOKENS, "log_every": 1000, "save_every": 10_000}
        return recipe.model_copy(update=schedule | logs | {"seed": seed, "out_dir": str(out_dir)})

    def judge(self, outputs: Mapping[str, Tensor]) -> dict[str, float]:
        clean, mean = self.baselines
        return {"ce_recovered": (mean - self.loss(outputs["y_hat"])) / (mean - clean)}

    @cached_property
    def baselines(self) -> tuple[float, float]:
        """Loss of the unmodified model, and with the mean of the hook in place of its values."""
        y = self.heldout.get("y", self.heldout["x"])
        return self.loss(None), self.loss(y.mean(0).expand_as(y))

    @torch.no_grad()
    def loss(self, rows: Tensor | None) -> float:
        """Return the model's mean loss in nats, with rows in place of the kept activations if they are given.

        On the first ``LOSS_TOKENS`` held-out tokens, or all.
        """
        total, count, start = 0.0, 0, 0
        for batch in self.text:
            if start >= LOSS_TOKENS:
                break
            size = int(batch.kept.sum())
            change = {} if rows is None else {self.hooks[1]: _placing(rows[start : start + size], batch.kept)}
            with self.model.hooked(change):
                loss = next_token_loss(self.model.logits(batch.token_ids), batch.token_ids)[batch.counted]
            total, count, start = total + float(loss.double().sum()), count + len(loss), start + size
        return total / count


def _placing(rows: Tensor, kept: Tensor) -> Callable[[Tensor], Tensor]:
    def placed(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[kept] = rows.to(x.dtype)
        return changed

    return placed


def _budget(encoder: Mapping[str, Any], knob: float) -> dict[str, Any]:
    """Return the recipe's key for the sparsity, and its value."""
    return {"dictionary.encoder.target_l0": knob} if "target_l0" in encoder else {"dictionary.encoder.k": round(knob)}


@dataclass(frozen=True)
class PlantedCase(Case):
    """Case of planted features; the data of seed 0 for all."""

    @property
    def judges_codes(self) -> bool:
        return True

    @cached_property
    def truth(self) -> Any:
        return truth_set("synth_sae_bench_small")

    @cached_property
    def sample(self) -> Any:
        return self.truth.planted(0).sample(SAMPLES, SCORED_SEED)

    def prepare(self) -> None:
        """Draw and write both splits."""
        x = torch.cat([x for x in Samples(self.truth.planted(0), self.tokens, self.batch, 0) if isinstance(x, Tensor)])
        save_file({"x": x}, self.folder / "train.safetensors")
        save_file({"x": self.sample.x.contiguous()}, self.folder / "heldout.safetensors")

    def recipe(self, family: str, knob: float, seed: int, out_dir: Path) -> Recipe:
        encoder = dict(load_recipe(ROOT / "recipes" / "embedded" / f"{family}.yaml").dictionary.encoder)
        hook = "planted:out"
        values = {
            "harvest": {"hooks": [hook], "tokens": 1},
            "dictionary": {"hook": hook, "n_latents": self.n_latents, "encoder": encoder, "init": "random"},
            "tokens": self.tokens,
            "batch_tokens": self.batch,
            "lr": self.lr,
            "lr_warmup_steps": WARMUP,
            "lr_decay": DECAY,
            "dead_after_tokens": DEAD_TOKENS,
            "calibration_tokens": 50 * self.batch,
            "log_every": 1000,
            "save_every": 10_000,
            "seed": seed,
            "out_dir": str(out_dir),
        }
        for key, value in _budget(encoder, knob).items():
            encoder[key.rpartition(".")[2]] = value
        return check_recipe(values, family)

    def judge(self, outputs: Mapping[str, Tensor]) -> dict[str, float]:
        recovery = Recovery(self.truth.planted(0), outputs["W_dec"].float())
        latents = torch.zeros(len(self.sample.x), self.n_latents)
        latents[outputs["rows"], outputs["latents"]] = outputs["values"]
        recovery.update(latents, self.sample, outputs["y_hat"])
        return {key: value for key, value in recovery.report().items() if key in RECOVERY}
