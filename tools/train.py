"""Trains an image classifier.

python tools/train.py --config configs/classification/vrwkv_nano_digits.yaml
torchrun --nproc_per_node=8 tools/train.py --config CONFIG --set data.root=/data/imagenet output=output/run1

Exit codes: 0 done; 75 interrupted by SIGTERM, SIGUSR1 or Ctrl-C, to be started again with --resume auto; 1 an error.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vrwkv.runtime.errors import Interrupted, command_line
from vrwkv.runtime.processes import is_primary


def resume_command(args: argparse.Namespace) -> str:
    """The command that goes on with this run from its newest state."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", f"--nproc_per_node={processes}"] if processes else ["python"]
    settings = ["--set", *args.set] if args.set else []
    return shlex.join([*start, sys.argv[0], "--config", args.config, *settings, "--resume", "auto"])


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    # In here, so that a missing package takes one line to tell.
    from vrwkv.classification import Config, load_config, train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the config")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from a checkpoint; auto (the default) takes the newest last.pth of the output folder, if any",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another run's files in the output folder")
    args = parser.parse_args(argv)
    config = load_config(Config, args.config, args.set)
    try:
        best = train(config, args.resume, args.overwrite)
    except Interrupted as error:
        message = f"interrupted by {error}; to go on:\n  {resume_command(args)}"
        raise Interrupted(message if is_primary() else "") from None
    if is_primary():
        print(f"best checkpoint  {best}\ntraining curves  {Path(config.output) / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
