"""Docstring completion: predict the next argument to document. Source: Heimersheim and Janiak 2023, including the names."""

from random import Random

from ..corruptions import DOCSTRING, docstring_changes
from .fill import Filled, SingleTokenWords, from_templates

# Two undocumented arguments, three documented ones, of which the third is asked for, and one more.
SIGNATURE = tuple(f"signature_{place}" for place in range(6))
TEMPLATE = (
    "\ndef {method}(self, "
    + ", ".join(f"{{{role}}}" for role in SIGNATURE)
    + '):\n    """{summary_0} {summary_1} {summary_2}\n\n'
    + "    :param {doc_2}: {about_0} {about_1}\n    :param {doc_3}: {about_2} {about_3}\n    :param"
)
ANSWER = "signature_4"
VARIABLES = """data name file value test new result line user key default request path output node item url model response text
    version function log string field start number values sub index error current context image message check json
    create size event state row obj parser end files form query fields instance label run action target array code
    num table source msg config first required options ret update module status group content client filename
    results last read command val base format color settings order found count match tag title parent call session
    token server host date description mode expected project info valid page header option task shape load names
    port old resource root""".split()
NOUNS = """price control action cost issue process position course minute education type market water room month law area
    field paper space ground term music food theory weight plant image river spring bread stone bridge sugar iron
    coal cloud winter window garden forest island silver metal glass wood leather cotton wheat horse engine wheel
    signal voice story poem letter prize crown palace temple army battle hero judge farmer doctor artist museum
    theater station hotel lake ocean beach valley mountain desert storm snow wind fire smoke dust shadow candle
    lamp chair table""".split()


def _draw(words: SingleTokenWords, random: Random, corruption: str) -> Filled:
    variables = words.single("variable names", VARIABLES, at_least=13)
    nouns = words.single("nouns", [noun for noun in NOUNS if noun not in VARIABLES], at_least=7)
    method, *arguments = random.sample(variables, 7)
    clean = dict(zip(SIGNATURE, arguments, strict=True)) | {"method": method}
    clean |= {"doc_2": clean["signature_2"], "doc_3": clean["signature_3"]}
    about = random.sample(nouns, 7)
    clean |= {f"summary_{i}": noun for i, noun in enumerate(about[:3])} | {
        f"about_{i}": noun for i, noun in enumerate(about[3:])
    }
    others = random.sample([one for one in variables if one not in clean.values()], 5)
    changes = docstring_changes(corruption, SIGNATURE[2:4], ANSWER, ("doc_2", "doc_3"), others)
    answer = clean[ANSWER]
    foils = dict.fromkeys([argument for argument in arguments if argument != answer] + list(changes.values()))
    return Filled(TEMPLATE, clean, changes, (f" {answer}",), tuple(f" {foil}" for foil in foils))


VARIANT = from_templates("docstring", DOCSTRING, _draw, "max_logit_diff")
