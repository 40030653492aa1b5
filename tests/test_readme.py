"""Every Python example in the README runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_example_runs(number, capsys):
    names: dict[str, object] = {}
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), names)
    assert capsys.readouterr().out


def test_there_are_examples():
    assert EXAMPLES
