"""Vision-RWKV.

`Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures` by Yuchen Duan, Weiyun Wang, Zhe
Chen, Xizhou Zhu, Lewei Lu, Tong Lu, Yu Qiao, Hongsheng Li, Jifeng Dai and Wenhai Wang, https://arxiv.org/abs/2403.02308

Weights and the original implementation (Apache-2.0): https://github.com/OpenGVLab/Vision-RWKV
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, PatchEmbed, to_2tuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    clean_state_dict,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vrwkv.layers import ChannelMix, SpatialMix, resize_pos_embed
from vrwkv.runtime.checkpoint import convert_on_load, unwrap

__all__ = ["VisionRWKV"]


class Block(nn.Module):
    """Spatial mix and channel mix, each added to its input, with the norm before (pre-norm) or after it (post-norm).

    Args:
        dim: channels C.
        layer_index: place of the block in the model, from 0.
        depth: number of blocks.
        mlp_ratio: hidden width of the channel mix over C.
        post_norm: normalise what the mixes return instead of what they are given.
        key_norm: add LayerNorms inside the mixes.
        init_values: initial layer scale; ``None`` for no layer scale.
        shift_pixel: distance of the Q-Shift in patches.
        channel_gamma: share of the channels that Q-Shift moves in each direction.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        layer_index: int,
        depth: int,
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        key_norm: bool = False,
        init_values: float | None = None,
        shift_pixel: int = 1,
        channel_gamma: float = 1 / 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.init_values = init_values
        self.ln1 = nn.LayerNorm(dim)
        self.att = SpatialMix(dim, layer_index, depth, key_norm, shift_pixel, channel_gamma)
        self.ln2 = nn.LayerNorm(dim)
        self.ffn = ChannelMix(dim, int(dim * mlp_ratio), layer_index, depth, key_norm, shift_pixel, channel_gamma)
        self.gamma1 = None if init_values is None else nn.Parameter(torch.empty(dim))
        self.gamma2 = None if init_values is None else nn.Parameter(torch.empty(dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None and self.init_values is not None:
                nn.init.constant_(gamma, self.init_values)

    def forward(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """Mix the tokens ``x (B, T, C)`` of an ``(H, W)`` grid; returns ``(B, T, C)``."""
        att = self.ln1(self.att(x, patch_resolution)) if self.post_norm else self.att(self.ln1(x), patch_resolution)
        x = self._add(x, self.gamma1, att)
        ffn = self.ln2(self.ffn(x, patch_resolution)) if self.post_norm else self.ffn(self.ln2(x), patch_resolution)
        return self._add(x, self.gamma2, ffn)

    def _add(self, x: Tensor, gamma: Tensor | None, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + branch if gamma is None else torch.addcmul(x, gamma, branch)


class VisionRWKV(nn.Module):
    """Vision-RWKV: patch tokens mixed by Bi-WKV at a cost linear in their number.

    Images may have any size at run time: they are padded at the right and bottom to whole patches, and the position
    embedding is resized to their grid.

    Args:
        img_size: image size ``(H, W)`` that the position embedding is made for.
        patch_size: patch size ``(H, W)``.
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``"avg"`` for the mean over tokens, ``""`` to classify every token.
        embed_dim: channels C of a token.
        depth: number of blocks.
        mlp_ratio: hidden width of the channel mix over C.
        post_norm: normalise what the mixes return instead of what they are given.
        key_norm: add LayerNorms inside the mixes.
        init_values: initial layer scale; ``None`` for no layer scale.
        head_hidden_size: width of a Linear-Tanh layer before the classifier; ``None`` for no such layer.
        shift_pixel: distance of the Q-Shift in patches.
        channel_gamma: share of the channels that Q-Shift moves in each direction.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 in the first.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        key_norm: bool = False,
        init_values: float | None = None,
        head_hidden_size: int | None = None,
        shift_pixel: int = 1,
        channel_gamma: float = 1 / 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _require_at_least(1, in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        _require_at_least(1, img_size=min(to_2tuple(img_size)), patch_size=min(to_2tuple(patch_size)))
        _require_at_least(1, mlp_hidden_width=int(embed_dim * mlp_ratio))
        _require_at_least(0, num_classes=num_classes, shift_pixel=shift_pixel)
        _check_global_pool(global_pool)
        if not 0 <= channel_gamma <= 0.25:
            raise ValueError(f"channel_gamma must lie in [0, 1/4], four groups share the channels, got {channel_gamma}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.head_hidden_size = embed_dim if head_hidden_size is None else head_hidden_size
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            to_2tuple(img_size),
            to_2tuple(patch_size),
            in_chans,
            embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size), embed_dim))
        self.ln0 = nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                layer_index,
                depth,
                mlp_ratio=mlp_ratio,
                post_norm=post_norm,
                key_norm=key_norm,
                init_values=init_values,
                shift_pixel=shift_pixel,
                channel_gamma=channel_gamma,
                drop_path=drop_path,
            )
            for layer_index, drop_path in enumerate(torch.linspace(0, drop_path_rate, depth, device="cpu").tolist())
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.norm: nn.Module = nn.LayerNorm(embed_dim)

        self.pre_logits: nn.Module = nn.Identity()
        if head_hidden_size is not None:
            _require_at_least(1, head_hidden_size=head_hidden_size)
            layers = OrderedDict(fc=nn.Linear(embed_dim, head_hidden_size), act=nn.Tanh())
            self.pre_logits = nn.Sequential(layers)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()
        # Most loaders know of no filter: timm.create_model(checkpoint_path=...), mmengine, load_state_dict().
        convert_on_load(self, checkpoint_filter_fn)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch resolution ``(H, W)`` of the position embedding."""
        return self.patch_embed.dynamic_feat_size(self.patch_embed.img_size)

    def init_weights(self) -> None:
        """Set every parameter to its initial value."""
        nn.init.zeros_(self.pos_embed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay: position embedding, decays, bonuses and mixes."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name == "pos_embed" or ".spatial_" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups of layers, from the stem to the last norm."""
        return dict(
            stem=r"^(?:pos_embed|patch_embed|ln0)",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer: a Linear, or an Identity where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, and the pooling where ``global_pool`` is given."""
        _require_at_least(0, num_classes=num_classes)
        if global_pool is not None:
            _check_global_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(self.pos_embed).train(self.training)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Resize the position embedding to another image size, and the patch embedding to another patch size."""
        old_grid = self.grid_size
        self.patch_embed.set_input_size(img_size and to_2tuple(img_size), patch_size and to_2tuple(patch_size))
        with torch.no_grad():
            pos_embed = resize_pos_embed(self.pos_embed, old_grid, self.grid_size)
        self.pos_embed = nn.Parameter(pos_embed, self.pos_embed.requires_grad)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features together with the outputs of chosen blocks.

        Args:
            x: images, ``(B, in_chans, H, W)``.
            indices: blocks to take: the last n for an int, all for ``None``.
            norm: apply the final norm to each intermediate.
            stop_early: leave out the blocks after the last one taken.
            output_fmt: ``"NCHW"`` for maps ``(B, C, H', W')``, ``"NLC"`` for tokens ``(B, T, C)``.
            intermediates_only: return the intermediates alone.

        Returns:
            The final features ``(B, T, C)`` and a list of intermediates, or that list.

        Raises:
            ValueError: ``output_fmt`` is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, patch_resolution = self._embed(x)
        intermediates = []
        for index, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = self._run_block(block, x, patch_resolution)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            intermediates = [y.transpose(1, 2).unflatten(2, patch_resolution).contiguous() for y in intermediates]
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the chosen intermediates do not need; returns their indices from the start."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.pre_logits = nn.Identity()
            self.head_hidden_size = self.embed_dim
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens ``(B, T, C)`` of the images ``x (B, in_chans, H, W)``."""
        x, patch_resolution = self._embed(x)
        for block in self.blocks:
            x = self._run_block(block, x, patch_resolution)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the tokens ``x (B, T, C)``, or what the classifier is given.

        Returns:
            ``(B, num_classes)``, or ``(B, head_hidden_size)`` for ``pre_logits`` and where there is no classifier; with
            ``(B, T, ...)`` in place of ``(B, ...)`` where there is no pooling.
        """
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        x = self.head_drop(self.pre_logits(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images ``x (B, in_chans, H, W)``, see :meth:`forward_head`."""
        return self.forward_head(self.forward_features(x))

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """First tokens ``(B, T, C)`` of the images ``x (B, in_chans, H, W)``, and their patch resolution."""
        x = self.patch_embed(x)
        _, height, width, _ = x.shape
        x = x.flatten(1, 2)  # (B, T, C)
        x = x + resize_pos_embed(self.pos_embed, self.grid_size, (height, width))
        return self.ln0(x), (height, width)

    def _run_block(self, block: nn.Module, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint(block, x, patch_resolution)
        return block(x, patch_resolution)


def _require_at_least(minimum: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"{name} must be >= {minimum}, got {value}")


def _check_global_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")


_PUBLISHED_NAMES = (
    (r"^backbone\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.0\.ln0\.", "ln0."),
    (r"^layers\.", "blocks."),
    (r"^ln1\.", "norm."),
    (r"^head\.0\.", "pre_logits.fc."),
    (r"^head\.(fc|2)\.", "head."),
)
"""Patterns of the authors' parameter names, none of which matches a name of ours, and what replaces them."""


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VisionRWKV) -> dict[str, Tensor]:
    """Turn the content of a checkpoint into a state dict of ``model``.

    Args:
        state_dict: what the authors published, as a whole or the weights in it, with or without the classifier and the
            prefix ``backbone.``; or a state dict of this class, also of a wrapped model.
        model: the model to load it into; its position embedding says which grid is wanted.

    Returns:
        Parameters by the names of this class.

    Raises:
        ValueError: the position embedding must be resized, but its own grid is not known.
    """
    state_dict = unwrap(state_dict)
    published = any(name.endswith("patch_embed.projection.weight") for name in state_dict)
    converted = {}
    for name, tensor in clean_state_dict(dict(state_dict)).items():
        for pattern, replacement in _PUBLISHED_NAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor.flatten() if ".spatial_mix_" in name else tensor

    if "pos_embed" in converted:
        tokens = converted["pos_embed"].shape[1]
        # As many tokens need not be the same grid: the authors' grids are square.
        if published or tokens != model.pos_embed.shape[1]:
            side = math.isqrt(tokens)
            if side * side != tokens:
                raise ValueError(
                    f"a pos_embed of {tokens} tokens can only be resized to the model's grid {model.grid_size} from a "
                    "square grid: create the model with the checkpoint's img_size, load, then call set_input_size()"
                )
            converted["pos_embed"] = resize_pos_embed(converted["pos_embed"], (side, side), model.grid_size)
    return converted


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2403.02308",
        "paper_name": "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures",
        "origin_url": "https://github.com/OpenGVLab/Vision-RWKV",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vrwkv_tiny_patch16_224.in1k": _cfg(hf_hub_id="OpenGVLab/Vision-RWKV", hf_hub_filename="vrwkv_t_in1k_224.pth"),
        "vrwkv_small_patch16_224.in1k": _cfg(hf_hub_id="OpenGVLab/Vision-RWKV", hf_hub_filename="vrwkv_s_in1k_224.pth"),
        "vrwkv_base_patch16_224.in1k": _cfg(hf_hub_id="OpenGVLab/Vision-RWKV", hf_hub_filename="vrwkv_b_in1k_224.pth"),
        "vrwkv_large_patch16_192.in22k": _cfg(
            hf_hub_id="OpenGVLab/Vision-RWKV",
            hf_hub_filename="vrwkv_l_in22k_192.pth",
            input_size=(3, 192, 192),
            num_classes=21841,
        ),
        "vrwkv_large_patch16_384.in22k_ft_in1k": _cfg(
            hf_hub_id="OpenGVLab/Vision-RWKV",
            hf_hub_filename="vrwkv_l_22kto1k_384.pth",
            input_size=(3, 384, 384),
        ),
        "test_vrwkv.untrained": _cfg(input_size=(3, 64, 64)),
    }
)


def _create_vrwkv(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> VisionRWKV:
    return build_model_with_cfg(
        VisionRWKV,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **dict(model_args, **kwargs),
    )


@register_model
def vrwkv_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-T: 6.2 M parameters, pre-norm."""
    model_args = dict(embed_dim=192, depth=12)
    return _create_vrwkv("vrwkv_tiny_patch16_224", pretrained, model_args, kwargs)


@register_model
def vrwkv_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-S: 23.8 M parameters, post-norm with layer scale."""
    model_args = dict(embed_dim=384, depth=12, post_norm=True, init_values=1.0)
    return _create_vrwkv("vrwkv_small_patch16_224", pretrained, model_args, kwargs)


@register_model
def vrwkv_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-B: 93.7 M parameters, post-norm with a small layer scale."""
    model_args = dict(embed_dim=768, depth=12, post_norm=True, init_values=1e-5)
    return _create_vrwkv("vrwkv_base_patch16_224", pretrained, model_args, kwargs)


_LARGE = dict(
    img_size=192, embed_dim=1024, depth=24, post_norm=True, key_norm=True, init_values=1e-5, head_hidden_size=3072
)


@register_model
def vrwkv_large_patch16_192(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-L as pre-trained on ImageNet-22k: key norms and an MLP head."""
    return _create_vrwkv("vrwkv_large_patch16_192", pretrained, _LARGE, kwargs)


@register_model
def vrwkv_large_patch16_384(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-L fine-tuned on ImageNet-1k: 334.9 M parameters; its position embedding keeps the grid of 192 pixels."""
    return _create_vrwkv("vrwkv_large_patch16_384", pretrained, _LARGE, kwargs)


@register_model
def test_vrwkv(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """A model for tests that is built and run in milliseconds."""
    model_args = dict(img_size=64, embed_dim=32, depth=3)
    return _create_vrwkv("test_vrwkv", pretrained, model_args, kwargs)
