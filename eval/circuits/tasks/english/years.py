"""Greater-than: the second year must exceed the first. Source, also of the nouns: Hanna et al. 2023, arXiv:2305.00586."""

from random import Random

from ..corruptions import GREATER_THAN
from .fill import Filled, SingleTokenWords, from_templates

TEMPLATE = "The {event} lasted from the year {century}{start_year} to the year {century_again}"
CENTURIES = range(11, 18)
EVENTS = """abduction accord affair agreement appraisal assaults assessment attack attempts campaign captivity case challenge
    chaos clash collaboration coma competition confrontation consequence conspiracy construction consultation contact contract
    convention cooperation custody deal decline decrease demonstrations development disagreement disorder dispute domination
    dynasty effect effort employment endeavor engagement epidemic evaluation exchange existence expansion expedition experiments
    fall fame flights friendship growth hardship hostility illness impact imprisonment improvement incarceration increase
    insurgency invasion investigation journey kingdom marriage modernization negotiation notoriety obstruction operation order
    outbreak outcome overhaul patrols pilgrimage plague plan practice process program progress project pursuit quest raids
    reforms reign relationship retaliation riot rise rivalry romance rule sanctions shift siege slump stature stint strikes
    study test testing tests therapy tour tradition treaty trial trip unemployment voyage warfare work""".split()


def _draw(words: SingleTokenWords, random: Random, corruption: str) -> Filled:
    usable = spans(words)
    tokens = _two_digits(words)
    event = random.choice(words.single("events", EVENTS))
    century = random.choice(list(usable))
    start = random.choice(usable[century])
    if corruption == "event_random":
        changes = {"event": words.other(random, words.single("events", EVENTS), event)}
    else:
        other = "01" if corruption == "year_01" else words.other(random, usable[century], start)
        changes = {"start_year": other}
    clean = {"event": event, "century": century, "start_year": start, "century_again": century}
    first = int(start) + 1
    return Filled(TEMPLATE, clean, changes, tuple(tokens[first:]), tuple(tokens[:first]))


def spans(words: SingleTokenWords) -> dict[str, list[str]]:
    """Return, by century, the years that are two tokens, century and year, without the first and the last of them.

    Raises:
        ValueError: If no century has any.
    """
    if "years" not in words.known:
        found = {f"{century}": _split_years(words, f"{century}") for century in CENTURIES}
        words.known["years"] = {century: years for century, years in found.items() if len(years) > 1}
    if not words.known["years"]:
        raise ValueError(
            "greater_than: expected years that are two tokens, century and year, as 17 and 32, got none from "
            f"{CENTURIES[0]}00 to {CENTURIES[-1]}99. Choose another task for this tokenizer, or give pairs in a file."
        )
    return words.known["years"]


def _split_years(words: SingleTokenWords, century: str) -> list[str]:
    reader, before = words.reader, f"The year {century}"
    if reader.next_token("The year", f" {century}") is None:
        return []
    cut = [year for year, token in reader.two_digits.items() if year != "00" and reader.next_token(before, year) == token]
    # The first must be 01, which corrupted prompts use.
    return cut[1:-1] if cut[:1] == ["01"] else []


def _two_digits(words: SingleTokenWords) -> list[int]:
    """Return the tokens 00 to 99.

    Raises:
        ValueError: If one of them is several tokens.
    """
    known = words.reader.two_digits
    words.require("two-digit numbers", list(known), [f"{year:02d}" for year in range(100) if f"{year:02d}" not in known], 100)
    return list(known.values())


VARIANT = from_templates("greater_than", GREATER_THAN, _draw, "prob_diff")
