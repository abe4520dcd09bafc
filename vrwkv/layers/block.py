"""A block of a Vision-RWKV model: it is given its mixes."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vrwkv.layers.grid import Grid


class Block(nn.Module):
    """Spatial mix and channel mix, each added to its input, with the norm before (pre-norm) or after it (post-norm).

    Args:
        dim: channels C.
        att: the spatial mix, called with tokens ``(B, T, C)`` and their patch resolution ``(H, W)``.
        ffn: the channel mix, called likewise.
        post_norm: normalise what the mixes return instead of what they are given.
        init_values: initial layer scale; ``None`` for no layer scale.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        att: nn.Module,
        ffn: nn.Module,
        post_norm: bool = False,
        init_values: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.init_values = init_values
        self.ln1 = nn.LayerNorm(dim)
        self.att = att
        self.ln2 = nn.LayerNorm(dim)
        self.ffn = ffn
        self.gamma1 = None if init_values is None else nn.Parameter(torch.empty(dim))
        self.gamma2 = None if init_values is None else nn.Parameter(torch.empty(dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None and self.init_values is not None:
                nn.init.constant_(gamma, self.init_values)

    def forward(self, x: Tensor, patch_resolution: Grid) -> Tensor:
        """Mix the tokens ``x (B, T, C)`` of an ``(H, W)`` grid; returns ``(B, T, C)``."""
        att = self.ln1(self.att(x, patch_resolution)) if self.post_norm else self.att(self.ln1(x), patch_resolution)
        x = self._add(x, self.gamma1, att)
        ffn = self.ln2(self.ffn(x, patch_resolution)) if self.post_norm else self.ffn(self.ln2(x), patch_resolution)
        return self._add(x, self.gamma2, ffn)

    def _add(self, x: Tensor, gamma: Tensor | None, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + branch if gamma is None else torch.addcmul(x, gamma, branch)
