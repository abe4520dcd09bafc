"""Fixtures for the tests of command-line tools."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from support.scripts import REPOSITORY, Main


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[[Main, list[Any]], str]:
    """Calls a main that must fail and returns its message, a line for each thing to mend."""

    def call(main: Main, argv: list[Any]) -> str:
        capsys.readouterr()
        assert main([str(each) for each in argv]) == 1
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert lines
        return "\n".join(lines)

    return call


@pytest.fixture
def subprocess_environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than an epoch of the tests' models."""
    monkeypatch.setattr("vrwkv.runtime.run_folder.draw_curves", lambda summary, picture, measures: picture.touch())
