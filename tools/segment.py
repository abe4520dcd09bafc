"""Colours what is in pictures: for each an overlay with a legend and a mask of class indices.

python tools/segment.py photo.jpg --config CONFIG --checkpoint CHECKPOINT --out output/segments
python tools/segment.py photos/ more/*.png --config CONFIG --checkpoint CHECKPOINT --out output/segments --json
python tools/segment.py photo.jpg --checkpoint segmentor.onnx --out output/segments
python tools/segment.py map.tif --config CONFIG --checkpoint CHECKPOINT --out output/maps --tile 1024 --classes water
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from vrwkv.runtime.command import add_overrides
from vrwkv.runtime.errors import command_line
from vrwkv.runtime.processes import AMP


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    parser.add_argument("--config", help="of the checkpoint; an .onnx file needs none")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="or an .onnx file of tools/export.py")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--opacity", type=float, default=0.5, help="of the colours, 0 to 1 (default: 0.5)")
    parser.add_argument(
        "--classes", nargs="+", action="extend", metavar="NAME", help="draw these alone in the overlay (default: all)"
    )
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="cut larger pictures into tiles, blended: less memory"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=AMP, default="none")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    add_overrides(parser, "--cfg-options")
    args = parser.parse_args(argv)
    # Linux gives large tensors huge pages: at 4096 px, pages of 4 KiB take a sixth of the time or more.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with redirect_stdout(sys.stderr):
        # In here, so that a missing mmsegmentation takes one line to tell.
        from vrwkv.segmentation.config import parse_options
        from vrwkv.segmentation.files import find_pictures, segment_files
        from vrwkv.segmentation.segment import load_segmentor

        pictures = find_pictures(args.images)
        model = load_segmentor(args.config, args.checkpoint, args.device, parse_options(args.cfg_options))
        results = segment_files(model, pictures, args.out, args.opacity, args.classes, args.amp, args.tile)
    if args.json:
        print(json.dumps(results, indent=2))
    for result in results:
        if "error" in result:
            print(f"error: {result['error']}", file=sys.stderr)
        elif not args.json:
            print(result["overlay"])
            for label, share in result["shares"].items():
                print(f"  {100 * share:5.1f} %  {label}")
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
