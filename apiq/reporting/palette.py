"""The colours of the page and its figures, each in a light and a dark form.

Series colours keep apart for readers with any colour vision (blue, vermilion, green and purple after
Okabe and Ito, darkened or lightened until text in them reads on the background).
"""

from __future__ import annotations

ROLES: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14171a"),
    "ink": ("#1b1f23", "#e6e8ea"),
    "muted": ("#5f6872", "#9ba5af"),
    "rule": ("#dfe3e6", "#333a41"),
    "wash": ("#f5f6f7", "#1c2024"),
    "fill": ("#c9cfd5", "#4b545d"),
    "full": ("#6a737d", "#aab3bc"),
    "baseline": ("#8a5a9e", "#c79bd8"),
    "quantized": ("#bf4b00", "#f0894a"),
    "refined": ("#00755b", "#45b88f"),
    "finetuned": ("#0067a8", "#5eb3ec"),
    "codes": ("#0068aa", "#4ea6e0"),
    "scales": ("#e0962a", "#e8ad55"),
    "zeros": ("#7f8a94", "#8d98a2"),
    "adapters": ("#00795c", "#3fb892"),
}
RAMP: tuple[tuple[str, str], ...] = (
    ("#0b4f8a", "#8fd0ff"),
    ("#2f6a9e", "#7fb8dd"),
    ("#5a7f9f", "#8fa9ba"),
    ("#80868a", "#a8a39b"),
    ("#a07b62", "#c3a07e"),
    ("#b5653a", "#e09a62"),
    ("#b84500", "#ff9148"),
)
"""From the first block (blue) to the last (vermilion)."""


def colour(role: str) -> str:
    """The light form, in which figures are drawn."""
    return ROLES[role][0]


def ramp(index: int, count: int) -> str:
    """The colour of item `index` of `count`, in the light form."""
    return RAMP[0 if count < 2 else round(index * (len(RAMP) - 1) / (count - 1))][0]


def variables() -> dict[str, tuple[str, str]]:
    """CSS variable name -> (light, dark)."""
    return {f"--{role}": pair for role, pair in ROLES.items()} | {f"--ramp-{i}": pair for i, pair in enumerate(RAMP)}


def themed(text: str) -> str:
    """`text` with every light colour replaced by the CSS variable that follows the reader's theme."""
    for name, (light, _) in variables().items():
        text = text.replace(light, f"var({name})")
    return text
