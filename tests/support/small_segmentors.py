"""Configs of segmentors that are built and run in milliseconds."""

from pathlib import Path

from support.scripts import REPOSITORY


def write_detail_config(path: Path, size: int, width: int) -> None:
    """Writes the demo's config with few channels.

    Args:
        path: The file.
        size: Height and width of the pictures that it trains on.
        width: Channels of the detail branch's stem.
    """
    path.write_text(f"""
_base_ = "{REPOSITORY / "configs/segmentation/vrwkv_detail_nano_digit_scenes.py"}"
model = dict(
    data_preprocessor=dict(size=({size}, {size})),
    backbone=dict(model_args=dict(img_size={size}, embed_dim=16), detail_width={width}),
    decode_head=dict(in_channels=[{2 * width}, {4 * width}, 16], channels={2 * width}),
)
""")
