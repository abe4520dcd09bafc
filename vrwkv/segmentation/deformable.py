"""Deformable attention over several maps, after Deformable DETR (arXiv 2010.04159), in torch operations alone."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:  # mmcv's compiled operator, where mmcv has been built with it
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
except ImportError:
    MultiScaleDeformableAttnFunction = None

Shape = tuple[int, int]


def pixel_centres(shapes: Sequence[Shape], like: Tensor) -> Tensor:
    """Centres of all pixels of maps of the given ``(H, W)``, as ``(x, y)`` from 0 to 1.

    Returns:
        ``(sum of H * W, 2)`` on the device of `like`, in its dtype but at least fp32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=like.device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=dtype) + 0.5) / width
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
    return torch.cat(centres)


def sample_values(value: Tensor, shapes: Sequence[Shape], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of values at sampled places: bilinear between pixel centres, zero outside a map.

    Args:
        value: pixels of L maps after one another, ``(B, sum of H * W, heads, D)``.
        shapes: ``(H, W)`` of each map.
        locations: ``(B, queries, heads, L, points, 2)`` as ``(x, y)``, 0 to 1 from edge to edge of a map.
        weights: ``(B, queries, heads, L, points)``.

    Returns:
        ``(B, queries, heads * D)``.
    """
    if MultiScaleDeformableAttnFunction is not None and value.is_cuda:
        sizes = torch.tensor(shapes, device=value.device)
        starts = F.pad(sizes.prod(1).cumsum(0)[:-1], (1, 0))
        return MultiScaleDeformableAttnFunction.apply(
            value.contiguous(), sizes, starts, locations.contiguous(), weights.contiguous(), value.shape[0]
        )
    batch, _, heads, channels = value.shape
    # Queries last: all that is done with what is sampled then runs along memory.
    grids = (2 * locations - 1).to(value.dtype).permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # (B * heads, L, points, q, 2)
    weights = weights.to(value.dtype).permute(0, 2, 3, 4, 1).flatten(0, 1)  # (B * heads, L, points, queries)
    values = value.split([height * width for height, width in shapes], dim=1)
    parts = []
    for level, shape in enumerate(shapes):
        grid_value = values[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, *shape)
        sampled = F.grid_sample(grid_value, grids[:, level], align_corners=False)  # (B * heads, D, points, queries)
        parts.append((sampled * weights[:, level].unsqueeze(1)).sum(2))
    return sum(parts[1:], parts[0]).unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query attends to a few places around its own on every map; offsets and weights are linear in the query.

    Args:
        dim: channels C of queries, values and output.
        num_heads: heads; the values of each are ``ratio * C / num_heads`` wide.
        num_levels: maps.
        num_points: places that a head looks at on each map.
        ratio: width of the values over C.

    Raises:
        ValueError: the width of the values is no multiple of ``num_heads``.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int, ratio: float) -> None:
        super().__init__()
        width = int(dim * ratio)
        if width < 1 or width % num_heads:
            raise ValueError(f"the width of the values, {ratio} * {dim}, must be a multiple of {num_heads} heads")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with equal weights, and offsets of 1, 2, ... pixels into another direction for each head."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)  # on a square of side 2
        steps = torch.arange(1, self.num_points + 1).view(-1, 1)
        offsets = directions.view(-1, 1, 1, 2) * steps  # (heads, 1, points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, centres: Tensor, values: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Attend from pixels to maps.

        Args:
            query: ``(B, queries, C)``.
            centres: the queries' own places as ``(x, y)`` from 0 to 1, ``(queries, 2)``.
            values: pixels of the maps after one another, ``(B, sum of H * W, C)``.
            shapes: ``(H, W)`` of each map.

        Returns:
            ``(B, queries, C)``.
        """
        value = self.value_proj(values).unflatten(-1, (self.num_heads, -1))
        value = value.to(torch.promote_types(value.dtype, torch.float32))  # half a pixel counts
        places = (self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, *places, 2))  # in pixels of their map
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))
        weights = weights.softmax(-1).unflatten(-1, places)
        # Not one tensor from a list: torch.export would take the sizes for constants.
        sizes = torch.stack([centres.new_full((), side) for height, width in shapes for side in (width, height)])
        sizes = sizes.unflatten(0, (-1, 2))
        locations = centres[:, None, None, None] + offsets / sizes[:, None]
        sampled = sample_values(value, shapes, locations, weights)
        return self.output_proj(sampled.to(query.dtype))
