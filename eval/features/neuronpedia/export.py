"""Export of a checkpoint's latents to the folder layout that Neuronpedia imports.

The folder of a source, ``DIR/MODEL/LAYER-SET``, holds one line each of the model, the release, the set and the source, and
batches of features, activations and explanations as compressed JSON lines.
"""

import gzip
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ....sae.dictionary import SparseDictionary
from ....sae.files import replacing
from ....sae.formats.hooks import layer_of, to_transformer_lens, transformer_lens_model
from ....training.activations.architecture import Architecture
from ....training.activations.model import LanguageModel
from ..records import Described
from .neurons import NeuronMoments, alignment
from .rows import Row, SourceIdentity, activation_rows, explanation_rows, feature_row, latent_tables

# Latents per file: Neuronpedia's own exports have as many.
BATCH = 1024
# Neuronpedia's account for what is imported, as its empty database has it; it is replaced in an import elsewhere.
CREATOR_ID = "clkht01d40000jv08hvalcvly"
ID = re.compile(r"([\w.-]+)/((\d+)-([\w.-]+))")


@dataclass(frozen=True)
class NeuronpediaExport:
    """Folder and id of an export to Neuronpedia.

    Attributes:
        directory: Folder of all exports; the source has ``MODEL/LAYER-SET`` below it.
        id: ``MODEL/LAYER-SET``, such as ``gpt2-small/8-res-jb``. Default: the model's name for TransformerLens, the layer of
            the hook, and the checkpoint's name.

    Raises:
        ValueError: If the id has another form.

    Example:
        >>> from sparsary import NeuronpediaExport
        >>> NeuronpediaExport("exports", "gpt2-small/8-res-jb").parts()
        ('gpt2-small', 8, 'res-jb')
    """

    directory: str | Path
    id: str | None = None

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> tuple[str, int, str] | None:
        """Return model, layer and set of the id; ``None`` without one."""
        if self.id is None:
            return None
        found = ID.fullmatch(self.id)
        if found is None:
            raise ValueError(f"--neuronpedia-id: expected MODEL/LAYER-SET, such as gpt2-small/8-res-jb, got {self.id!r}.")
        return found[1], int(found[3]), found[4]

    def source(self, checkpoint: str, hook: str, model: str) -> tuple[str, int, str]:
        """Return model, layer and set: of the id, or by default of a checkpoint's name, its hook and its model.

        Raises:
            ValueError: If no id is given, and the hook's name has no layer.
        """
        given = self.parts()
        if given is not None:
            return given
        layer = layer_of(hook)
        if layer is None:
            raise ValueError(
                f"--neuronpedia: expected a hook in a layer, got {hook}. Give the id: --neuronpedia-id MODEL/LAYER-SET."
            )
        name = (transformer_lens_model(model) or model).rstrip("/").rpartition("/")[2]
        return _slug(name.lower()), layer, _slug(Path(checkpoint).name)


