"""The project's scripts as modules."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parents[2]
Main = Callable[[list[str]], int]


def load_script(path: str) -> ModuleType:
    """A script of the repository, such as "tools/train.py"."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tool(name: str) -> Main:
    """The `main` of tools/<name>.py."""
    return load_script(f"tools/{name}.py").main
