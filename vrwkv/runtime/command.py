"""What commands share: arguments; of those that train what an interrupted one says, and what a finished one leaves."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vrwkv.runtime.errors import Interrupted
from vrwkv.runtime.processes import is_primary


def add_classifier_arguments(parser: argparse.ArgumentParser, makers: str) -> None:
    """`--checkpoint`, of the tools that are named, `--model` and `--pretrained`: what `load_classifier` is given."""
    parser.add_argument("--checkpoint", metavar="PATH", help=f"of {makers}, or weights of --model")
    parser.add_argument("--model", metavar="NAME", help="timm model, where the checkpoint does not say")
    parser.add_argument("--pretrained", action="store_true", help="use the published weights of --model")


def add_overrides(parser: argparse.ArgumentParser, flag: str) -> None:
    """`--set` or `--cfg-options`, which may be given several times."""
    parser.add_argument(
        flag, nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the config"
    )


def parse_arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """`--config`, `--set`, `--resume` and `--overwrite`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML")
    add_overrides(parser, "--set")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from a checkpoint; auto (the default) takes the newest last.pth of the output folder, if any",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another run's files in the output folder")
    return parser.parse_args(argv)


def run_training(train: Callable[[Any, str | None, bool], Path], config: Any, args: argparse.Namespace) -> Path:
    """Trains, and says on the primary process how to go on or what came out.

    Args:
        train: From a configuration, what to resume from and whether to overwrite to the best checkpoint's path.
        config: The configuration.
        args: Of `parse_arguments`.

    Raises:
        Interrupted: a signal came; its message has the command that goes on.
    """
    try:
        best = train(config, args.resume, args.overwrite)
    except Interrupted as error:
        message = f"interrupted by {error}; to go on:\n  {_resume_command(args)}"
        raise Interrupted(message if is_primary() else "") from None
    if is_primary():
        print(f"best checkpoint  {best}\ntraining curves  {Path(config.output) / 'curves.png'}")
    return best


def _resume_command(args: argparse.Namespace) -> str:
    """The command that goes on with this run from its newest state."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", f"--nproc_per_node={processes}"] if processes else ["python"]
    settings = ["--set", *args.set] if args.set else []
    return shlex.join([*start, sys.argv[0], "--config", args.config, *settings, "--resume", "auto"])
