"""Measures a segmentor's mIoU, for each class and on average, on the test data of its config.

python tools/test_segmentor.py CONFIG CHECKPOINT
torchrun --nproc_per_node=8 tools/test_segmentor.py CONFIG CHECKPOINT --tta      # flips and several scales
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from vrwkv.runtime.errors import command_line


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    # In here, so that a missing mmsegmentation takes one line to tell.
    from vrwkv.segmentation.config import DictAction
    from vrwkv.segmentation.runner import test

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--tta", action="store_true", help="average over the config's flips and scales")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", dest="options")
    parser.add_argument("--json", metavar="PATH", help="write the result to a file")
    args = vars(parser.parse_args(argv))
    path = args.pop("json")
    result = test(**args)
    if os.environ.get("RANK", "0") == "0":  # not torchrun's other processes
        print(", ".join(f"{name} {value:.2f} %" for name, value in result.items() if "time" not in name))
        if path:
            with open(path, "w") as file:
                json.dump(result, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
