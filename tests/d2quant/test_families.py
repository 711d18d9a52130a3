"""
Each decoder family is quantized whole or refused by its name, as the table of docs/families.md says.

`make families` writes the table.
"""

from pathlib import Path

import pytest

from tests.d2quant.families import FAMILIES
from tests.d2quant.family_table import BEGIN, END, HEAD, examine


PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def table() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()


class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.filterwarnings("ignore")  # of the models, of which each has others
    def test_what_becomes_of_it_is_what_the_table_says(self, family):
        outcome = examine(family)
        assert outcome.errors == []
        assert outcome.line() in table()

    def test_table_has_each_family_once(self):
        assert table()[:2] == HEAD
        assert [line.split(" | ")[0].removeprefix("| ") for line in table()[2:]] == list(FAMILIES)
        assert all(line.split(" | ")[2] in ("quantized", "refused") for line in table()[2:])
