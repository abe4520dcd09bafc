"""Serves a page that classifies and segments pictures in the browser.

python tools/app.py                                             # the models of `make demo` and `make demo-seg`
python tools/app.py --checkpoint output/run1/best.pth --config CONFIG --seg-checkpoint CHECKPOINT --port 8080
python tools/app.py --checkpoint classifier.onnx --seg-checkpoint segmentor.onnx
python tools/app.py --model vrwkv_tiny_patch16_224 --pretrained
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vrwkv.runtime.command import add_classifier_arguments
from vrwkv.runtime.errors import UserError, command_line

DEMO = Path("output/demo/best.pth")
SEG_DEMO = Path("output/demo-seg/last_checkpoint")  # names the checkpoint
SEG_DEMO_CONFIG = "configs/segmentation/vrwkv_detail_nano_digit_scenes.py"
EXAMPLES = 10


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_classifier_arguments(parser, "tools/train.py or export.py")
    parser.add_argument("--config", metavar="PATH", help="of the segmentor, but for .onnx files")
    parser.add_argument("--seg-checkpoint", metavar="PATH", help="of the segmentor, or of tools/export.py")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="pictures to click on, the first ten of a folder")
    parser.add_argument("--seg-examples", type=Path, metavar="DIR", help="the same for segmentation")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves every machine (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-megabytes", type=int, default=20, help="largest file that is taken (default: 20)")
    parser.add_argument("--max-megapixels", type=float, default=25, help="largest picture (default: 25)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    for name in ("max_megabytes", "max_megapixels"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port must be 1 to 65535, not {args.port}")
    # In here, so that a missing package takes one line to tell.
    from vrwkv.app import build_page, serve

    classifier, segmentor = load_models(args)
    examples, seg_examples = (first_pictures(folder) for folder in (args.examples, args.seg_examples))
    page = build_page(classifier, segmentor, int(args.max_megapixels * 1e6), examples, seg_examples)
    serve(page, args.host, args.port, args.max_megabytes)
    return 0


def load_models(args: argparse.Namespace):
    """The classifier and the segmentor that are asked for; those of the demos, where there are any, for the rest."""
    from vrwkv.classification import load_classifier

    if args.config and not args.seg_checkpoint:
        raise UserError("--config needs --seg-checkpoint")
    if not (args.checkpoint or args.model or args.pretrained) and DEMO.is_file():
        args.checkpoint = DEMO
    if not args.seg_checkpoint and SEG_DEMO.is_file():
        args.config, args.seg_checkpoint = SEG_DEMO_CONFIG, SEG_DEMO.read_text().strip()
    classifier = segmentor = None
    if args.checkpoint or args.model or args.pretrained:
        classifier = load_classifier(args.checkpoint, args.model, args.pretrained, args.device)
    if args.seg_checkpoint:
        from vrwkv.segmentation import load_segmentor

        segmentor = load_segmentor(args.config, args.seg_checkpoint, args.device)
    if classifier is None and segmentor is None:
        raise UserError("no model: give --checkpoint or --seg-checkpoint, or run `make demo` and `make demo-seg`")
    return classifier, segmentor


def first_pictures(folder: Path | None) -> list[Path]:
    """The first pictures of a folder by name.

    Raises:
        UserError: there are none.
    """
    if folder is None:
        return []
    from vrwkv.runtime.images import picture_endings

    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in picture_endings())
    if not found:
        raise UserError(f"folder {folder} holds no pictures")
    return found[:EXAMPLES]


if __name__ == "__main__":
    sys.exit(main())
