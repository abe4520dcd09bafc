"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vrwkv.runtime.errors import UserError, first_line


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name beside `path`, of the same ending, that becomes `path` at the end of the block, or nothing if that fails.

    Raises:
        UserError: it cannot be written, which is found before the block where possible.
    """
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    try:
        temporary.touch()
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
