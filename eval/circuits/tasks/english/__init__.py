"""Tasks in English, for models whose tokenizer has their words as single tokens."""

from . import agreement, choice, docstrings, ioi, objects, pronouns, repetition, years

VARIANTS = {
    "ioi": ioi.VARIANT,
    "greater_than": years.VARIANT,
    **agreement.VARIANTS,
    "pronoun": pronouns.NAMED,
    "gender_bias": pronouns.BIASED,
    "induction": repetition.VARIANT,
    "docstring": docstrings.VARIANT,
    "colored_objects": objects.VARIANT,
    **choice.VARIANTS,
}
