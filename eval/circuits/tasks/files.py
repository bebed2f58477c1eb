"""Prompt pairs in files: native JSON lines, and published formats.

One record per line::

    {"clean": TEXT, "corrupted": TEXT, "answers": [TEXT, ...], "foils": [TEXT, ...]}

Answers and foils are single tokens that continue the clean prompt, including a leading space. Optional keys are ``position``
(the token after which they are asked for, by default the last), ``roles`` (named positions), and ``task``, ``corruption`` and
``metric``, which are the same on every line. For several questions, ``questions`` is a list of records with ``position``,
``answers`` and ``foils``. Token ids may replace any text: a list for a prompt, a number for an answer; positions then include
the tokens that the tokenizer puts in front.
"""

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ....sae.files import read_text
from ....training.activations.model import LanguageModel
from .pairs import PromptPairs, Question
from .published import from_csv, from_json
from .reader import PromptEncoder
from .task import Example, assemble, same_length

logger = logging.getLogger(__name__)

# Maximum number of invalid lines in an error.
LISTED = 10


class FileLine(NamedTuple):
    """Record of a file, and its name in error messages."""

    where: str
    values: Any


def read_pairs(
    path: str | Path,
    model: LanguageModel,
    n: int | None = None,
    seed: int = 0,
    corruption: str | None = None,
    metric: str | None = None,
    skip: bool = False,
    one_length: bool = False,
) -> PromptPairs:
    """Read the pairs of a file, or ``n`` of them drawn at random, in the file's order.

    Every line is checked with the model's tokenizer; ``skip`` leaves out invalid lines and logs their number. Files with
    several corruptions use their default unless ``corruption`` is given; ``metric`` overrides the file's.

    Raises:
        ValueError: If the file is missing or empty, or has invalid lines, the first of which are listed.
    """
    reader, examples, offences = PromptEncoder(model), [], []
    tags: dict[str, set[str]] = {"task": set(), "corruption": set(), "metric": set()}
    for where, values in _records(Path(path)):
        try:
            record = _ours(values, Path(path), corruption, reader)
            examples.append(_example(record, reader))
        except ValueError as error:
            offences.append(f"{where}: {error}")
            continue
        for tag, found in tags.items():
            if tag in record:
                found.add(str(record[tag]))
    if offences and not (skip and examples):
        raise ValueError(_refusal(path, offences, len(examples)))
    if offences:
        logger.warning(
            "%s: left out %d of %d lines; the first: %s", path, len(offences), len(offences) + len(examples), offences[0]
        )
    if not examples:
        raise ValueError(f"{path}: expected pairs, got an empty file.")
    task, kind, stated = (_one(path, tag, found) for tag, found in tags.items())
    if one_length:
        examples = list(same_length(iter(examples), len(examples)))
    if n is not None and n < len(examples):
        examples = [examples[row] for row in sorted(Random(seed).sample(range(len(examples)), n))]
    return assemble(examples, task or Path(path).stem, kind or "corrupted", metric or stated or "logit_diff")


def write_pairs(pairs: PromptPairs, path: str | Path, model: LanguageModel) -> None:
    """Write one line per pair, which ``read_pairs`` restores exactly: text if it gives the same tokens, else token ids."""
    reader = PromptEncoder(model)
    lines = [json.dumps(_line(pairs, row, reader), ensure_ascii=False) + "\n" for row in range(len(pairs))]
    Path(path).write_text("".join(lines), encoding="utf-8")


def _records(path: Path) -> Iterator[FileLine]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of pairs, found none. Give the path of a .jsonl, .json or .csv file.")
    text = read_text(path)
    if path.suffix == ".csv":
        rows = csv.DictReader(text.splitlines(keepends=True))
        for row in rows:
            yield FileLine(f"line {rows.line_num}", row)
    elif path.suffix == ".json":
        yield from (FileLine(f"prompt {number}", prompt) for number, prompt in enumerate(_prompts(path, text), start=1))
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield FileLine(f"line {number}", line)


