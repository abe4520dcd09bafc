"""mmengine's Runner and its reading of checkpoints, strict where they are lenient."""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.runner import CheckpointLoader, Runner

from vrwkv.runtime.checkpoint import unwrap
from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.processes import is_primary
from vrwkv.runtime.progress import say
from vrwkv.segmentation.checkpoint import load_segmentor_weights, read


def read_checkpoints_safely() -> None:
    """Make everything that reads checkpoints through mmengine, `init_cfg` for one, take local files alone, safely.

    mmengine has a loader for each kind of address (http, s3, torchvision, ...), and each runs what is in the file.
    """
    for prefix in list(CheckpointLoader._schemes):
        CheckpointLoader.register_scheme(prefix, _read_local, force=True)


def _read_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    if re.match(r"[\w.+:-]+://", filename):
        raise UserError(f"checkpoint {filename} must be a local file: download it and give its path")
    return read(filename)


@contextmanager
def config_errors(what: str, still: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turns any exception into a UserError as long as a config is more likely to be at fault than the program.

    Args:
        what: The beginning of the message.
        still: Asked when there is an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every constructor has its own types
        if not still():
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
        raise UserError(f"{what}: {first_line(error)} ({where})") from error


def unwrap_model(model: Any) -> Any:
    """The segmentor in DDP's wrapper or in the one that averages over flips and scales."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _check_state(content: dict[str, Any], path: str) -> None:
    meta = content.get("meta", {})
    if "optimizer" not in content or "message_hub" not in content or not {"epoch", "iter"} <= set(meta):
        raise UserError(f"checkpoint {path} has no training state; load_from starts from its weights")


def _with_own_classifiers(content: dict[str, Any], model: Any, path: str) -> dict[str, Any]:
    """A checkpoint's weights, but the model's own for classifiers of another number of classes, as for fine-tuning."""
    weights = dict(unwrap(content))
    own = model.state_dict()
    new = [name for name in own if ".conv_seg." in name and name in weights and weights[name].shape != own[name].shape]
    if new and is_primary():
        say(f"{path} has another number of classes: {', '.join(new)} start anew")
    return weights | {name: own[name] for name in new}


class StrictRunner(Runner):
    """A Runner that leaves no weights out silently and runs no code from checkpoints."""

    proven = False
    """Whether an iteration has gone through: what fails later is hardly the config's fault."""

    def load_checkpoint(self, filename: str, *_: Any, **__: Any) -> dict[str, Any]:
        """Fills the model, for `load_from` and for resuming; in the former case new classifiers keep their values.

        Raises:
            UserError: no checkpoint, or one of another model.
        """
        content = _read_local(filename)
        model = unwrap_model(self.model)
        if self._resume:
            _check_state(content, filename)
            content["meta"].pop("config", None)  # mmengine would run it as a program
        else:
            weights = _with_own_classifiers(content, model, filename)
            content = {"state_dict": weights, "meta": content.get("meta", {})}
        # Hooks may change what is loaded: EMAHook puts the weights that were trained in the place of their average.
        self.call_hook("after_load_checkpoint", checkpoint=content)
        load_segmentor_weights(model, content, filename)
        return content

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Calls the hooks, and notes the end of the first iteration."""
        super().call_hook(fn_name, **kwargs)
        if fn_name in ("after_train_iter", "after_test_iter"):
            self.proven = True
