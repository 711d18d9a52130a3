"""The examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest


MODULES = (
    *("gopd.objective", "gopd.frozen.local", "gopd.trainer", "demo.arithmetic"),
    *("gopd.schedules", "gopd.monitors", "gopd.visualize", "preflight_check.sampling"),
    *("d2quant.packing", "d2quant.linear", "d2quant.topology", "d2quant.config", "d2quant.calibration"),
    "d2quant.names",
    "evaluation.resources",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"trl_gopd.{name}"))
    assert result.failed == 0


def test_the_check_sees_examples():
    module = importlib.import_module("trl_gopd.gopd.objective")
    assert doctest.testmod(module).attempted > 0
