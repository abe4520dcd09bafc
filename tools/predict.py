"""Names what is in pictures.

python tools/predict.py picture.jpg --checkpoint output/run1/best.pth
python tools/predict.py *.jpg --model vrwkv_tiny_patch16_224 --pretrained --json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from vrwkv.runtime.command import add_classifier_arguments
from vrwkv.runtime.errors import command_line


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    # In here, so that a missing package takes one line to tell.
    from vrwkv.classification import load_classifier, predict_files
    from vrwkv.runtime.processes import AMP

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    add_classifier_arguments(parser, "tools/train.py or export.py")
    parser.add_argument("--topk", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=AMP, default="none")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parser.parse_args(argv)
    with redirect_stdout(sys.stderr):
        classifier = load_classifier(args.checkpoint, args.model, args.pretrained, args.device, args.amp)
        results = predict_files(classifier, args.images, args.topk)
    if args.json:
        print(json.dumps(results, indent=2))
    for result in results:
        if "error" in result:
            print(f"error: {result['error']}", file=sys.stderr)
        elif not args.json:
            print(result["image"])
            for each in result["predictions"]:
                print(f"  {100 * each['probability']:5.1f} %  {each['label']}")
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
