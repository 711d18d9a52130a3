"""
The page is well-formed HTML whatever the tokens are, runs and loads nothing, shows every character, and colours each
token by its share of a symmetric scale, legibly on both backgrounds.
"""

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gopd.gopd.visualize import DARK, LIGHT, NEGATIVE, OPACITY, POSITIVE, SYMBOLS, advantages_html


VOID = {"meta", "br"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</span></p><img src=x onerror=alert(1)>",
    '"\' onmouseover="alert(1)',
    "--><style>*{display:none}</style>",
    "&lt;b&gt;&#10;",
    "]]></title>",
    "\u202eright to left\u200b\x00\x1b[31m",
    "\ud800",
]


class Page(HTMLParser):
    """Reads a page strictly: each element is closed in its turn. Keeps tags, title attributes and texts."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.tooltips, self.spans, self.texts = [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span":
            assert set(attributes) <= {"title", "style"}
            self.spans.append(attributes)
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "span" in self.open:
            self.texts[-1] += data

    @property
    def tokens(self):
        """Attributes and text of the tokens: of the spans but for the legend's."""
        return [
            (attributes, text)
            for attributes, text in zip(self.spans, self.texts, strict=True)
            if "title" in attributes
        ]


def make_rows(tokens, advantages=None, completion=0):
    advantages = [0.5] * len(tokens) if advantages is None else advantages
    return [
        {
            "completion": completion,
            "position": position,
            "token": token,
            "student_logp": -1.25,
            "teacher_logp": -0.75,
            "reference_logp": None,
            "advantage": advantage,
        }
        for position, (token, advantage) in enumerate(zip(tokens, advantages, strict=True))
    ]


def color(attributes):
    """Red, green, blue and opacity, or `None`."""
    found = re.fullmatch(r"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", attributes.get("style", ""))
    return found and (tuple(int(part) for part in found.groups()[:3]), float(found[4]))


class TestText:
    @settings(derandomize=True, deadline=None)
    @given(tokens=st.lists(st.text(max_size=8) | st.sampled_from(HOSTILE), max_size=6), title=st.text(max_size=8))
    def test_page_is_well_formed_whatever_the_tokens_are(self, tokens, title):
        page = Page(advantages_html(make_rows(tokens), title=title))
        assert set(page.tags) <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "i", "br"}
        assert page.tags.count("style") == page.tags.count("title") == 1
        assert len(page.tokens) == len(tokens)

    @pytest.mark.parametrize("token", HOSTILE)
    def test_hostile_token_is_text(self, token):
        html = advantages_html(make_rows([token]), title=token.encode(errors="replace").decode())
        page = Page(html)
        shown = "".join(
            SYMBOLS.get(character) or (character if character.isprintable() else f"U+{ord(character):04X}")
            for character in token
        )
        ((_, text),) = page.tokens
        assert text == shown
        assert not {"script", "img"} & set(page.tags)

    @settings(derandomize=True, deadline=None)
    @given(tokens=st.lists(st.text(st.characters(exclude_categories=()), max_size=8), max_size=6))
    def test_page_can_be_written_and_shows_no_invisible_character(self, tokens):
        page = advantages_html(make_rows(tokens), title="t")
        page.encode()
        assert all(character.isprintable() or character == "\n" for character in page)

    def test_white_space_is_written_out(self):
        page = advantages_html(make_rows([" a\tb\n", ""]), title="t")
        assert "<i>·</i>a<i>→</i>b<i>⏎</i><br></span>" in page
        assert [text for _, text in Page(page).tokens] == ["·a→b⏎", "∅"]

    def test_nothing_is_run_or_loaded(self):
        page = advantages_html(make_rows(["a"]), title="t")
        assert "default-src 'none'; style-src 'unsafe-inline'" in page
        assert not re.search(r"https?:|url\(|@import|<script|<link", page)

    def test_tooltip_has_all_numbers(self):
        (row,) = make_rows(['<"é'], [-0.125])
        ((attributes, _),) = Page(advantages_html([row | {"reference_logp": -2.5}], title="t")).tokens
        assert attributes["title"].split("\n") == [
            "token '<\"\\xe9' at position 0",
            "advantage -0.1250",
            "student_logp -1.2500",
            "teacher_logp -0.7500",
            "reference_logp -2.5000",
        ]
        ((attributes, _),) = Page(advantages_html([row], title="t")).tokens
        assert "reference" not in attributes["title"]

    def test_completions_are_kept_apart(self):
        rows = make_rows(["a", "b"], [1.0, 2.0]) + make_rows(["c"], [-1.0], completion=3)
        page = advantages_html(rows, title="t")
        assert "Completion 0: 2 tokens, mean advantage +1.5 nats" in page
        assert "Completion 3: 1 tokens, mean advantage -1 nats" in page
        assert Page(page).tags.count("h2") == 2

    def test_no_rows(self):
        page = Page(advantages_html([], title="t"))
        assert page.tokens == [] and len(page.spans) == 5


class TestColors:
    def colors(self, advantages, **arguments):
        page = Page(advantages_html(make_rows(["a"] * len(advantages), advantages), title="t", **arguments))
        return [color(attributes) for attributes, _ in page.tokens]

    def test_sign_gives_the_color_and_share_of_the_scale_its_strength(self):
        assert self.colors([2.0, 1.0, 0.0, -1.0, -2.0, -9.0, math.nan, math.inf], scale=2.0) == [
            (POSITIVE, OPACITY),
            (POSITIVE, OPACITY / 2),
            None,
            (NEGATIVE, OPACITY / 2),
            (NEGATIVE, OPACITY),
            (NEGATIVE, OPACITY),
            None,
            (POSITIVE, OPACITY),
        ]

    @pytest.mark.parametrize(
        ("advantages", "scale"),
        [
            ([*range(-10, 10), 1000.0], "10"),  # the 20th of 21: one that is far out does not count
            ([0.0] * 99 + [3.0], "3"),
            ([0.0, 0.0], "1"),
            ([math.nan, -math.inf, 0.25], "0.25"),
            ([], "1"),
        ],
    )
    def test_scale_fits_the_rows(self, advantages, scale):
        page = advantages_html(make_rows(["a"] * len(advantages), advantages), title="t")
        assert f">-{scale} or less</span>" in page
        assert f">+{scale} or more</span>" in page

    def test_legend_is_symmetric(self):
        page = Page(advantages_html([], title="t", scale=4.0))
        assert page.texts == ["-4 or less", "-2", "0", "+2", "+4 or more"]
        assert [color(attributes) for attributes in page.spans] == [
            (NEGATIVE, OPACITY),
            (NEGATIVE, OPACITY / 2),
            None,
            (POSITIVE, OPACITY / 2),
            (POSITIVE, OPACITY),
        ]

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
    def test_scale_must_be_positive_and_finite(self, scale):
        with pytest.raises(ValueError, match=f"`scale` must be positive and finite, got {scale}. Use None"):
            advantages_html([], title="t", scale=scale)

    @pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
    @pytest.mark.parametrize("paint", [POSITIVE, NEGATIVE], ids=["positive", "negative"])
    def test_text_is_legible(self, theme, paint):
        """Contrast of WCAG 2.2, at the strongest colour."""

        def channels(code):
            return [int(code[i : i + 2], 16) for i in (1, 3, 5)]

        def luminance(rgb):
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        page, text = map(channels, theme)
        under = [OPACITY * a + (1 - OPACITY) * b for a, b in zip(paint, page, strict=True)]
        low, high = sorted((luminance(under), luminance(text)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
