"""Training, validation and prediction of image classifiers on timm's parts.

The scripts in `tools/` are thin: everything they do can be called from Python through these names.
"""

from vrwkv.runtime.errors import MissingExtra, UserError

try:
    import pydantic as _pydantic  # noqa: F401
    import tqdm as _tqdm  # noqa: F401
except ImportError as error:
    raise MissingExtra(f"vrwkv.classification needs {error.name}: pip install 'vrwkv[train]'") from error

from vrwkv.classification.classifier import Classifier, Prediction, load_classifier, predict_files
from vrwkv.classification.config import Config
from vrwkv.classification.evaluate import validate
from vrwkv.classification.task import train
from vrwkv.runtime.config import load_config

__all__ = [
    "Classifier",
    "Config",
    "Prediction",
    "UserError",
    "load_classifier",
    "load_config",
    "predict_files",
    "train",
    "validate",
]
