"""Checks of a recipe's text and of the tokens that it leaves out."""

from .schema import Recipe


def check_text(recipe: Recipe) -> list[str]:
    """Return one line for each source that lacks what it needs, and each exclusion or packing that does not fit."""
    text, problems = recipe.text, []
    sources = {f"text.mix.{number}": part for number, part in enumerate(text.mix)} if text.source == "mix" else {"text": text}
    for where, source in sources.items():
        needed = {"files": ("files", source.files), "hub": ("dataset", source.dataset)}
        if source.source in needed and not needed[source.source][1]:
            problems.append(
                f"{where}.{needed[source.source][0]}: required when {where}.source is {source.source}, but missing."
            )
        if source.source == "embedded" and recipe.model.id != "embedded":
            problems.append(
                f"{where}.source: the embedded corpus is for model.id embedded. Set {where}.source to files or hub."
            )
    if (text.source == "mix") != bool(text.mix):
        problems.append(
            "text.mix: required when text.source is mix, but missing."
            if text.source == "mix"
            else f"text.source: expected mix, or none, beside text.mix, got {text.source}. Leave it out."
        )
    if text.packing == "pack_masked" and text.bos == "none":
        problems.append(
            "text.bos: expected context or document with text.packing: pack_masked, which begins documents at their BOS, got "
            "none. Set text.packing: separate for tokenizers without BOS; it gives the same activations."
        )
    length = text.context_length
    problems += [
        f"harvest.exclude.positions: expected positions from {-length} to {length - 1} (text.context_length), got {place}."
        for place in recipe.harvest.exclude.positions
        if not -length <= place < length
    ]
    if set(recipe.harvest.exclude.roles) & set(text.chat.roles):
        both = ", ".join(role for role in text.chat.roles if role in recipe.harvest.exclude.roles)
        problems.append(f"harvest.exclude.roles: expected roles other than those of text.chat.roles, got {both} in both.")
    return problems
