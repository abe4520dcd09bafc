"""Trains an image classifier.

python tools/train.py --config configs/classification/vrwkv_nano_digits.yaml
torchrun --nproc_per_node=8 tools/train.py --config CONFIG --set data.root=/data/imagenet output=output/run1

Exit codes: 0 done; 75 interrupted by SIGTERM, SIGUSR1 or Ctrl-C, to be started again with --resume auto; 1 an error.
"""

import sys
from collections.abc import Sequence

from vrwkv.runtime.command import parse_arguments, run_training
from vrwkv.runtime.errors import command_line


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    # In here, so that a missing package takes one line to tell.
    from vrwkv.classification import Config, load_config, train

    args = parse_arguments(__doc__, argv)
    run_training(train, load_config(Config, args.config, args.set), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
