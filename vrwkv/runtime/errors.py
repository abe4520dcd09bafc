"""Errors that a user can mend, and the one place that turns them into a message and an exit code."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

Main = Callable[..., int]  # takes argv: Sequence[str] | None = None


class UserError(Exception):
    """Bad input: the message says what was required and what was given, on one line for each thing to mend."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run, which can go on from what it has saved: the message says which, and where it stopped."""


REQUEUE = 75
"""The exit code of a run that was interrupted and is to be started again: EX_TEMPFAIL of sysexits.h."""


class MissingExtra(UserError, ImportError):
    """A package is not installed: the message names the extra that brings it."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def nearest(name: str, options: Iterable[str] | Mapping[str, str]) -> str:
    """`; nearest: a, b` for the options most like `name`, or nothing where none is like it.

    Args:
        name: What was given.
        options: What could have been meant; of a mapping the keys are compared and the values named.
    """
    named = options if isinstance(options, Mapping) else {option: option for option in options}
    found = difflib.get_close_matches(name, list(named), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(named[each] for each in found)}" if found else ""


def command_line(main: Main) -> Main:
    """Wraps a script's `main(argv)`: each line of a UserError becomes `error: ...`, and 1; Interrupted becomes
    `REQUEUE`, Ctrl-C elsewhere 130."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            # A DataLoader worker puts its traceback before the message.
            for line in str(error).rpartition("UserError: ")[2].strip().splitlines():
                print(f"error: {line}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            return REQUEUE if isinstance(error, Interrupted) else 130

    return wrapper
