"""Every scenario that has a short form is tried here as often as that says, and nothing is lost."""

import pytest

from tests.faults import __main__ as faults
from tests.faults.harness import SCENARIOS, run


faults.load()


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.short], ids=lambda s: f"{s.area}: {s.name}")
def test_nothing_is_lost(scenario):
    result = run(scenario, tries=scenario.short, seed=0)
    assert not result.lost, "\n".join(result.failures)
    assert result.tries == scenario.short
