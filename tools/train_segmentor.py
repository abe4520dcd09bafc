"""Trains a segmentor.

python tools/train_segmentor.py configs/segmentation/vrwkv_adapter_nano_digit_scenes.py
torchrun --nproc_per_node=8 tools/train_segmentor.py CONFIG --work-dir output/run1 --amp
python tools/train_segmentor.py CONFIG --work-dir output/run1 --resume

Exit codes: 0 done; 75 interrupted by SIGTERM, SIGUSR1 or Ctrl-C, to be started again with --resume; 1 an error.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from vrwkv.runtime.command import add_overrides
from vrwkv.runtime.errors import Interrupted, command_line
from vrwkv.runtime.processes import is_primary


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--work-dir", metavar="DIR", help="default: the config's, or output/ and the config's name")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from a checkpoint; auto (the default) takes the latest in the work folder",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    add_overrides(parser, "--cfg-options")
    args = parser.parse_args(argv)
    with redirect_stdout(sys.stderr):
        # In here, so that a missing mmsegmentation takes one line to tell.
        from vrwkv.segmentation.config import parse_options
        from vrwkv.segmentation.runner import train

        try:
            work_dir = train(args.config, args.work_dir, args.resume, args.amp, parse_options(args.cfg_options))
        except Interrupted as error:
            message = f"interrupted by {error}; to go on, start it again with --resume"
            raise Interrupted(message if is_primary() else "") from None
    if is_primary():
        print(f"checkpoints and logs  {work_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
