"""Sums up `make demo`: says where its files lie, and compares each sample's prediction with the class in its name.

python demo/show_results.py output/vrwkv_nano_digits
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="holds validation.json and predictions.json")
    output = parser.parse_args(argv).output
    accuracy = json.loads((output / "validation.json").read_text())["top1"]
    results = json.loads((output / "predictions.json").read_text())
    right = 0
    for result in results:
        true, best = Path(result["image"]).name.split("_")[0], result["predictions"][0]
        right += best["class"] == true
        print(f"{result['image']}: {best['class']} ({100 * best['probability']:.1f} %)")
    print(
        f"validation accuracy  {accuracy:.2f} %\n"
        f"sample pictures      {right} of {len(results)} right\n"
        f"checkpoint           {output / 'best.pth'}\n"
        f"training curves      {output / 'curves.png'}\n"
        f"predictions          {output / 'predictions.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
