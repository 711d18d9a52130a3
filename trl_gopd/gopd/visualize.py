"""
A page that shows what each token was rewarded with.

Blue tokens were encouraged, orange ones discouraged, which people who see few colours tell apart too. A colour is laid
over the page's own background, so that it fades to nothing at an advantage of 0, in light and in dark.
"""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any


# Blue and vermilion of the palette of Okabe and Ito, https://jfly.uni-koeln.de/color/.
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
# Opacity of the strongest colour: text on it keeps the contrast of 4.5 that WCAG 2.2 (1.4.3) asks for.
OPACITY = 0.6
LIGHT, DARK = ("#ffffff", "#1a1a1a"), ("#121212", "#e8e8e8")  # background, text
# Colours saturate here: a few tokens far out would leave all others without one.
SCALE_PERCENTILE = 0.95

# What is written for a character that cannot be seen; others that cannot be printed are written by their number.
SYMBOLS = {" ": "·", "\n": "⏎", "\t": "→"}

STYLE = f"""\
:root {{ color-scheme: light dark; --page: {LIGHT[0]}; --text: {LIGHT[1]}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: {DARK[0]}; --text: {DARK[1]}; }} }}
body {{ background: var(--page); color: var(--text); font: 1rem/1.9 ui-monospace, monospace; margin: 2rem; }}
h1, h2 {{ font: 1.1rem system-ui, sans-serif; }}
p {{ overflow-wrap: anywhere; }}
span {{ border-radius: .2em; padding: .15em 0; unicode-bidi: isolate; }}
i {{ font-style: normal; opacity: .5; }}"""


def advantages_html(rows: Sequence[Mapping[str, Any]], *, title: str, scale: float | None = None) -> str:
    """
    One HTML page, without scripts or anything loaded from elsewhere. A token has its advantage as its colour and all
    its numbers in a tooltip. White space and what cannot be seen are written out.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Rows of `monitors.token_table`, those of a completion next to each other.
        title (`str`):
            Heading of the page.
        scale (`float`, *optional*):
            Advantage, in nats, whose colour is the strongest; the scale reaches from its negative to it. Defaults to
            the 95th percentile of the absolute advantages. Give one to compare pages.

    Returns:
        `str`: The page, to be written in UTF-8.

    Raises:
        `ValueError`: If `scale` is not positive and finite.

    Example:

    ```python
    >>> from trl_gopd.gopd.visualize import advantages_html
    >>> row = {"completion": 0, "position": 0, "token": "<s> ", "advantage": 0.5, "student_logp": -1.0}
    >>> page = advantages_html([row | {"teacher_logp": -0.5, "reference_logp": None}], title="Step 10")
    >>> "&lt;s&gt;<i>·</i></span>" in page
    True

    ```
    """
    if scale is None:
        scale = _default_scale([abs(row["advantage"]) for row in rows])
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be positive and finite, got {scale}. Use None for one that fits the rows.")
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing is loaded or run, even if something were to slip through the escaping.
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{STYLE}\n</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        "<p>Advantage in nats:",
    ]
    for share, bound in ((-1, " or less"), (-0.5, ""), (0, ""), (0.5, ""), (1, " or more")):
        value = f"{share * scale:+.3g}" if share else "0"
        lines.append(f"<span{_background(share)}>{value}{bound}</span>")
    lines.append("</p>")
    for completion, group in groupby(rows, key=lambda row: row["completion"]):
        tokens = list(group)
        mean = sum(row["advantage"] for row in tokens) / len(tokens)
        lines.append(f"<h2>Completion {completion}: {len(tokens)} tokens, mean advantage {mean:+.4g} nats</h2>")
        spans = (
            f'<span title="{_tooltip(row)}"{_background(row["advantage"] / scale)}>{_visible(row["token"])}</span>'
            for row in tokens
        )
        lines.append(f"<p>{''.join(spans)}</p>")
    return "\n".join([*lines, "</body></html>\n"])


def _default_scale(sizes: list[float]) -> float:
    """Nearest-rank percentile of the finite `sizes`; their largest if that is 0, and 1 if that is too."""
    finite = sorted(size for size in sizes if math.isfinite(size))
    if not finite:
        return 1.0
    return finite[math.ceil(SCALE_PERCENTILE * len(finite)) - 1] or finite[-1] or 1.0


def _background(share: float) -> str:
    """Attribute that colours an element, for an advantage as a share of the scale. None at 0, nor for NaN."""
    if not abs(share) > 0:
        return ""
    red, green, blue = POSITIVE if share > 0 else NEGATIVE
    return f' style="background:rgba({red},{green},{blue},{min(abs(share), 1.0) * OPACITY:.3f})"'


def _tooltip(row: Mapping[str, Any]) -> str:
    lines = [f"token {row['token']!a} at position {row['position']}"]
    for name in ("advantage", "student_logp", "teacher_logp", "reference_logp"):
        if row[name] is not None:
            lines.append(f"{name} {row[name]:+.4f}")
    return html.escape("\n".join(lines)).replace("\n", "&#10;")


def _visible(token: str) -> str:
    """The token as HTML in which every character can be seen, and none can turn the direction of what follows."""
    pieces = []
    for character in token:
        if character in SYMBOLS:
            pieces.append(f"<i>{SYMBOLS[character]}</i>" + "<br>" * (character == "\n"))
        elif character.isprintable():
            pieces.append(html.escape(character))
        else:
            pieces.append(f"<i>U+{ord(character):04X}</i>")
    return "".join(pieces) or "<i>∅</i>"
