"""Times segmentors on large pictures, picture in and mask out, and takes their peak memory.

python benchmarks/run_segmentors.py [--pixels 512 1024 2048 4096] [--threads 2]

The detail segmentors stand beside the adapter with UPerNet, the bare backbones, and backbones of timm with the detail
segmentors' head. Before anything is timed, mmseg's own inference must give the same classes on a smaller picture. Peak
memory is that of a fresh process that segments one picture and does nothing else. Writes segmentation.csv.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measure import RESULTS, interleaved_medians, keep_freed_memory, machine, peak_memory, write_rows
from mmengine.model import revert_sync_batchnorm
from mmseg.apis import inference_model, init_model
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vrwkv.segmentation import segment
from vrwkv.segmentation.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs" / "segmentation"
DETAIL = "vrwkv_tiny_detail_mlp_ade20k_512_160k.py"
OURS = {
    "vrwkv_tiny detail": DETAIL,
    "vrwkv_small detail": "vrwkv_small_detail_mlp_ade20k_512_160k.py",
    "vrwkv_tiny adapter UPerNet": "vrwkv_adapter_tiny_upernet_ade20k_512_160k.py",
}
PEERS = ("efficientvit_b1", "efficientvit_b2", "pvt_v2_b0", "convnext_tiny")
BARE = {"vrwkv_tiny backbone": "vrwkv_tiny_patch16_224", "vrwkv_small backbone": "vrwkv_small_patch16_224"}
ROUNDS = {4096: 1}
"""Where a round takes minutes."""
LARGEST = {"vrwkv_tiny adapter UPerNet": 1024}  # in pixels, where memory or patience ends


class TimmBackbone(nn.Module):
    """A backbone of timm that returns its maps from stride 4 on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        strides = timm.create_model(name, features_only=True).feature_info.reduction()
        wanted = [i for i, stride in enumerate(strides) if stride >= 4]
        self.model = timm.create_model(name, features_only=True, out_indices=wanted)
        self.channels: list[int] = self.model.feature_info.channels()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model(x)


def create(name: str) -> Any:
    """A segmentor of random weights that takes pictures whole and as they are."""
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / OURS.get(name, DETAIL), {"model.backbone.init_cfg": None})
    backbone = TimmBackbone(name) if name in PEERS else None
    if backbone:
        cfg.model.decode_head.in_channels = backbone.channels
        cfg.model.decode_head.in_index = list(range(len(backbone.channels)))
    model = revert_sync_batchnorm(init_model(cfg, device="cpu"))
    if backbone:
        model.backbone = backbone
    spread_classes(model)
    model.test_cfg["mode"] = "whole"
    model.cfg.test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
    model.dataset_meta = {"classes": [str(i) for i in range(150)], "palette": [[i, i, i] for i in range(150)]}
    return model.eval()


@torch.no_grad()
def spread_classes(model: Any) -> None:
    """Let random weights give many classes, as after training, by the batch norms' statistics and the last bias."""
    last = model.decode_head.conv_seg
    nn.init.normal_(last.weight)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    means = []
    hook = last.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0].mean((0, 2, 3))))
    model.train()(torch.randn(2, 3, 256, 256))
    hook.remove()
    last.bias.copy_(-last.weight.flatten(1) @ means[0])


def picture(pixels: int) -> Image.Image:
    """A photograph: in noise every pixel would have a class of its own."""
    return Image.fromarray(load_sample_image("china.jpg")).resize((pixels, pixels), Image.Resampling.BICUBIC)


def runner(name: str, pixels: int) -> Callable[[], Any]:
    """One picture through a segmentor, or one tensor through a bare backbone."""
    if name in BARE:
        model, x = timm.create_model(BARE[name], num_classes=0).eval(), torch.randn(1, 3, pixels, pixels)
        return torch.inference_mode()(lambda: model.forward_features(x))
    segmentor, image = create(name), picture(pixels)
    return lambda: segment(segmentor, image)


def multiply_adds(name: str, pixels: int) -> float:
    """GMAC of matrix products and convolutions, without the resizing of logits."""
    model = timm.create_model(BARE[name], num_classes=0) if name in BARE else create(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta").eval()(torch.empty(1, 3, pixels, pixels, device="meta"))
    return counter.get_total_flops() / 2e9


def check(name: str) -> None:
    """Raise if the classes differ from those of mmseg's own inference."""
    model, image = create(name), picture(256)
    wanted = inference_model(model, np.asarray(image)[..., ::-1].copy()).pred_sem_seg.data[0].numpy()
    wrong = (segment(model, image).mask != wanted).mean()
    if wrong > 1e-3 or (name in OURS and len(np.unique(wanted)) < 10):
        raise SystemExit(f"{name} is wrong: {wrong:.2%} of the pixels differ from mmseg's")


def measure_peak(name: str, pixels: int, threads: int) -> int:
    """Peak memory in bytes of a process that segments one picture."""
    argv = [sys.executable, __file__, "--pixels", str(pixels), "--threads", str(threads), "--peak-of", name]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.peak_of:
        runner(args.peak_of, args.pixels[0])()
        print(peak_memory())
        return
    for name in (*OURS, *PEERS):
        check(name)
    rows = []
    for pixels in args.pixels:
        names = [name for name in (*OURS, *BARE, *PEERS) if pixels <= LARGEST.get(name, pixels)]
        print(f"{pixels} px")
        runners = {name: runner(name, pixels) for name in names}
        times = interleaved_medians(runners, "cpu", 12.0, ROUNDS.get(pixels, 3))
        for name, seconds in times.items():
            gmac = multiply_adds(name, pixels)
            gib = measure_peak(name, pixels, args.threads) / 2**30
            print(f"  {name:28} {seconds:8.3f} s   {gmac:8.1f} GMAC   peak {gib:.2f} GiB", flush=True)
            rows.append(
                {
                    "model": name,
                    "pixels": pixels,
                    "dtype": "float32",
                    "seconds": f"{seconds:.3f}",
                    "gmac": f"{gmac:.1f}",
                    "peak_gib": f"{gib:.3f}",
                    **machine("cpu"),
                }
            )
    print(write_rows("segmentation", rows, args.output))


if __name__ == "__main__":
    main()
