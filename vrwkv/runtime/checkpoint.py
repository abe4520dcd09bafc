"""Checkpoint files: written atomically, read without running code from them, and loaded into models."""

import argparse
import functools
import os
import pickle
import re
import sys
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.facts import Facts

FilterFn = Callable[[Mapping[str, Any], Any], dict[str, Tensor]]
"""timm's `checkpoint_filter_fn(state_dict, model)`: the weights by the names of the model."""

_CHECKSUM = b"crc32 %08x"


def save(state: dict[str, Any], path: Path, keep: int = 0) -> None:
    """Writes `state` so that `path` holds either its old content or all of the new one, whatever happens.

    Args:
        state: What is to be in it.
        path: The file.
        keep: How many earlier ones to keep beside it, see `earlier`. Then it is missing for the moment of two renames.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            torch.save(state, file)
            _add_checksum(file)
            file.flush()
            os.fsync(file.fileno())
        paths = [path, *earlier(path, keep)]
        for newer, older in zip(reversed(paths[:-1]), reversed(paths[1:]), strict=True):
            if newer.exists():
                os.replace(newer, older)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def earlier(path: Path, count: int) -> list[Path]:
    """The names of what a file held before, the newest first: last.1.pth, last.2.pth, ... of last.pth."""
    return [path.with_name(f"{path.stem}.{number}{path.suffix}") for number in range(1, count + 1)]


def _add_checksum(file: BinaryIO) -> None:
    """Puts a checksum of the whole file where it disturbs no reader: the comment at the end of the zip archive."""
    size = file.seek(-2, os.SEEK_END)  # behind it stands the length of the comment, 0
    comment = _CHECKSUM % _crc32(file, size)
    file.seek(size)
    file.write(len(comment).to_bytes(2, "little") + comment)


def _check_checksum(path: str | Path) -> None:
    """Raises a UserError if the file has a checksum, and not its own."""
    length = len(_CHECKSUM % 0)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - 2 - length
        file.seek(max(0, size))
        found, comment = file.read(2), file.read()
        if found == length.to_bytes(2, "little") and comment != _CHECKSUM % _crc32(file, size):
            raise UserError(f"{path} is damaged: its checksum is not that of its content")


def _crc32(file: BinaryIO, size: int) -> int:
    file.seek(0)
    value = 0
    while size > 0:
        chunk = file.read(min(size, 1 << 20))
        value, size = zlib.crc32(chunk, value), size - len(chunk)
    return value


def read(path: str | Path, safe: Sequence[Any] = ()) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU; of a .safetensors file, the weights, and what its metadata say.

    Args:
        path: The file.
        safe: What may be in it beside what torch and timm allow, see `torch.serialization.safe_globals`.

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or it wants to run code.
    """
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if Path(path).suffix == ".safetensors":
            return _read_safetensors(path)
        _check_checksum(path)
        # timm's checkpoints hold the arguments of its train.py.
        with torch.serialization.safe_globals([argparse.Namespace, *safe]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else "it is damaged, or no checkpoint"
        raise UserError(f"{path} is not a checkpoint that can be read safely: {reason}") from error
    except Exception as error:  # bytes that are no checkpoint raise a dozen types
        raise UserError(f"{path} is not a checkpoint that can be read safely: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds {type(content).__name__}, not a dict")
    return content


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no mapping
    if "task" not in metadata:  # not written by tools/export.py
        return weights
    facts = Facts.from_metadata(metadata, path)
    about = {"arch": facts.arch, "model_args": facts.model_args, "class_names": facts.class_names}
    return {"state_dict": weights, **about, "data_config": facts.data_config()}


def unwrap(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a checkpoint, the averaged weights where there are some; or `content` where that is one."""
    found = (content[key] for key in ("state_dict_ema", "state_dict", "model") if key in content)
    return next((entry for entry in found if isinstance(entry, Mapping)), content)


def convert_on_load(module: nn.Module, filter_fn: FilterFn) -> None:
    """Let all that loads weights into `module`, alone or as a part of another, convert their names first.

    Args:
        module: It has the converted names.
        filter_fn: Names of the module itself must pass unchanged.
    """
    module.register_load_state_dict_pre_hook(functools.partial(_convert, filter_fn))


def _convert(filter_fn: FilterFn, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    given = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    state_dict.update({prefix + name: tensor for name, tensor in filter_fn(given, module).items()})


def load(
    model: nn.Module,
    content: Mapping[str, Any],
    path: str | Path,
    new_head: bool = False,
    optional: Container[str] = (),
    filter_fn: FilterFn | None = None,
) -> None:
    """Fills a model from the content of a checkpoint.

    Args:
        model: The model to fill.
        content: The checkpoint, or a state dict.
        path: Its file, for messages.
        new_head: For fine-tuning: a timm model's classifier keeps its values where the checkpoint has none of its size,
            and so does what stands before it (`pre_logits`) where the checkpoint has none.
        optional: Names of parameters that keep their values where the checkpoint does not have them.
        filter_fn: By default the `checkpoint_filter_fn` that timm's habit puts beside the class of the model.

    Raises:
        UserError: it holds no weights; some are missing, unexpected or of another shape.
    """
    weights = unwrap(content)
    if not weights or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        raise UserError(f"{path} is not a checkpoint: no state dict of tensors in it")
    filter_fn = filter_fn or getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    weights = _converted(clean_state_dict(dict(weights)), model, path, filter_fn)
    own = model.state_dict()
    kept = {name: own[name] for name in own if name in optional and name not in weights}
    if new_head:
        head = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
        heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
        kept |= {
            name: tensor
            for name, tensor in own.items()
            if (name.startswith(heads) and (name not in weights or weights[name].shape != tensor.shape))
            or (name.startswith("pre_logits.") and name not in weights)
        }
    weights |= kept
    compare(weights, own, path, type(model).__name__)
    model.load_state_dict(weights)


def _converted(
    weights: dict[str, Tensor], model: nn.Module, path: str | Path, filter_fn: FilterFn | None
) -> dict[str, Tensor]:
    if filter_fn is None:
        return weights
    try:
        return filter_fn(weights, model)
    except ValueError as error:
        raise UserError(f"checkpoint {path} does not fit {type(model).__name__}: {first_line(error)}") from error
    except Exception:  # written for its own model's weights, it may fail with others: `compare` names those
        return weights


def compare(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path, kind: str) -> None:
    """Checks that the weights of a checkpoint are those of a model.

    Args:
        weights: By the names of the model.
        own: The state dict of the model.
        path: The file, for messages.
        kind: What the model is called in messages.

    Raises:
        UserError: names are missing, unexpected or of another shape.
    """
    problems = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    found = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise UserError(f"checkpoint {path} is of another model than {kind}: {'; '.join(found)}")
