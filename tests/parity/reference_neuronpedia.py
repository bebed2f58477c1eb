"""Neuronpedia's client filled from an export, and the batches that it would upload; test_tools.py compares them with ours.

.venv-peers/bin/python tests/parity/reference_neuronpedia.py SOURCE_FOLDER OUT.json
"""

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from neuronpedia.np_activation import Activation
from neuronpedia.np_explanation import Explanation
from neuronpedia.np_feature import Feature, Logit
from neuronpedia.np_model import Model
from neuronpedia.np_source_set import SourceSet
from neuronpedia.requests.base_request import NPRequest
from neuronpedia.requests.feature_request import MAX_FEATURES_PER_BATCH, FeatureRequest

Row = dict[str, Any]


def rows(folder: Path, table: str) -> list[Row]:
    paths = sorted((folder / table).glob("batch-*.jsonl.gz"))
    return [json.loads(line) for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]


def one(folder: Path, name: str) -> Row:
    return json.loads((folder / f"{name}.jsonl").read_text())


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    about, source = one(folder, "model"), one(folder, "source")
    model = Model(about["id"], about["layers"], about["displayName"])
    made = SourceSet.from_np_db_json(one(folder, "sourceset") | {"sources": [source]})
    activations, explanations = defaultdict(list), defaultdict(list)
    for row in rows(folder, "activations"):
        # Its website marks the strongest contexts so; the client takes shares only.
        share = None if row["binContains"] == -1 else row["binContains"]
        activations[int(row["index"])].append(Activation.from_np_db_json(row | {"source": row["layer"], "binContains": share}))
    for row in rows(folder, "explanations"):
        explanations[int(row["index"])].append(Explanation.from_np_db_json(row | {"source": row["layer"]}))
    features = [
        Feature(
            row["modelId"],
            row["layer"],
            int(row["index"]),
            row["frac_nonzero"],
            [Logit(token, value) for token, value in zip(row["pos_str"], row["pos_values"], strict=True)],
            [Logit(token, value) for token, value in zip(row["neg_str"], row["neg_values"], strict=True)],
            explanations[int(row["index"])],
            activations[int(row["index"])],
        )
        for row in rows(folder, "features")
    ]
    sent: list[Row] = []
    NPRequest.__init__ = lambda self, *_, **__: None
    FeatureRequest.send_request = lambda self, json, **_: sent.append(json)
    for begin in range(0, len(features), MAX_FEATURES_PER_BATCH):
        made.get_source_for_layer_number(int(source["id"].split("-")[0])).upload_batch(
            features[begin : begin + MAX_FEATURES_PER_BATCH]
        )
    out.write_text(json.dumps({"model": vars(model), "batches": sent}))


if __name__ == "__main__":
    main()