def _prompts(path: Path, text: str) -> list:
    """Return the records of an auto-circuit file: one object with a list of ``prompts``."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got invalid JSON ({error}). One record per line is .jsonl.") from None
    prompts = content.get("prompts") if isinstance(content, Mapping) else None
    if not isinstance(prompts, list):
        raise ValueError(
            f"{path}: expected an object with a list 'prompts', got {type(content).__name__}. Give .jsonl instead."
        )
    return prompts


def _ours(values: Any, path: Path, corruption: str | None, reader: PromptEncoder) -> dict[str, Any]:
    if path.suffix == ".csv":
        return from_csv(values, corruption, reader)
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"is not a JSON object but {type(values).__name__}")
    return from_json(values, corruption)


def _example(record: Mapping[str, Any], reader: PromptEncoder) -> Example:
    """Return a checked record as token ids; ``ValueError`` describes any mistake in it."""
    clean, corrupted = (_prompt_ids(record, key, reader) for key in ("clean", "corrupted"))
    if len(clean) != len(corrupted):
        raise ValueError(f"clean has {len(clean)} tokens, corrupted {len(corrupted)}; expected equal numbers")
    asked = record.get("questions") or [record]
    if not isinstance(asked, list) or not all(isinstance(one, Mapping) for one in asked):
        raise ValueError(f"questions is {asked!r}; expected a list of objects with position, answers and foils")
    questions = tuple(_question(one, record["clean"], clean, reader) for one in asked)
    roles = record.get("roles") or {}
    if not isinstance(roles, Mapping):
        raise ValueError(f"roles is {roles!r}; expected an object of names and positions")
    bad = {role: at for role, at in roles.items() if not (isinstance(at, int) and 0 <= at < len(clean))}
    if bad:
        raise ValueError(f"roles are at {bad}; expected positions 0 to {len(clean) - 1}")
    return Example(clean, corrupted, questions, dict(roles))


def _prompt_ids(record: Mapping[str, Any], key: str, reader: PromptEncoder) -> tuple[int, ...]:
    prompt = record[key]
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError(f"{key} is {prompt!r}; expected text, or a list of token ids")
    if isinstance(prompt, str):
        return tuple(reader.ids(prompt))
    return tuple(_known(token, reader) for token in prompt)


def _question(asked: Mapping[str, Any], prompt: str | list, clean: tuple[int, ...], reader: PromptEncoder) -> Question:
    position = asked.get("position", len(clean) - 1)
    if not (isinstance(position, int) and 0 <= position < len(clean)):
        raise ValueError(f"position is {position!r}; expected one of 0 to {len(clean) - 1}")
    given = [_several(asked, key) for key in ("answers", "foils")]
    if not given[0]:
        raise ValueError("has no answers")
    before: str | None = prompt if isinstance(prompt, str) and position == len(clean) - 1 else None
    if before is None and any(isinstance(one, str) for several in given for one in several):
        before = reader.text(clean[: position + 1])
    answers, foils = (tuple(_token(one, before, reader) for one in several) for several in given)
    if set(answers) & set(foils):
        raise ValueError(f"the same token is among the answers {given[0]} and the foils {given[1]}")
    return Question(position, answers, foils)


def _several(asked: Mapping[str, Any], key: str) -> list:
    """Return the value as a list."""
    value = asked.get(key, [])
    if isinstance(value, list):
        return value
    if not isinstance(value, str | int):
        raise ValueError(f"{key} is {value!r}; expected a list of texts or token ids")
    return [value]


def _token(answer: Any, before: str | None, reader: PromptEncoder) -> int:
    if isinstance(answer, str):
        if before is None:
            raise ValueError(f"{answer!r} is text after a prompt of token ids; give its token id")
        return reader.following(before, answer)
    return _known(answer, reader)


def _known(token: Any, reader: PromptEncoder) -> int:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < reader.vocabulary:
        raise ValueError(f"{token!r} is not a token id of this model; expected 0 to {reader.vocabulary - 1}")
    return token


def _refusal(path: str | Path, offences: list[str], fine: int) -> str:
    listed = "\n  ".join(offences[:LISTED])
    more = f"\n  ... and {len(offences) - LISTED} more" if len(offences) > LISTED else ""
    return (
        f"{path}: expected pairs of prompts of equal length with single-token answers, got {len(offences)} of "
        f"{len(offences) + fine} lines that are not:\n  {listed}{more}\nMend them, or leave them out with skip=True."
    )


def _one(path: str | Path, tag: str, found: set[str]) -> str | None:
    if len(found) > 1:
        raise ValueError(f"{path}: expected one {tag} in a file, got {', '.join(sorted(found))}. Split the file.")
    return next(iter(found), None)


def _line(pairs: PromptPairs, row: int, reader: PromptEncoder) -> dict[str, Any]:
    end = int(pairs.lengths[row])
    clean, corrupted = (ids[row, :end].tolist() for ids in (pairs.clean, pairs.corrupted))
    line: dict[str, Any] = {"clean": reader.text(clean) or clean, "corrupted": reader.text(corrupted) or corrupted}
    asked = [
        {"position": question.position}
        | {
            key: _words(tokens, clean[: question.position + 1], reader)
            for key, tokens in zip(("answers", "foils"), question[1:], strict=True)
        }
        for question in pairs.questions[row]
    ]
    line |= asked[0] if len(asked) == 1 else {"questions": asked}
    if pairs.roles:
        line["roles"] = pairs.roles[row]
    return line | {"task": pairs.task, "corruption": pairs.corruption, "metric": pairs.metric}


def _words(tokens: tuple[int, ...], before: list[int], reader: PromptEncoder) -> list[str | int]:
    """Return each token as the text that continues the prompt, or as its id if no text does."""
    prompt = reader.text(before)
    return [token if prompt is None else _word(token, prompt, before, reader) for token in tokens]


def _word(token: int, prompt: str, before: list[int], reader: PromptEncoder) -> str | int:
    whole = reader.text([*before, token])
    return token if whole is None or not whole.startswith(prompt) else whole[len(prompt) :]
