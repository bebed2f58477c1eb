"""Multiple choice: the label of the option that a sentence before the options names.

Labels are the first letters of the alphabet, random letters, or symbols, before 2 to 10 options. Sources: Lieberum et al. 2023,
arXiv:2307.09458, for the question which heads find the label; Mueller et al. 2025, arXiv:2504.13151, for colours of objects,
given in the prompt, as its content. Words and templates are ours.
"""

from dataclasses import replace
from functools import partial
from random import Random

from ..task import Corruption, Variant
from .fill import Filled, SingleTokenWords, from_templates

# What is asked about, and a colour it may have: it is stated in the prompt, so that nothing need be known.
OBJECTS = {
    "red": "tomato brick ruby fire blood cherry",
    "orange": "carrot pumpkin tiger fox",
    "yellow": "lemon sun butter cheese taxi",
    "green": "grass leaf frog lime forest",
    "blue": "sky sea lake river",
    "purple": "plum grape",
    "brown": "bear wood chocolate bread coffee",
    "black": "coal night tire ink",
    "white": "snow milk salt cloud swan",
    "gray": "rock mouse smoke wolf elephant",
    "pink": "pig peach rose",
    "silver": "coin spoon fork",
    "gold": "crown medal ring",
}
PAIRS = [(thing, color) for color, things in OBJECTS.items() for thing in things.split()]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# None occurs elsewhere in the template.
SYMBOLS = "# % & * + @ ^ ~ $ = ! / < > ;".split()
KINDS = ("letters", "random_letters", "symbols")
FEWEST, MOST, USUAL = 2, 10, 4
CORRUPTIONS = (
    Corruption("option_swap", "flips", "the right option and another exchange their places"),
    Corruption("other_fact", "flips", "an object is asked about whose colour is another of the options"),
    Corruption("other_labels", "removes", "other labels stand before the options"),
)
RIGHT = "right"


def role(part: str, place: str | int) -> str:
    """Return the role of a ``label`` or an ``option``: of the right one, or of one of the others, numbered from 0."""
    return f"{RIGHT}_{part}" if place == RIGHT else f"other_{part}_{place}"


def multiple_choice(task: str, kind: str, options: int = USUAL) -> Variant:
    """Return the task with as many options, and labels of one of ``KINDS``.

    Raises:
        ValueError: If the number of options is not one of 2 to 10.
    """
    if not FEWEST <= options <= MOST:
        raise ValueError(f"task: {task}: expected {FEWEST} to {MOST} options, got {options}.")

    def draw(words: SingleTokenWords, random: Random, corruption: str) -> Filled:
        known = words.single("labels", SYMBOLS if kind == "symbols" else LETTERS, at_least=options + 1)
        pairs = words.pairs("objects and colours", PAIRS, at_least=options)
        colors = words.single("colours", list(dict.fromkeys(color for _, color in pairs)), at_least=options)
        labels = known[:options] if kind == "letters" else random.sample(known, options)
        chosen = random.sample(colors, options)
        right = random.randrange(options)
        thing = random.choice([thing for thing, color in pairs if color == chosen[right]])
        places: list[str | int] = list(range(options - 1))
        places.insert(right, RIGHT)
        clean = {"object": thing, "color": chosen[right]}
        for place, label, color in zip(places, labels, chosen, strict=True):
            clean |= {role("label", place): label, role("option", place): color}
        other = random.randrange(options - 1)
        wrong = clean[role("option", other)]
        if corruption == "option_swap":
            changes = {role("option", RIGHT): wrong, role("option", other): chosen[right]}
        elif corruption == "other_fact":
            changes = {"object": random.choice([one for one, color in pairs if color == wrong]), "color": wrong}
        else:
            changes = _other_labels(random, known, labels, places)
        lines = "\n".join(f"{{{role('label', place)}}} - {{{role('option', place)}}}" for place in places)
        template = f"The {{object}} is {{color}}. What color is the {{object}}?\n{lines}\nAnswer:"
        foils = tuple(f" {clean[role('label', place)]}" for place in range(options - 1))
        return Filled(template, clean, changes, (f" {labels[right]}",), foils)

    made = from_templates(task, CORRUPTIONS, draw)
    return replace(made, with_options=partial(multiple_choice, task, kind))


def _other_labels(random: Random, known: list[str], labels: list[str], places: list[str | int]) -> dict[str, str]:
    """Return labels that are not those of the clean prompt, as far as there are others; none stays in its place."""
    unused = [label for label in known if label not in labels]
    drawn = random.sample(unused, min(len(unused), len(labels)))
    # Too few symbols are left for ten others: the rest are the prompt's own, moved along by as many places.
    drawn += labels[: len(labels) - len(drawn)]
    return {role("label", place): label for place, label in zip(places, drawn, strict=True)}


VARIANTS = {
    "multiple_choice": multiple_choice("multiple_choice", "letters"),
    "multiple_choice_random_letters": multiple_choice("multiple_choice_random_letters", "random_letters"),
    "multiple_choice_symbols": multiple_choice("multiple_choice_symbols", "symbols"),
}
