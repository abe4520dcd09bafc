"""The work folder of a training by mmengine: which of its checkpoints a run goes on from."""

import re
import zipfile
from pathlib import Path

from vrwkv.runtime.errors import UserError


def find_start(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that a run in `folder` goes on from; None where it starts anew.

    Args:
        folder: The work folder.
        resume: None starts anew, "auto" takes the folder's latest checkpoint, or a checkpoint.

    Raises:
        UserError: the folder holds another run, or nothing that can be resumed.
    """
    latest = find_latest(folder)
    held = sorted(path.name for path in _checkpoints(folder)) or ([str(latest)] if latest else [])
    if resume == "auto":
        if latest is None and any(name.startswith("best_") for name in held):
            raise UserError(
                f"{folder} holds no checkpoint with a training state: choose another work folder, where "
                f"load_from={folder / held[0]} starts from these weights"
            )
        return latest
    path = Path(resume) if resume else None
    own = folder.resolve() if latest is None or latest.parent == folder else latest.resolve().parent
    if held and not (path and path.resolve().parent == own):
        files = ", ".join(held[:3]) + ", ..." * (len(held) > 3)
        raise UserError(
            f"{folder} holds an earlier run ({files}): add --resume to go on with it, or choose another work folder"
        )
    return path


def find_latest(folder: Path) -> Path | None:
    """The checkpoint that `last_checkpoint` names, and of it the file in this folder where that was copied; without it
    the one of the most iterations or epochs that is whole."""
    note = folder / "last_checkpoint"
    named = Path(note.read_text().strip()) if note.is_file() else None
    if named and (folder / named.name).is_file():
        return folder / named.name
    found = [path for path in _checkpoints(folder) if not path.name.startswith("best_") and zipfile.is_zipfile(path)]
    if found:
        return max(found, key=_count)
    return named if named and named.is_file() else None


def _checkpoints(folder: Path) -> list[Path]:
    return [path for kind in ("iter", "epoch", "best") for path in folder.glob(f"{kind}_*.pth")]


def _count(path: Path) -> int:
    """Of iterations or epochs, from a checkpoint's name."""
    found = re.search(r"\d+", path.stem)
    return int(found[0]) if found else 0
