"""Writes a model as a file that runs without this package, at every batch and image size, and checks it.

python tools/export.py output/run1/best.pth --output classifier.onnx
python tools/export.py output/run1/best.pth --output classifier.onnx --quantize int8 --data-root /data/imagenet
python tools/export.py vrwkv_tiny_patch16_224 --format torch --output vrwkv_tiny.pt2
python tools/export.py CHECKPOINT --config CONFIG --output segmentor.onnx
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vrwkv.runtime.errors import UserError, command_line

CHECKPOINTS = (".pth", ".pt", ".bin", ".safetensors", ".onnx")


def export(model: Any, args: argparse.Namespace) -> None:
    # In here, so that a missing package takes one line to tell.
    from vrwkv.export import to_onnx, to_safetensors, to_torch

    if args.format == "safetensors":
        to_safetensors(model, args.output)
        return
    rows = to_torch(model, args.output) if args.format == "torch" else to_onnx(model, args.output, args.quantize)
    print(*rows, sep="\n")


def print_accuracy(title: str, checkpoint: Path | str | None, folder: dict[str, Any], **source: Any) -> None:
    from vrwkv.classification import validate

    # One picture at a time, as models are served: what int8 makes of one depends on the others of its batch.
    found = validate(checkpoint, **folder, **source, batch_size=1, workers=0, device="cpu")
    speed = f"{found['images_per_second']:.0f} images/s"
    print(f"{title}: top-1 {found['top1']:.2f} % of {found['images']} images, {speed}")


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL|CHECKPOINT", help="a model's name takes its published weights")
    parser.add_argument("--model", metavar="NAME", help="timm model, where the checkpoint does not say")
    parser.add_argument("--config", help="of a segmentor's checkpoint")
    parser.add_argument("--format", choices=("onnx", "torch", "safetensors"), default="onnx")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none", help="weights of matrix products")
    parser.add_argument("--data-root", metavar="DIR", help="pictures that tell what int8 costs (default: checkpoint's)")
    parser.add_argument("--split", help="folder below the data root (default: the checkpoint's, else val)")
    args = parser.parse_args(argv)
    if args.quantize == "int8" and (args.format != "onnx" or args.config):
        raise UserError("--quantize int8 is for classifiers as ONNX")
    if not args.output.parent.is_dir():  # said before accuracy is measured
        raise UserError(f"cannot write {args.output}: folder {args.output.parent} does not exist")
    if args.config:
        from vrwkv.segmentation import load_segmentor

        export(load_segmentor(args.config, args.source, "cpu"), args)
    else:
        from vrwkv.classification import load_classifier

        is_file = Path(args.source).suffix in CHECKPOINTS or Path(args.source).is_file()
        checkpoint, name = (args.source, args.model) if is_file else (None, args.source)
        classifier = load_classifier(checkpoint, name, pretrained=not is_file, device="cpu")
        folder = {"data_root": args.data_root or classifier.data_root, "split": args.split or classifier.val_split}
        if args.quantize == "int8":
            print_accuracy("float32", checkpoint, folder, model_name=name, pretrained=not is_file)
        export(classifier, args)
        if args.quantize == "int8":
            print_accuracy("int8", args.output, folder)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
