"""Measures a segmentor's mIoU, for each class and on average, on the test data of its config.

python tools/test_segmentor.py CONFIG CHECKPOINT
torchrun --nproc_per_node=8 tools/test_segmentor.py CONFIG CHECKPOINT --tta      # flips and several scales
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from vrwkv.runtime.command import add_overrides
from vrwkv.runtime.errors import command_line
from vrwkv.runtime.processes import is_primary


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--tta", action="store_true", help="average over the config's flips and scales")
    add_overrides(parser, "--cfg-options")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    with redirect_stdout(sys.stderr):
        # In here, so that a missing mmsegmentation takes one line to tell.
        from vrwkv.segmentation.config import parse_options
        from vrwkv.segmentation.runner import test

        result = test(args.config, args.checkpoint, args.tta, parse_options(args.cfg_options))
    if not is_primary():
        return 0
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(", ".join(f"{name} {value:.2f} %" for name, value in result.items() if "time" not in name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
