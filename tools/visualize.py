"""Draws what a model looks at: its effective receptive field, what one token gathers, its decays.

python tools/visualize.py photo1.jpg photo2.jpg --checkpoint output/run1/best.pth --out output/looks
python tools/visualize.py *.jpg --model vrwkv_tiny_patch16_224 --pretrained --img-size 448 --at 0.3 0.7 --out looks
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vrwkv.runtime.command import add_classifier_arguments
from vrwkv.runtime.errors import command_line


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    # In here, so that a missing matplotlib takes one line to tell.
    from vrwkv.classification import load_classifier
    from vrwkv.visualize import visualize

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="the receptive field averages over them")
    add_classifier_arguments(parser, "tools/train.py")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="other than the checkpoint's")
    parser.add_argument(
        "--at", nargs=2, type=float, default=(0.5, 0.5), metavar=("Y", "X"), help="token, 0 to 1 (default: the centre)"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    classifier = load_classifier(args.checkpoint, args.model, args.pretrained, args.device, img_size=args.img_size)
    for path in visualize(classifier, args.images, args.out, tuple(args.at), str(args.checkpoint or args.model)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
