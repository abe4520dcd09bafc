"""A small restoration model from Re-WKV and Omni-Shift: trains on photographs in minutes, then takes noise from others.

python examples/denoise.py --out output/denoised.png
python examples/denoise.py photo.jpg --steps 2000 --out output/denoised.png

Trains on photographs that scikit-image brings along, adds noise to a picture that is none of them (by default another
one of scikit-image), and writes the noisy, the denoised and the clean picture side by side. The blocks are those of
Restore-RWKV (arXiv 2407.11087) at one resolution.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

from vrwkv.layers import OmniShift, ReWKV
from vrwkv.ops import sigmoid_gate, squared_relu
from vrwkv.runtime.errors import UserError, command_line
from vrwkv.runtime.images import open_image

TRAINING = ("astronaut", "chelsea", "rocket")
HELD_OUT = "coffee"
NOISE = 25 / 255
"""Standard deviation of the noise; pictures lie between 0 and 1."""


class SpatialMix(nn.Module):
    """``output(sigmoid(receptance(x)) * Re-WKV(key(x), value(x)))`` on shifted tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = OmniShift(dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.re_wkv = ReWKV(dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """Mix the tokens ``x (B, T, C)`` of an ``(H, W)`` grid; returns ``(B, T, C)``."""
        x = self.shift(x, patch_resolution)
        y = self.re_wkv(self.key(x), self.value(x), patch_resolution)
        return self.output(sigmoid_gate(self.receptance(x), y))


class ChannelMix(nn.Module):
    """``sigmoid(receptance(x)) * value(relu(key(x))^2)`` on shifted tokens."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.shift = OmniShift(dim)
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.value = nn.Linear(hidden_dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """Mix the channels of ``x (B, T, C)`` on an ``(H, W)`` grid; returns ``(B, T, C)``."""
        x = self.shift(x, patch_resolution)
        return sigmoid_gate(self.receptance(x), self.value(squared_relu(self.key(x))))


class Block(nn.Module):
    """Spatial mix and channel mix, each added to its input, behind a LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.att = SpatialMix(dim)
        self.ln2 = nn.LayerNorm(dim)
        self.ffn = ChannelMix(dim, 2 * dim)

    def forward(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """Mix the tokens ``x (B, T, C)`` of an ``(H, W)`` grid; returns ``(B, T, C)``."""
        x = x + self.att(self.ln1(x), patch_resolution)
        return x + self.ffn(self.ln2(x), patch_resolution)


class Denoiser(nn.Module):
    """Estimates the noise in a picture and takes it away; every pixel is a token, a picture may have any size.

    Args:
        dim: channels of a token.
        depth: number of blocks.
    """

    def __init__(self, dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 3, padding=1)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Conv2d(dim, 3, 3, padding=1)
        nn.init.zeros_(self.head.weight)  # starts from leaving the picture as it is
        nn.init.zeros_(self.head.bias)

    def forward(self, noisy: Tensor) -> Tensor:
        """The denoised pictures ``(B, 3, H, W)`` of ``noisy (B, 3, H, W)``."""
        x = self.embed(noisy)
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)  # (B, H * W, C)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return noisy - self.head(tokens.transpose(1, 2).unflatten(2, grid))


def photograph(name: str) -> Tensor:
    """A photograph ``(3, H, W)``, 0 to 1, that scikit-image brings along."""
    return to_tensor(getattr(skimage.data, name)())


def to_tensor(picture: np.ndarray | Image.Image) -> Tensor:
    """RGB, 8 bits, as ``(3, H, W)``, 0 to 1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def add_noise(clean: Tensor, generator: torch.Generator) -> Tensor:
    """``clean`` with Gaussian noise on every value."""
    return clean + NOISE * torch.randn(clean.shape, generator=generator)


def psnr(picture: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures between 0 and 1."""
    return -10 * float((picture.clamp(0, 1) - clean).square().mean().log10())


def train(steps: int, batch_size: int = 8, patch: int = 32, lr: float = 4e-3, seed: int = 0) -> Denoiser:
    """A model trained on patches of the training photographs with new noise in each step."""
    generator = torch.Generator().manual_seed(seed)
    photographs = [photograph(name) for name in TRAINING]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        clean = torch.stack([_random_patch(photographs, patch, generator) for _ in range(batch_size)])
        loss = (model(add_noise(clean, generator)) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _random_patch(photographs: Sequence[Tensor], size: int, generator: torch.Generator) -> Tensor:
    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    picture = photographs[draw(len(photographs))]
    top, left = (draw(length - size + 1) for length in picture.shape[1:])
    colours = torch.randperm(3, generator=generator)  # so that three photographs show more than their own colours
    return picture[colours, top : top + size, left : left + size]


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", type=Path, help="a clean picture to try it on")
    parser.add_argument("--out", required=True, type=Path, metavar="PNG")
    parser.add_argument("--steps", type=int, default=500, help="of training (default: 500)")
    args = parser.parse_args(argv)
    if args.steps < 2:
        raise UserError(f"--steps must be at least 2, not {args.steps}")
    clean = to_tensor(open_image(args.image)) if args.image else photograph(HELD_OUT)
    start = time.perf_counter()
    model = train(args.steps)
    print(f"trained for {args.steps} steps in {time.perf_counter() - start:.0f} s")
    noisy = add_noise(clean, torch.Generator().manual_seed(1))
    with torch.inference_mode():
        denoised = model(noisy[None])[0]
    print(f"PSNR: noisy {psnr(noisy, clean):.2f} dB, denoised {psnr(denoised, clean):.2f} dB")
    side_by_side = torch.cat([noisy, denoised, clean], dim=2).clamp(0, 1).mul(255).round().byte()
    _save(Image.fromarray(side_by_side.permute(1, 2, 0).numpy()), args.out)
    return 0


def _save(picture: Image.Image, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(temporary, format="png")
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    print(path)


if __name__ == "__main__":
    sys.exit(main())
