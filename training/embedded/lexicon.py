"""Vocabulary of the embedded language, used by the corpus and the tokenizer.

Words are English where a task needs a known class (names with a gender, nouns and verbs with a number) and invented
elsewhere: a filler word has only a part of speech, a topic, and a Zipf rank, so its factors are fully known. The tokenizer
depends on the order of these lists: appending is safe, reordering requires retraining the model.
"""

from itertools import product

MALE_NAMES = tuple(
    """Aaron Adam Brian Carl Cody Daniel David Dustin Edgar Eric Felix Frank George Gregory Harold Henry Ivan Jack
    Jacob James Jason Joel John Joshua Karl Kevin Kyle Leon Luke Marcus Mark Martin Nathan Oscar Patrick Paul Peter
    Quentin Ralph Richard Robert Ryan Samuel Scott Stephen Thomas Travis Victor""".split()
)
FEMALE_NAMES = tuple(
    """Abigail Alice Amber Andrea Angela Anna Bella Brenda Carol Christina Clara Crystal Diana Edith Ellen Emily Erica
    Fiona Grace Hannah Heather Helen Irene Jane Jessica Julia Karen Kate Laura Linda Lisa Lucy Maria Mary Megan Nancy
    Nicole Olivia Paula Rachel Rose Ruth Sarah Sophie Susan Tiffany Vanessa Wendy""".split()
)
NAMES = MALE_NAMES + FEMALE_NAMES

PLACES = tuple(
    """store garden restaurant school hospital office house station market library harbor museum park theater bakery
    farm beach castle forest chapel stadium workshop cinema village""".split()
)
OBJECTS = tuple(
    """ring kiss bone basketball computer necklace drink snack book letter flower coin map lamp basket ticket hat
    blanket key pencil violin mirror ladder sandwich""".split()
)

# (singular, plural): subjects and attractors of the agreement task.
NOUNS = tuple(
    tuple(pair.split("/"))
    for pair in """actor/actors author/authors baker/bakers boy/boys cat/cats chef/chefs child/children clerk/clerks
    cousin/cousins dancer/dancers doctor/doctors dog/dogs driver/drivers farmer/farmers friend/friends girl/girls
    guard/guards guest/guests horse/horses hunter/hunters judge/judges king/kings lawyer/lawyers man/men miner/miners
    monk/monks mouse/mice neighbor/neighbors nurse/nurses painter/painters pilot/pilots poet/poets prince/princes
    queen/queens sailor/sailors senator/senators singer/singers soldier/soldiers student/students teacher/teachers
    tourist/tourists uncle/uncles waiter/waiters woman/women""".split()
)
# (third person singular, plural), intransitive and transitive.
VERBS = tuple(
    tuple(pair.split("/"))
    for pair in """laughs/laugh sings/sing sleeps/sleep waits/wait smiles/smile dances/dance works/work swims/swim
    travels/travel listens/listen complains/complain hesitates/hesitate is/are was/were has/have""".split()
)
TRANSITIVE_VERBS = tuple(
    tuple(pair.split("/"))
    for pair in "likes/like admires/admire follows/follow helps/help avoids/avoid hates/hate knows/know trusts/trust".split()
)
# Words after the verb, so that the sentence does not end on the answer.
VERB_TAILS = {
    "is": ("tired", "happy", "late", "hungry"),
    "are": ("tired", "happy", "late", "hungry"),
    "was": ("tired", "happy", "late", "hungry"),
    "were": ("tired", "happy", "late", "hungry"),
    "has": ("a dream", "a plan", "a cold"),
    "have": ("a dream", "a plan", "a cold"),
}
ADVERBS = ("today", "often", "again", "loudly", "now", "there", "alone", "gladly")
LOCATIVES = ("near", "behind", "beside", "with", "above", "opposite")
ADJECTIVES = ("old", "young", "tall", "quiet", "brave", "famous", "clever", "kind")
ROLES_OF_PEOPLE = ("doctor", "teacher", "lawyer", "singer", "painter", "pilot", "poet", "nurse", "driver", "chef")

EVENTS = tuple(
    """war truce siege drought famine reign trial voyage strike plague feud project festival campaign treaty
    embargo""".split()
)
CENTURIES = tuple(f"{century:02d}" for century in range(11, 20))
YEARS = tuple(f"{year:02d}" for year in range(100))

FUNCTIONS = ("load", "parse", "merge", "send", "build", "filter", "update", "render", "train", "split")
ARGUMENTS = tuple(
    """size path mode name count start stop value index color width depth label shape scale order limit offset
    target source format field group style""".split()
)

PRONOUNS = {"male": ("he", "him", "his", "himself"), "female": ("she", "her", "her", "herself")}

N_TOPICS = 12


def _coin(onsets: str, vowels: str, codas: str, suffix: str, n: int) -> tuple[str, ...]:
    """Return ``n`` pronounceable words in a fixed, scrambled order."""
    words = [a + v + b + w + c + suffix for a, v, b, w, c in product(onsets.split(), vowels, "dlmnrt", "aeo", codas.split())]
    # A stride coprime to the length visits every word once.
    stride = 7919
    return tuple(words[(stride * i) % len(words)] for i in range(n))


# Zipf-ranked filler; rank r of a class belongs to topic r mod N_TOPICS.
FILLER_NOUNS = _coin("b d f g k p s v z bl dr", "aiou", "n r sk lt", "", 360)
FILLER_VERBS = _coin("ch gr h j m tr w st", "aeiu", "p m ck", "ed", 132)
FILLER_ADJECTIVES = _coin("c fl l n pr sn y br", "eiou", "v g nd", "y", 132)

PUNCTUATION = (",", ".", ":", "(", ")", "?", ";")
FUNCTION_WORDS = tuple(
    """the a an and to of that in from year lasted Then After When While Afterwards Friends went gave decided give
    handed said had got were working commuting it at lot fun long argument found The roll again def param returns because so
    lost hurt saw praised blamed isn t good very wanted lunch passed offered this not dressed called home""".split()
)


def vocabulary() -> tuple[str, ...]:
    """Return all tokens of the language without duplicates, special tokens first, in the order of token ids."""
    words = ["<unk>", "<bos>", "<pad>", *PUNCTUATION, *FUNCTION_WORDS, *NAMES, *PLACES, *OBJECTS]
    for pair in (*NOUNS, *VERBS, *TRANSITIVE_VERBS):
        words.extend(pair)
    for tails in VERB_TAILS.values():
        words.extend(word for tail in tails for word in tail.split())
    words += [*ADVERBS, *LOCATIVES, *ADJECTIVES, *ROLES_OF_PEOPLE, *EVENTS, *CENTURIES, *YEARS, *FUNCTIONS, *ARGUMENTS]
    words += [pronoun for forms in PRONOUNS.values() for pronoun in forms]
    words += [*FILLER_NOUNS, *FILLER_VERBS, *FILLER_ADJECTIVES]
    return tuple(dict.fromkeys(words))
