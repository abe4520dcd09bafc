"""What our trainings do beside mmengine's: they stop where the loss or a weight is not finite."""

import math
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from torch.nn.utils import get_total_norm

from vrwkv.runtime.errors import UserError
from vrwkv.segmentation.work_folder import find_latest


class FiniteHook(Hook):
    """Ends a training whose loss or weights are not finite, before that is saved."""

    priority = "NORMAL"  # before mmengine saves, and removes an older checkpoint for it

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Raises UserError where they are not."""
        loss = outputs["loss"].item()
        if math.isfinite(loss) and get_total_norm(runner.model.parameters()).isfinite():
            return
        what = "weights became infinite" if math.isfinite(loss) else f"the loss became {loss}"
        last = find_latest(Path(runner.work_dir))
        raise UserError(
            f"{what} in iteration {runner.iter + 1}: try a lower optim_wrapper.clip_grad.max_norm with --resume, or a "
            "lower optim_wrapper.optimizer.lr in another work folder; "
            + (f"{last} holds the last state before" if last else "no state before was saved")
        )
