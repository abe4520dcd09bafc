"""Checkpoint files: written atomically, read without running code from them."""

import os
from pathlib import Path
from typing import Any

import torch

from vrwkv.runtime.errors import UserError, first_line


def save(state: dict[str, Any], path: Path) -> None:
    """Writes `state` so that `path` holds either its old content or all of the new one, whatever happens.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU; of a .safetensors file, only the weights.

    Raises:
        UserError: the file is missing or no checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint raise a dozen types
        raise UserError(f"{path} is not a checkpoint that can be read safely: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds {type(content).__name__}, not a dict")
    return content


def weights_of(content: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint: the averaged weights where there are some; bare state dicts are fine.

    Raises:
        UserError: there is none.
    """
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} is not a checkpoint: no state dict of tensors in it")
    return content
