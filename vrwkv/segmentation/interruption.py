"""Trainings by mmengine that end at a signal with what they have trained saved."""

import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import DataLoader

from vrwkv.runtime.errors import Interrupted
from vrwkv.runtime.processes import World
from vrwkv.runtime.signals import StopSignals, outlive_stop_signals
from vrwkv.segmentation.engine import StrictRunner
from vrwkv.segmentation.work_folder import find_latest

LOOK_EVERY = 10  # batches of an evaluation by several processes, which wait for each other to agree


class TrainingRunner(StrictRunner):
    """A Runner whose loader workers outlive the signals, so that an iteration can be finished."""

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> DataLoader:
        """mmengine's."""
        loader = StrictRunner.build_dataloader(dataloader, seed, diff_rank_seed)
        loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
        return loader


def _start_worker(start: Any, index: int) -> None:
    outlive_stop_signals()
    # SIGTERM of the process that started it, which is done with it, ends it at once: the order in which mmengine's
    # objects are cleared away does not always let torch ask first.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_starter, args=(os.getppid(),), daemon=True).start()
    if start:
        start(index)


def _end_with_starter(starter: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != starter:
        pass
    os._exit(0)


class StopHook(Hook):
    """Ends all processes of a training after the same iteration when one of them got a signal, or in an evaluation.

    A loop over iterations is saved as `iter_N.pth`; one over epochs, which mmengine cannot take up within one, is not.
    """

    priority = "LOWEST"  # after mmengine has saved

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self._world = World(torch.device("cpu"))
        self._looks_in_val = True

    def before_train(self, runner: Any) -> None:
        if get_world_size() > 1:
            group = torch.distributed.new_group(backend="gloo")
            self._world = World(torch.device("cpu"), get_rank(), get_world_size(), group)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Raises Interrupted."""
        if self._agree():
            self._stop(runner, runner.iter + 1)

    def before_val_epoch(self, runner: Any) -> None:
        """Processes that evaluate different numbers of batches could not agree within."""
        batches = len(runner.val_dataloader)
        self._looks_in_val = self._world.agree(batches) == -self._world.agree(-batches)

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Raises Interrupted."""
        if self._world.distributed and (batch_idx % LOOK_EVERY or not self._looks_in_val):
            return
        if self._agree():
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):  # it has put the average in the weights' place
                    hook.after_val_epoch(runner)
            self._stop(runner, runner.iter)

    def _agree(self) -> bool:
        return bool(self._world.agree(int(self._signals.received is not None)))

    def _stop(self, runner: Any, iterations: int) -> None:
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self._save(runner, iterations)
            self._world.agree(0)  # none ends, and has torchrun end the others, before that is done
        last = find_latest(Path(runner.work_dir))
        saved = f"{last} is saved" if last else "nothing was saved"
        raise Interrupted(f"{self._signals.received or 'signal to another process'}: {saved}")

    def _save(self, runner: Any, iterations: int) -> None:
        """By the run's CheckpointHook, which knows where and how many are kept; nothing where there is none."""
        name = f"iter_{iterations}.pth"
        last = Path(runner.message_hub.get_info("last_ckpt", ""))
        hook = next((each for each in runner.hooks if isinstance(each, CheckpointHook) and not each.by_epoch), None)
        if hook and not (last.name == name and last.exists()):
            hook._save_checkpoint_with_step(runner, iterations, meta={"epoch": runner.epoch, "iter": iterations})
