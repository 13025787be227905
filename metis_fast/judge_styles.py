"""The names of judge styles (`reward_model.style`), for those who read data and for those who open judges."""

from __future__ import annotations

STYLES = ("rule", "choice", "math", "llm")

# What public data sets call the same things.
SYNONYMS = {
    **dict.fromkeys(("exact_match", "exact", "em", "string", "string_match", "number", "numeric", "boolean"), "rule"),
    **dict.fromkeys(("multiple_choice", "multi_choice", "mcq", "option"), "choice"),
    **dict.fromkeys(("math_verify", "mathematics", "latex"), "math"),
    **dict.fromkeys(("model", "llm_judge", "model_judge", "gpt"), "llm"),
}


def known_style(style: str) -> str | None:
    """The style that a name in the data means, whatever its case and separators; None: no such style."""
    name = style.strip().lower().replace("-", "_").replace(" ", "_")
    name = SYNONYMS.get(name, name)
    return name if name in STYLES else None
