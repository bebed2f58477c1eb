"""Indirect object identification. Source, also of templates, names, places and objects: Wang et al. 2022, arXiv:2211.00593."""

from random import Random

from ..corruptions import IOI, ioi_changes
from .fill import Filled, SingleTokenWords, from_templates

# Subject first ("BABA"); half of the draws exchange the two names at their first mention ("ABBA").
TEMPLATES = (
    "Then, {S1} and {IO} went to the {place}. {S2} gave a {object} to",
    "Then, {S1} and {IO} had a lot of fun at the {place}. {S2} gave a {object} to",
    "Then, {S1} and {IO} were working at the {place}. {S2} decided to give a {object} to",
    "Then, {S1} and {IO} were thinking about going to the {place}. {S2} wanted to give a {object} to",
    "Then, {S1} and {IO} had a long argument, and afterwards {S2} said to",
    "After {S1} and {IO} went to the {place}, {S2} gave a {object} to",
    "When {S1} and {IO} got a {object} at the {place}, {S2} decided to give it to",
    "When {S1} and {IO} got a {object} at the {place}, {S2} decided to give the {object} to",
    "While {S1} and {IO} were working at the {place}, {S2} gave a {object} to",
    "While {S1} and {IO} were commuting to the {place}, {S2} gave a {object} to",
    "After the lunch, {S1} and {IO} went to the {place}. {S2} gave a {object} to",
    "Afterwards, {S1} and {IO} went to the {place}. {S2} gave a {object} to",
    "Then, {S1} and {IO} had a long argument. Afterwards {S2} said to",
    "The {place} {S1} and {IO} went to had a {object}. {S2} gave it to",
    "Friends {S1} and {IO} found a {object} at the {place}. {S2} gave it to",
)
PLACES = "store garden restaurant school hospital office house station".split()
OBJECTS = "ring kiss bone basketball computer necklace drink snack".split()
NAMES = """Michael Christopher Jessica Matthew Ashley Jennifer Joshua Amanda Daniel David James Robert John Joseph Andrew
    Ryan Brandon Jason Justin Sarah William Jonathan Stephanie Brian Nicole Nicholas Anthony Heather Eric Elizabeth Adam
    Megan Melissa Kevin Steven Thomas Timothy Christina Kyle Rachel Laura Lauren Amber Brittany Danielle Richard Kimberly
    Jeffrey Amy Crystal Michelle Tiffany Jeremy Benjamin Mark Emily Aaron Charles Rebecca Jacob Stephen Patrick Sean Erin
    Jamie Kelly Samantha Nathan Sara Dustin Paul Angela Tyler Scott Katherine Andrea Gregory Erica Mary Travis Lisa Kenneth
    Bryan Lindsey Kristen Jose Alexander Jesse Katie Lindsay Shannon Vanessa Courtney Christine Alicia Cody Allison Bradley
    Samuel""".split()


def _draw(words: SingleTokenWords, random: Random, corruption: str) -> Filled:
    names = words.single("names", NAMES, at_least=5)
    template = random.choice(TEMPLATES)
    if random.random() < 0.5:
        template = template.replace("{S1} and {IO}", "{IO} and {S1}")
    io, s, *others = random.sample(names, 5)
    clean = {
        "IO": io,
        "S1": s,
        "S2": s,
        "place": random.choice(words.single("places", PLACES)),
        "object": random.choice(words.single("objects", OBJECTS)),
    }
    return Filled(template, clean, ioi_changes(corruption, io, s, others), (f" {io}",), (f" {s}",))


VARIANT = from_templates("ioi", IOI, _draw)