def write_neuronpedia(
    export: NeuronpediaExport,
    about: dict[str, Any],
    model: LanguageModel,
    dictionary: SparseDictionary,
    described: Described,
    moments: NeuronMoments,
) -> Path:
    """Write the folder of a source and return it.

    Args:
        about: Content of ``features.json``.
        moments: Sums over the same pass as ``described``.
    """
    aligned = alignment(dictionary.atoms * dictionary.out_scale)
    found = latent_tables(described, aligned, moments.correlations())
    reads, writes = about["hooks_in"], about["hooks_out"]
    model_id, layer, set_name = export.source(about["checkpoint"], writes[0], about["model"])
    hook_name = to_transformer_lens(reads[0], about["model"]) or to_transformer_lens(reads[0])
    identity = SourceIdentity(model_id, f"{layer}-{set_name}", CREATOR_ID, datetime.now(UTC).isoformat(timespec="milliseconds"))
    directory = Path(export.directory) / model_id / identity.layer
    for name in ("features", "activations", "explanations"):
        (directory / name).mkdir(parents=True, exist_ok=True)
        for old in (directory / name).glob("batch-*.jsonl.gz"):
            old.unlink()
    for name, row in source_rows(identity, set_name, about, model, moments.contexts).items():
        _write_lines(directory / f"{name}.jsonl", [row])
    batch: dict[str, list[Row]] = {"features": [], "activations": [], "explanations": []}
    for number, record in enumerate(described.records()):
        if number and number % BATCH == 0:
            _write_batch(directory, number // BATCH - 1, batch)
        batch["features"].append(feature_row(record, identity, found.columns(record["latent"]), hook_name))
        batch["activations"] += activation_rows(record, identity, about["text"])
        batch["explanations"] += explanation_rows(record, identity, about.get("explainer"))
    _write_batch(directory, (about["n_latents"] - 1) // BATCH, batch)
    return directory


def source_rows(
    identity: SourceIdentity, set_name: str, about: dict[str, Any], model: LanguageModel, contexts: int
) -> dict[str, Row]:
    """Return the rows of the model, the release, the set and the source, by file name."""
    made = {"creatorId": identity.creator_id, "createdAt": identity.created_at}
    sizes = _sizes(model)
    hooks = " -> ".join(dict.fromkeys([*about["hooks_in"], *about["hooks_out"]]))
    described = f"{about['kind']} of {about['model']}, {hooks}, {about['n_latents']} latents, encoder {about['encoder']}"
    return {
        "model": {
            "id": identity.model_id,
            "displayNameShort": identity.model_id,
            "displayName": about["model"],
            "tlensId": transformer_lens_model(about["model"]),
            "instruct": model.tokenizer.chat_template is not None,
            "owner": about["model"].rpartition("/")[0],
            "visibility": "PUBLIC",
            "inferenceEnabled": False,
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "website": None,
            "updatedAt": identity.created_at,
            **sizes,
            **made,
        },
        "release": {
            "name": set_name,
            "description": described,
            "descriptionShort": set_name,
            "creatorName": "",
            "creatorNameShort": "",
            "creatorEmail": None,
            "urls": [],
            "visibility": "PUBLIC",
            "isNewUi": False,
            "featured": False,
            "defaultSourceSetName": set_name,
            "defaultSourceId": identity.layer,
            "defaultUmapSourceIds": [],
            **made,
        },
        "sourceset": {
            "modelId": identity.model_id,
            "name": set_name,
            "description": described,
            "type": about["kind"],
            "creatorName": "",
            "creatorEmail": None,
            "urls": [],
            "releaseName": set_name,
            "visibility": "PUBLIC",
            "hasDashboards": True,
            "defaultOfModelId": None,
            "defaultRange": 1,
            "defaultShowBreaks": True,
            "showDfa": False,
            "showCorrelated": True,
            "showHeadAttribution": False,
            "showUmap": False,
            **made,
        },
        "source": {
            "id": identity.layer,
            "modelId": identity.model_id,
            "setName": set_name,
            "dataset": about["text"],
            "num_prompts": contexts,
            "num_tokens_in_prompt": about["context_length"],
            "notes": f"{about['tokens']} tokens of {about['documents']} documents; {about['left_out']} left out",
            "visibility": "PUBLIC",
            "hasDashboards": True,
            "inferenceEnabled": False,
            "inferenceHosts": [],
            "saelensConfig": None,
            "saelensRelease": None,
            "saelensSaeId": None,
            "hfRepoId": None,
            "hfFolderId": None,
            "defaultOfModelId": None,
            "hasUmap": False,
            "hasUmapLogSparsity": False,
            "hasUmapClusters": False,
            **made,
        },
    }


def _sizes(model: LanguageModel) -> Row:
    """Return width, layers and neurons per layer of a model; those of unknown architectures are left open."""
    try:
        anatomy = Architecture(model)
    except ValueError:
        return {"dimension": None, "layers": 0, "neuronsPerLayer": 0}
    config: Any = model.module.config
    # GPT-2's configuration leaves its four times the width out.
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    inner = 4 * anatomy.d_model if inner is None and hasattr(config, "n_inner") else inner or 0
    return {"dimension": anatomy.d_model, "layers": anatomy.n_layers, "neuronsPerLayer": inner}


def _write_batch(directory: Path, number: int, batch: dict[str, list[Row]]) -> None:
    """Write a batch's files, and empty it; a table without rows has no file."""
    for name, rows in batch.items():
        if rows:
            _write_lines(directory / name / f"batch-{number}.jsonl.gz", rows)
        rows.clear()


def _write_lines(path: Path, rows: list[Row]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(lines, 5, mtime=0) if path.suffix == ".gz" else lines)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "sparsary"
