"""Figures of a diff for the terminal."""

from typing import Any

from .kinds import BASE_ONLY, TUNED_ONLY


def diff_summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as pairs of name and value, for the console."""
    counts = found["counts"]
    lines = [
        ("models", f"{found['models']['base']} and {found['models']['tuned']}"),
        ("read", f"{found['tokens']:,} held-out tokens of {found['documents']:,} documents"),
        ("fvu", f"base {found['fvu']['base']:.4g}, tuned {found['fvu']['tuned']:.4g}, l0 {found['l0']:.4g}"),
        ("latents", ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items())),
    ]
    if "true_exclusive" in found:
        true = found["true_exclusive"]
        lines.append(("truly exclusive", f"{true[BASE_ONLY]} of the base, {true[TUNED_ONLY]} of the tuned model"))
    if "difference_sae" in found:
        sae = found["difference_sae"]
        lines.append(("SAE on difference", f"fvu {sae['fvu']:.4g}, l0 {sae['l0']:.4g}, {sae['dead']:,} dead"))
    elif "difference_sae" in found["reasons"]:
        lines.append(("SAE on difference", f"none: {found['reasons']['difference_sae']}"))
    return lines


def diff_tables(found: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return the tables for the terminal: closed shares of the KL divergence, and the leading exclusive latents."""
    tables = []
    patching = found["patching"]
    if patching is not None and patching["kl_base"] > 0:
        rows = [
            [name.replace("_", " "), f"{each['share']:.3f}", f"{each['kl']:.4g}"] for name, each in patching["closed"].items()
        ]
        tables.append((["base changed by", "KL closed", "KL left"], rows))
    rows = [
        [
            str(row["latent"]),
            row["kind"].replace("_", " "),
            f"{row['relative_norm']:.3f}",
            "-" if row["cosine"] is None else f"{row['cosine']:.2f}",
            *("-" if row[name] is None else f"{row[name]:.2f}" for name in ("nu_error", "nu_reconstruction")),
            " ".join(entry["token"] for entry in row["top_tokens"][:5]),
        ]
        for row in found["latents"][:10]
    ]
    if rows:
        tables.append((["latent", "kind", "norm", "cosine", "nu error", "nu recon.", "tokens"], rows))
    return tables
