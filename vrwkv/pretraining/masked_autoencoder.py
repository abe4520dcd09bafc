"""Masked autoencoder (He et al., arXiv 2111.06377) with Vision-RWKV blocks on both sides."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed, trunc_normal_
from torch import Tensor, nn

from vrwkv.layers import Block, ChannelMix, SpatialMix, VisiblePatches, resize_pos_embed
from vrwkv.models import VisionRWKVBase
from vrwkv.models._base import init_modules, undecayed


class Reconstruction(NamedTuple):
    """What a masked autoencoder makes of images."""

    loss: Tensor  # (B,), mean squared error of the masked patches' normalised pixels
    patches: Tensor  # (B, T, in_chans * patch size^2), normalised pixels of all patches
    masked: Tensor  # (B, T), bool


class MaskedAutoencoder(nn.Module):
    """Predicts the pixels of masked patches from the visible ones, which are all that its backbone sees.

    Visible patches keep their place on the grid: Q-Shift takes zeros from masked neighbours.

    Args:
        backbone: what is to be trained; it loses its classifier.
        decoder_dim: channels of the decoder's tokens, a multiple of 4.
        decoder_depth: its blocks.
        mask_ratio: share of the patches to mask; at least one is masked and one visible.

    Raises:
        ValueError: an argument is out of range, or the patches are not square.
    """

    def __init__(
        self, backbone: VisionRWKVBase, decoder_dim: int = 512, decoder_depth: int = 8, mask_ratio: float = 0.75
    ) -> None:
        super().__init__()
        height, width = backbone.patch_embed.patch_size
        if height != width:
            raise ValueError(f"patches must be square, got {(height, width)} pixels")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {mask_ratio}")
        backbone.prune_intermediate_layers()
        self.backbone = backbone
        self.patch_size: int = height
        self.mask_ratio = mask_ratio
        outputs = backbone.in_chans * height * width
        self.decoder = Decoder(backbone.embed_dim, decoder_dim, decoder_depth, outputs, backbone.grid_size)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay: those of the backbone, and what the decoder's mixes name."""
        return undecayed(self)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Mask the images ``(B, in_chans, H, W)`` and predict what is masked.

        Args:
            images: whole patches high and wide, two of them or more.
            generator: of the random masks; torch's own by default.

        Raises:
            ValueError: the images do not consist of whole patches, or of one only.
        """
        target = normalised_patches(images, self.patch_size)
        visible, masked = random_masks(target.shape[0], target.shape[1], self.mask_ratio, images.device, generator)
        x, (height, width) = self.backbone.embed(images)
        grid = VisiblePatches(height, width, visible)
        patches = self.decoder(self.backbone.run_blocks(grid.select(x), grid), grid).float()
        errors = (patches - target).square().mean(2)  # (B, T)
        return Reconstruction((errors * masked).sum(1) / masked.sum(1), patches, masked)


class Decoder(nn.Module):
    """Pixels of all patches from the tokens of the visible ones.

    Args:
        in_dim: channels of the visible tokens.
        dim: channels of its own tokens, a multiple of 4.
        depth: number of blocks.
        outputs: pixels of a patch times their channels.
        grid_size: patch resolution ``(H, W)`` that the position embedding is made for.

    Raises:
        ValueError: ``dim`` or ``depth`` is out of range.
    """

    pos_embed: Tensor

    def __init__(self, in_dim: int, dim: int, depth: int, outputs: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"decoder_dim must be a positive multiple of 4, got {dim}")
        if depth < 1:
            raise ValueError(f"decoder_depth must be at least 1, got {depth}")
        self.grid_size = grid_size
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        pos_embed = build_sincos2d_pos_embed(list(grid_size), dim=dim, interleave_sin_cos=False)[None]  # (1, T, C)
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, SpatialMix(dim, i, depth), ChannelMix(dim, 4 * dim, i, depth)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)
        trunc_normal_(self.mask_token, std=0.02)
        init_modules(self)

    def forward(self, x: Tensor, grid: VisiblePatches) -> Tensor:
        """Normalised pixels ``(B, H * W, outputs)`` from the visible tokens ``x (B, T', in_dim)`` of a grid."""
        patch_resolution = grid.height, grid.width
        x = self.embed(x)
        x = grid.spread(x, self.mask_token.to(x.dtype))
        x = x + resize_pos_embed(self.pos_embed, self.grid_size, patch_resolution)
        for block in self.blocks:
            x = block(x, patch_resolution)
        return self.head(self.norm(x))


def random_masks(
    batch: int, patches: int, mask_ratio: float, device: torch.device, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Which patches of each image to keep, the same number in each.

    Returns:
        The places of the visible patches ``(B, T')`` in rising order, and whether each is masked ``(B, T)``.

    Raises:
        ValueError: there is one patch only.
    """
    if patches < 2:
        raise ValueError(f"masking needs images of at least two patches, got {patches}")
    visible = min(max(round(patches * (1 - mask_ratio)), 1), patches - 1)
    noise = torch.rand(batch, patches, device=device, generator=generator)
    index = noise.argsort(1)[:, :visible].sort(1).values
    masked = torch.ones(batch, patches, dtype=torch.bool, device=device).scatter(1, index, False)
    return index, masked


def normalised_patches(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch with mean 0 and variance 1: ``(B, C, H, W)`` to ``(B, T, C * patch_size^2)``, in fp32.

    Raises:
        ValueError: the images do not consist of whole patches.
    """
    patches = to_patches(images.float(), patch_size)
    mean, variance = _moments(patches)
    return (patches - mean) / variance.sqrt()


def denormalised_patches(patches: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Pixels from normalised ones ``(B, T, C * patch_size^2)``, by the mean and variance of the images' own patches."""
    mean, variance = _moments(to_patches(images.float(), patch_size))
    return patches * variance.sqrt() + mean


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return mean, variance + 1e-6


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, T, C * patch_size^2)``, row by row.

    Raises:
        ValueError: the images do not consist of whole patches.
    """
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"images must consist of whole patches of {patch_size} pixels, got {height} x {width}")
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def to_images(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`to_patches` for images of ``size`` ``(H, W)``."""
    grid = patches.transpose(1, 2).unflatten(2, (size[0] // patch_size, size[1] // patch_size))
    return F.pixel_shuffle(grid, patch_size)
