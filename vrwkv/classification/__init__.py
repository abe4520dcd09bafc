"""Training, validation and prediction of image classifiers on timm's parts.

The scripts in `tools/` are thin: everything they do can be called from Python through these names.
"""

from importlib.util import find_spec

from vrwkv.runtime.errors import MissingExtra, UserError

if _missing := [name for name in ("matplotlib", "pydantic", "tqdm") if find_spec(name) is None]:
    raise MissingExtra(f"vrwkv.classification needs {', '.join(_missing)}: pip install 'vrwkv[train]'")

from vrwkv.classification.classifier import Classifier, Prediction, load_classifier, predict_files
from vrwkv.classification.config import Config
from vrwkv.classification.evaluate import validate
from vrwkv.classification.reports import Reports
from vrwkv.classification.task import train
from vrwkv.runtime.config import load_config

__all__ = [
    "Classifier",
    "Config",
    "Prediction",
    "Reports",
    "UserError",
    "load_classifier",
    "load_config",
    "predict_files",
    "train",
    "validate",
]
