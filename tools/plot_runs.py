"""Lays the curves of several runs over each other.

python tools/plot_runs.py output/run1 output/run2 --out runs.png
"""

import argparse
import sys
from collections.abc import Sequence

from vrwkv.runtime.errors import command_line


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    # In here, so that a missing package takes one line to tell.
    from vrwkv.runtime.curves import draw_runs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="output folders, with a summary.csv in each")
    parser.add_argument("--out", default="runs.png", metavar="PNG", help="default: runs.png")
    args = parser.parse_args(argv)
    for line in draw_runs(args.runs, args.out):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
