"""Conversion of records in published task files to native records, which ``files`` describes."""

import json
from collections.abc import Mapping
from typing import Any

from ....sae.suggestions import require_choice
from .reader import PromptEncoder

# Equivalent keys, native first: JSON lines of this library and others, feature-circuits (Marks et al. 2024), and auto-circuit
# (Miller et al. 2024).
NAMES = {
    "clean": ("clean", "clean_prefix"),
    "corrupted": ("corrupted", "corrupt", "patch_prefix"),
    "answers": ("answers", "answer", "clean_answer"),
    "foils": ("foils", "wrong_answers", "wrong", "patch_answer"),
}
# Suffix that MIB (Mueller et al. 2025) adds to the name of a corruption, and the defaults of its tasks.
COUNTERFACTUAL = "_counterfactual"
PREFERRED = ("s2_io_flip", "symbol")

# Columns with token ids of answers and foils in the files of EAP-IG (Hanna et al. 2024), and their metric.
COLUMNS = (
    ("correct_idx", "incorrect_idx", "logit_diff"),
    ("clean_answer_idx", "corrupted_answer_idx", "logit_diff"),
    ("answers_idx", "corrupted_answers_idx", "prob_diff"),
    ("country_idx", "corrupted_country_idx", "logit_diff"),
    ("label", "incorrect_label", "logit_diff"),
)
# Columns with the two digits that the answer must exceed.
YEARS = ("label", "correct_idx")
CORRUPTED = ("corrupted", "corrupted_hard")


def from_json(record: Mapping[str, Any], corruption: str | None) -> dict[str, Any]:
    """Return a record of JSON lines with native keys.

    Raises:
        ValueError: If a field is missing, or the corruption is unknown.
    """
    if any(key.endswith(COUNTERFACTUAL) for key in record):
        return _from_mib(record, corruption)
    ours = {key: value for key, value in record.items() if key in ("position", "questions", "roles", "task", "metric")}
    for key, names in NAMES.items():
        present = [name for name in names if record.get(name) is not None]
        if present:
            ours[key] = record[present[0]]
        elif key in ("clean", "corrupted"):
            raise ValueError(f"has no {' or '.join(names)}, only {', '.join(map(str, record)) or 'nothing'}")
    ours["corruption"] = record.get("corruption", "corrupted")
    if corruption is not None:
        require_choice("corruption", corruption, [ours["corruption"]])
    return ours


def _from_mib(record: Mapping[str, Any], corruption: str | None) -> dict[str, Any]:
    kinds = [key.removesuffix(COUNTERFACTUAL) for key in record if key.endswith(COUNTERFACTUAL)]
    if corruption is None:
        corruption = next((kind for kind in PREFERRED if kind in kinds), kinds[0])
    corruption = require_choice("corruption", corruption.removesuffix(COUNTERFACTUAL), kinds)
    other = record[corruption + COUNTERFACTUAL]
    answers, corrupted_answers = _choice(record), _choice(other)
    # If the corrupted prompt has the same answer, the other choices are foils.
    foils = [one for one in corrupted_answers[:1] if one != answers[0]] or answers[1:]
    return {
        "clean": record["prompt"],
        "corrupted": other["prompt"],
        "answers": answers[:1],
        "foils": foils,
        "corruption": corruption,
    }


def _choice(record: Any) -> list[str]:
    """Return the right choice, then all others, as they continue the prompt."""
    if not isinstance(record, Mapping):
        raise ValueError(f"has {record!r} for a corrupted prompt; expected an object with prompt, choices and answerKey")
    for key in ("prompt", "choices", "answerKey"):
        if record.get(key) is None:
            raise ValueError(f"has no {key}, which records with a ...{COUNTERFACTUAL} have")
    choices, right = record["choices"], int(record["answerKey"])
    choices = [f" {str(one).strip()}" for one in (choices["label"] if isinstance(choices, Mapping) else choices)]
    if not 0 <= right < len(choices):
        raise ValueError(f"has answerKey {right} for {len(choices)} choices")
    return [choices[right], *choices[:right], *choices[right + 1 :]]


def from_csv(row: Mapping[str, str], corruption: str | None, reader: PromptEncoder) -> dict[str, Any]:
    """Return a row of EAP-IG's files as a native record; its token ids cannot be checked against the file's tokenizer.

    Raises:
        ValueError: If the columns are unknown.
    """
    kinds = [key for key in CORRUPTED if row.get(key)]
    if not row.get("clean") or not kinds:
        raise ValueError(f"has no clean and corrupted, only {', '.join(map(str, row))}")
    corruption = require_choice("corruption", corruption or kinds[0], kinds)
    ours: dict[str, Any] = {"clean": _prompt(row["clean"]), "corrupted": _prompt(row[corruption]), "corruption": corruption}
    for answers, foils, metric in COLUMNS:
        if row.get(answers) and row.get(foils):
            return ours | {"answers": _ids(row[answers]), "foils": _ids(row[foils]), "metric": metric}
    for year in YEARS:
        if row.get(year):
            return ours | _exceeding(row[year], reader) | {"metric": "prob_diff"}
    expected = "; ".join(f"{answers} and {foils}" for answers, foils, _ in COLUMNS)
    raise ValueError(f"has no columns of answers ({expected}; or {' or '.join(YEARS)} with a year)")


def _prompt(text: str) -> str | list[int]:
    return json.loads(text) if text.startswith("[") else text


def _ids(text: str) -> list[int]:
    found = json.loads(text)
    return found if isinstance(found, list) else [found]


def _exceeding(year: str, reader: PromptEncoder) -> dict[str, list[int]]:
    known = reader.two_digits
    if len(known) < 100 or not (year.isdigit() and int(year) < 99):
        raise ValueError(
            f"asks for a year after {year}, which needs the tokens 00 to 99; the tokenizer has {len(known)} of them"
        )
    tokens, first = list(known.values()), int(year) + 1
    return {"answers": tokens[first:], "foils": tokens[:first]}
