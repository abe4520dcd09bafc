"""Vision-RWKV (arXiv 2403.02308): importing this package registers its models with timm."""

from vrwkv import models as models
from vrwkv._version import __version__ as __version__
