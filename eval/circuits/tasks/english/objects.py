"""Color of one of three objects, after a solved example. Source: Merullo, Eickhoff and Pavlick 2024, arXiv:2310.08744."""

from random import Random

from ..task import Corruption
from .fill import Filled, SingleTokenWords, from_templates

OBJECTS = """pencil notebook pen cup plate jug mug puzzle textbook leash necklace bracelet bottle ball envelope lighter
    bowl""".split()
COLORS = "red orange yellow green blue purple brown black".split()
SURFACES = "table desk floor".split()
VIEWS = ("there is", "you see", "I see")
ITEM = "{{article_{0}}} {{color_{0}}} {{object_{0}}}"
TEMPLATE = (
    f"Q: On the {{surface_0}}, {{view_0}} {ITEM.format(0)}, {ITEM.format(1)}, and {ITEM.format(2)}. "
    "What color is the {queried_0}?\nA: {solution}\n"
    f"Q: On the {{surface_1}}, {{view_1}} {ITEM.format(3)}, {ITEM.format(4)}, and {ITEM.format(5)}. "
    "What color is the {queried}?\nA:"
)
CORRUPTIONS = (
    Corruption("queried_object", "flips", "another of the three objects is asked about"),
    Corruption("color_swap", "flips", "the object asked about and another exchange their colours"),
    Corruption("absent", "removes", "an object is asked about that is not there"),
)


def _draw(words: SingleTokenWords, random: Random, corruption: str) -> Filled:
    objects = words.single("objects", OBJECTS, at_least=7)
    known = words.pairs("colours", [(color, color.capitalize()) for color in COLORS], at_least=6)
    surfaces = words.single("surfaces", SURFACES)
    chosen, colors = random.sample(objects, 6), random.sample([color for color, _ in known], 6)
    solved = random.randrange(3)
    # The item that is asked about, and another, among items 3 to 5.
    asked, other = random.sample(range(3, 6), 2)
    clean = {"queried_0": chosen[solved], "solution": colors[solved].capitalize(), "queried": chosen[asked]}
    for scene in (0, 1):
        clean |= {f"surface_{scene}": random.choice(surfaces), f"view_{scene}": random.choice(VIEWS)}
    for item in range(6):
        clean |= _colored(item, colors[item]) | {f"object_{item}": chosen[item]}
    changes = {
        "queried_object": {"queried": chosen[other]},
        "color_swap": _colored(asked, colors[other]) | _colored(other, colors[asked]),
        "absent": {"queried": words.other(random, objects, *chosen)},
    }
    answer, foil = (f" {colors[item].capitalize()}" for item in (asked, other))
    return Filled(TEMPLATE, clean, changes[corruption], (answer,), (foil,))


def _colored(item: int, color: str) -> dict[str, str]:
    return {f"article_{item}": "an" if color[0] in "aeiou" else "a", f"color_{item}": color}


VARIANT = from_templates("colored_objects", CORRUPTIONS, _draw)
