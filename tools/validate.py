"""Measures an image classifier's accuracy on an image folder.

python tools/validate.py --checkpoint output/run1/best.pth
python tools/validate.py --model vrwkv_tiny_patch16_224 --pretrained --data-root /data/imagenet
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
    from vrwkv.classification import Reports, validate
    from vrwkv.runtime.processes import AMP, is_primary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_classifier_arguments(parser, "tools/train.py or export.py")
    parser.add_argument("--data-root", metavar="ROOT", help="as data.root (default: the checkpoint's)")
    parser.add_argument("--split", help="folder below the data root (default: the checkpoint's, else val)")
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-j", "--workers", type=int, default=4)
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="other than the checkpoint's")
    parser.add_argument("--crop-pct", type=float, metavar="SHARE", help="other than the checkpoint's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=AMP, default="none")
    parser.add_argument("--class-map", metavar="FILE", help="names of the model's classes in timm's form, .txt or .pkl")
    parser.add_argument("--real-labels", metavar="FILE", help="real.json of ImageNet-Real: accuracy by its labels too")
    parser.add_argument("--per-class", metavar="FILE.csv", help="write each class's pictures, top1 and top5")
    parser.add_argument("--confusion", metavar="FILE.png", help="draw which class is taken for which")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = vars(parser.parse_args(argv))
    as_json, model_name = args.pop("json"), args.pop("model")
    reports = Reports(**{key: args.pop(key) for key in Reports._fields})
    with redirect_stdout(sys.stderr):
        result = validate(model_name=model_name, reports=reports, **args)
    if not is_primary():
        return 0
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        real = ""
        if reports.real_labels:
            real = f"ImageNet-Real top-1 {result['real_top1']:.2f} %, top-5 {result['real_top5']:.2f} %, "
        print(
            f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}, {real}"
            f"{result['images']} images, {result['images_per_second']:.0f} images/s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
