"""Times UPerNet on one large image, whole, with VRWKV-T and with DeiT-T as its backbone, and takes peak memory.

python benchmarks/run_segmentors.py [--pixels 2048] [--threads 2] [--rounds 3]

All backbones have the same feature pyramid (VRWKVAdapter its own) and the same heads. Before anything is timed, mmseg's
own inference must give the same classes on a smaller image. Peak memory is that of a fresh process that segments one
picture and does nothing else. Writes segmentation.csv.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measure import RESULTS, keep_freed_memory, machine, peak_memory, write_rows
from mmengine.model import revert_sync_batchnorm
from mmseg.apis import inference_model, init_model
from mmseg.models.necks import Feature2Pyramid
from PIL import Image
from torch import Tensor, nn

from vrwkv.segmentation import segment
from vrwkv.segmentation.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs" / "segmentation"
SEGMENTORS = {
    "vrwkv_tiny": "vrwkv_tiny_upernet_ade20k_512_160k.py",
    "vrwkv_adapter_tiny": "vrwkv_adapter_tiny_upernet_ade20k_512_160k.py",
    "deit_tiny": "vrwkv_tiny_upernet_ade20k_512_160k.py",  # with its backbone exchanged
}


class DeiT(nn.Module):
    """timm's deit_tiny with the feature pyramid of our plain backbone."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.model = timm.create_model("deit_tiny_patch16_224", img_size=pixels, num_classes=0)
        self.pyramid = Feature2Pyramid(192, norm_cfg={"type": "BN"})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        (last,) = self.model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
        return self.pyramid([last.contiguous(memory_format=torch.channels_last)] * 4)  # as ours


def create(name: str, pixels: int) -> Any:
    """A segmentor of random weights that takes pictures whole and as they are."""
    torch.manual_seed(0)
    model = revert_sync_batchnorm(init_model(load_config(CONFIGS / SEGMENTORS[name]), device="cpu"))
    if name == "deit_tiny":
        model.backbone = DeiT(pixels)
    nn.init.normal_(model.decode_head.conv_seg.weight)  # many classes, as after training
    model.test_cfg["mode"] = "whole"
    model.cfg.test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
    model.dataset_meta = {"classes": [str(i) for i in range(150)], "palette": [[i, i, i] for i in range(150)]}
    return model.eval()


def picture(pixels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8))


def check(name: str) -> None:
    """Raise if the classes differ from those of mmseg's own inference."""
    model, image = create(name, 256), picture(256)
    wanted = inference_model(model, np.asarray(image)[..., ::-1].copy()).pred_sem_seg.data[0].numpy()
    wrong = (segment(model, image).mask != wanted).mean()
    if wrong > 1e-3 or len(np.unique(wanted)) < 10:
        raise SystemExit(f"{name} is wrong: {wrong:.2%} of the pixels differ from mmseg's")


def measure_peak(name: str, pixels: int, threads: int) -> int:
    """Peak memory in bytes of a process that segments one picture."""
    argv = [sys.executable, __file__, "--pixels", str(pixels), "--threads", str(threads), "--peak-of", name]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV file")
    parser.add_argument("--peak-of", choices=SEGMENTORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.peak_of:
        segment(create(args.peak_of, args.pixels), picture(args.pixels))
        print(peak_memory())
        return
    for name in SEGMENTORS:
        check(name)
    images = torch.randn(1, 3, args.pixels, args.pixels)
    times: dict[str, list[float]] = {name: [] for name in SEGMENTORS}
    backbones = {name: create(name, args.pixels).backbone for name in SEGMENTORS}
    for done in range(args.rounds + 1):  # in turn, so that a change of the machine's speed meets all alike
        for name, backbone in backbones.items():
            begin = time.perf_counter()
            backbone(images)
            if done:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
    del backbones
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name in SEGMENTORS:
        ratio = medians["deit_tiny"] / medians[name]
        gib = measure_peak(name, args.pixels, args.threads) / 2**30
        print(f"{name:20} backbone {medians[name]:7.2f} s   {ratio:5.2f} x as fast as DeiT   peak {gib:.2f} GiB")
        rows.append(
            {
                "backbone": name,
                "shape": f"1x3x{args.pixels}x{args.pixels}",
                "dtype": "float32",
                "backbone_seconds": f"{medians[name]:.3f}",
                "times_as_fast_as_deit": f"{ratio:.2f}",
                "segmentor_peak_gib": f"{gib:.3f}",
                **machine("cpu"),
            }
        )
    print(write_rows("segmentation", rows, args.output))


if __name__ == "__main__":
    main()
