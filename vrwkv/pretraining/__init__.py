"""Masked pre-training (MAE, arXiv 2111.06377) of Vision-RWKV backbones on pictures without labels."""

from vrwkv.classification import UserError, load_config
from vrwkv.pretraining.config import PretrainingConfig
from vrwkv.pretraining.files import draw_reconstructions, load_autoencoder, validation_pictures
from vrwkv.pretraining.masked_autoencoder import MaskedAutoencoder
from vrwkv.pretraining.task import pretrain

__all__ = [
    "MaskedAutoencoder",
    "PretrainingConfig",
    "UserError",
    "draw_reconstructions",
    "load_autoencoder",
    "load_config",
    "pretrain",
    "validation_pictures",
]
