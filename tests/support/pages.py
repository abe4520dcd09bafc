"""The Python on pages in Markdown."""

import re
from typing import Any


def run_python(page: str, names: dict[str, Any], blocks: slice = slice(None)) -> dict[str, Any]:
    """Runs blocks of Python one after another and returns `names` with what they leave behind."""
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)[blocks]:
        exec(block, names)
    return names
