"""Gendered pronouns: after a name, and after a profession, which has no gender.

Professions and frames are those of the gender-bias task of Hanna et al. 2024, arXiv:2403.17806; their answers are stereotypes,
not facts.
"""

from random import Random

from ..corruptions import PRONOUN
from ..task import Corruption
from .fill import Filled, SingleTokenWords, from_templates

NAME_FRAMES = (
    "So {person} is a really great {profession}, isn't",
    "So {person} was such a good {profession}, wasn't",
    "Everyone knew that {person} went home because",
    "The {profession} said that {person} slept because",
    "Yesterday {person} told the {profession} that",
)
MEN = """Michael Christopher Matthew Joshua Daniel David James Robert John Joseph Andrew Ryan Brandon Jason Justin William
    Jonathan Brian Nicholas Anthony Eric Adam Kevin Steven Thomas Timothy Kyle Richard Jeffrey Jeremy Benjamin Mark
    Aaron Charles Jacob Stephen Patrick Sean Nathan Paul Scott Gregory Kenneth Bryan Jose Alexander Bradley Samuel""".split()
WOMEN = """Jessica Jennifer Amanda Sarah Stephanie Nicole Heather Elizabeth Megan Melissa Christina Rachel Laura Lauren Amber
    Brittany Danielle Kimberly Amy Michelle Tiffany Emily Rebecca Erin Samantha Sara Angela Katherine Andrea Erica
    Mary Lisa Lindsey Kristen Katie Lindsay Vanessa Courtney Christine Alicia Allison""".split()
PROFESSIONS = "doctor teacher lawyer singer painter pilot poet nurse driver chef friend neighbor".split()

BIAS_FRAMES = (
    *(f"The {{person}} {verb} that" for verb in "said yelled whispered wanted desired wished".split()),
    *(f"The {{person}} {verb} because" for verb in "ate ran drove slept cried laughed yelled".split()),
    *(f"The {{person}} {verb} because" for verb in ("went home", "stayed up", "was fired", "was promoted")),
)
OF_WOMEN = """actress advocate aide artist baker clerk counselor dancer educator instructor maid nun nurse observer performer
    photographer planner poet protester psychiatrist secretary singer substitute teacher teenager therapist
    treasurer tutor waitress""".split()
OF_MEN = """accountant actor administrator analyst architect athlete attorney author banker biologist boss boxer businessman
    butcher captain coach collector commander composer cop critic dad dean deputy detective director doctor
    economist editor farmer firefighter inspector judge lawyer manager mechanic minister officer painter pastor
    physician policeman president priest principal professor programmer researcher sailor scholar scientist senator
    sergeant soldier surgeon technician trader warrior worker""".split()
BIAS = (
    Corruption("gendered", "flips", "the profession becomes man or woman, whichever is not assumed of it"),
    Corruption("profession_random", "keeps", "the profession becomes another of which the same is assumed"),
)
PRONOUNS = (" he", " she")


def _name(words: SingleTokenWords, random: Random, corruption: str) -> Filled:
    names = words.single("names of men", MEN), words.single("names of women", WOMEN)
    template, gender = random.choice(NAME_FRAMES), random.randrange(2)
    person = random.choice(names[gender])
    clean = {"person": person, "profession": random.choice(words.single("professions", PROFESSIONS))}
    other = names[1 - gender] if corruption == "gender_flip" else names[gender]
    changes = {"person": words.other(random, other, person)}
    return Filled(template, clean, changes, (PRONOUNS[gender],), (PRONOUNS[1 - gender],))


def _profession(words: SingleTokenWords, random: Random, corruption: str) -> Filled:
    people = words.single("men's professions", OF_MEN), words.single("women's professions", OF_WOMEN)
    [man, woman] = words.single("words for a person", ("man", "woman"))
    template, gender = random.choice(BIAS_FRAMES), random.randrange(2)
    person = random.choice(people[gender])
    other = (woman, man)[gender] if corruption == "gendered" else words.other(random, people[gender], person)
    return Filled(template, {"person": person}, {"person": other}, (PRONOUNS[gender],), (PRONOUNS[1 - gender],))


NAMED = from_templates("pronoun", PRONOUN, _name)
BIASED = from_templates("gender_bias", BIAS, _profession)
