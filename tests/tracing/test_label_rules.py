"""The registry of label rules: every operation has a single rule."""

import pytest

from clafusion.tracing.labels import rules
from clafusion.tracing.labels.rule import RULES, rule


def test_an_operation_has_a_single_rule():
    before = dict(RULES)
    with pytest.raises(ValueError, match="operation 'linear' has two rules"):
        rule("linear")(lambda *_: None)
    assert before == RULES


def test_every_family_registers_rules():
    modules = {function.__module__ for function in RULES.values()}
    assert modules == {f"{rules.__name__}.{family}" for family in rules.__all__}
