"""What all families of Vision-RWKV models share: patches, blocks, features, head, checkpoints, registration."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vrwkv.layers import Block, ChannelMix, Grid, compiled_layout, resize_pos_embed
from vrwkv.models._weights import checkpoint_filter_fn, pretrained_filter_fn
from vrwkv.runtime.checkpoint import convert_on_load

try:
    from timm.models._input import update_model_input_size
except ImportError:  # an older timm, which does not save what a model was made with
    update_model_input_size = None  # type: ignore[assignment]

__all__ = ["VisionRWKVBase", "build_model", "make_cfg"]

Model = TypeVar("Model", bound="VisionRWKVBase")


class VisionRWKVBase(nn.Module):
    """Patch tokens, blocks of a spatial and a channel mix, a final norm and a classifier of the mean token.

    Images may have any size at run time: they are padded at the right and bottom to whole patches, and the position
    embedding is resized to their grid.

    Args:
        spatial_mix: makes the spatial mix of a block from ``dim, layer_index, depth``, see :class:`Block`.
        channel_mix: makes the channel mix of a block from ``dim, hidden_dim, layer_index, depth``.
        img_size: image size ``(H, W)`` that the position embedding is made for.
        patch_size: patch size ``(H, W)``.
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``"avg"`` for the mean over tokens, ``""`` to classify every token.
        embed_dim: channels C of a token.
        depth: number of blocks.
        mlp_ratio: hidden width of the channel mix over C.
        post_norm: normalise what the mixes return instead of what they are given.
        init_values: initial layer scale; ``None`` for no layer scale.
        head_hidden_size: width of a Linear-Tanh layer before the classifier; ``None`` for no such layer.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 in the first.
        device, dtype: of the parameters; torch's defaults for ``None``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        spatial_mix: Callable[[int, int, int], nn.Module],
        channel_mix: Callable[[int, int, int, int], nn.Module] = ChannelMix,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        init_values: float | None = None,
        head_hidden_size: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _require_at_least(1, in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        _require_at_least(1, img_size=min(to_2tuple(img_size)), patch_size=min(to_2tuple(patch_size)))
        hidden_dim = int(embed_dim * mlp_ratio)
        _require_at_least(1, mlp_hidden_width=hidden_dim)
        _require_at_least(0, num_classes=num_classes)
        _check_global_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.head_hidden_size = embed_dim if head_hidden_size is None else head_hidden_size
        self.grad_checkpointing, self.grad_checkpointing_every = False, 1

        any_size: dict[str, Any] = dict(output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True)
        self.patch_embed = PatchEmbed(to_2tuple(img_size), to_2tuple(patch_size), in_chans, embed_dim, **any_size)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size), embed_dim))
        self.ln0 = nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                spatial_mix(embed_dim, i, depth),
                channel_mix(embed_dim, hidden_dim, i, depth),
                post_norm,
                init_values,
                drop_path,
            )
            for i, drop_path in enumerate(torch.linspace(0, drop_path_rate, depth, device="cpu").tolist())
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.norm: nn.Module = nn.LayerNorm(embed_dim)

        self.pre_logits = _pre_logits(embed_dim, head_hidden_size)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()
        self.to(device=device, dtype=dtype)
        # Most loaders know of no filter: timm.create_model(checkpoint_path=...), mmengine, load_state_dict().
        convert_on_load(self, checkpoint_filter_fn)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch resolution ``(H, W)`` of the position embedding."""
        return self.patch_embed.dynamic_feat_size(self.patch_embed.img_size)

    def init_weights(self) -> None:
        """Set every parameter to its initial value."""
        nn.init.zeros_(self.pos_embed)
        init_modules(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay: the position embedding, and what the mixes name."""
        return {"pos_embed"} | undecayed(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups of layers, from the stem to the last norm."""
        return dict(
            stem=r"^(?:pos_embed|patch_embed)",
            blocks=[(r"^ln0", (0,)), (r"^blocks\.(\d+)", None), (r"^norm", (99999,))],  # the authors' ln0 is in block 0
        )

    def set_grad_checkpointing(self, enable: bool = True, every: int = 1) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            enable: whether to do so.
            every: recompute the first of so many blocks, and keep what the others need.

        Raises:
            ValueError: ``every`` is below 1, or there are not so many blocks.
        """
        if not 1 <= every <= len(self.blocks):
            raise ValueError(f"every must be 1 to {len(self.blocks)}, which is the number of blocks, got {every}")
        self.grad_checkpointing, self.grad_checkpointing_every = enable, every

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
        if update_model_input_size is not None:
            update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

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
        x, patch_resolution = self.embed(x)
        x = self.ln0(x)
        intermediates = []
        for index in range(max_index + 1 if stop_early else len(self.blocks)):
            x = self.run_block(index, x, patch_resolution)
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

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens ``(B, T, C)`` of the images ``x (B, in_chans, H, W)`` before ``ln0``, and their patch resolution."""
        x = self.patch_embed(compiled_layout(x))
        _, height, width, _ = x.shape
        x = x.flatten(1, 2)  # (B, T, C)
        return x + resize_pos_embed(self.pos_embed, self.grid_size, (height, width)), (height, width)

    def run_block(self, index: int, x: Tensor, patch_resolution: Grid) -> Tensor:
        """Block number ``index`` on the tokens ``x (B, T, C)``, recomputed in the backward pass where that is set."""
        block = self.blocks[index]
        recomputed = self.grad_checkpointing and index % self.grad_checkpointing_every == 0
        if recomputed and torch.is_grad_enabled():
            return checkpoint(block, x, patch_resolution)
        return block(x, patch_resolution)

    def run_blocks(self, x: Tensor, patch_resolution: Grid) -> Tensor:
        """Normalised tokens ``(B, T, C)`` of all blocks from embedded ones ``x (B, T, C)``."""
        x = self.ln0(x)
        for index in range(len(self.blocks)):
            x = self.run_block(index, x, patch_resolution)
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens ``(B, T, C)`` of the images ``x (B, in_chans, H, W)``."""
        return self.run_blocks(*self.embed(x))

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


def init_modules(root: nn.Module) -> None:
    """Set the parameters of all modules to their initial values: linear layers here, others by themselves."""
    for module in root.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def _pre_logits(embed_dim: int, head_hidden_size: int | None) -> nn.Module:
    """What stands between the pooled token and the head."""
    if head_hidden_size is None:
        return nn.Identity()
    _require_at_least(1, head_hidden_size=head_hidden_size)
    return nn.Sequential(OrderedDict(fc=nn.Linear(embed_dim, head_hidden_size), act=nn.Tanh()))


def undecayed(root: nn.Module) -> set[str]:
    """Names of the parameters of which the modules inside ``root`` say that they should not decay."""
    modules = [(path, module) for path, module in root.named_modules() if path and hasattr(module, "no_weight_decay")]
    return {f"{path}.{name}" for path, module in modules for name in module.no_weight_decay()}


def _require_at_least(minimum: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"{name} must be >= {minimum}, got {value}")


def _check_global_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")


def make_cfg(published: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained configuration; ``published`` is the authors' file, None where there is none."""
    hub = dict(hf_hub_id="OpenGVLab/Vision-RWKV", hf_hub_filename=published) if published else {}
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
        **hub,
        **kwargs,
    }


def build_model(
    model_cls: type[Model], variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]
) -> Model:
    """A model of a family, as timm's entry points make them: ``kwargs`` go before ``model_args``."""
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **dict(model_args, **kwargs),
    )
