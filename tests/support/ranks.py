"""Processes that a test forks: they start at once, without imports, and with whatever the test has changed.

Each computes in one thread: where the test's process has used more, a forked one would wait for some it does not have.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch


def run_ranks(function: Callable[[], Any], size: int = 2) -> list[Any]:
    """Calls `function` in `size` processes at once, as torchrun would, and returns their results by rank.

    Results must be picklable, tensors as numpy arrays. Raises RuntimeError with the traceback of a rank that failed.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        environment.update(MASTER_ADDR="localhost", MASTER_PORT=port)
        process = context.Process(target=_call, args=(function, environment, sender), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        answers = [pipe.recv() if pipe.poll(60) else ("no answer within a minute", None) for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    failed = [error for error, _ in answers if error]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [result for _, result in answers]


def _call(function: Callable[[], Any], environment: dict[str, Any], sender: Any) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    try:
        sender.send((None, function()))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    finally:
        sender.close()
        os._exit(0)


class Forked:
    """A process group of its own that calls `function` and exits with what it returns, its stderr in a pipe."""

    def __init__(self, function: Callable[[], int]) -> None:
        read, write = os.pipe()
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(function, write))
        self.process.start()
        self.pid = self.process.pid
        os.close(write)
        self.stderr = os.fdopen(read)

    @staticmethod
    def _run(function: Callable[[], int], write: int) -> None:
        os.setsid()
        torch.set_num_threads(1)
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        code = 1
        try:
            code = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, timeout: float = 60) -> int | None:
        """The exit code: minus the number of the signal that ended it."""
        self.process.join(timeout)
        return self.process.exitcode
