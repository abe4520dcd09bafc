"""Training, validation and prediction of image classifiers on timm's parts.

The scripts in `tools/` are thin: everything they do can be called from Python through these names.
"""

from vrwkv.classification.config import Config
from vrwkv.classification.evaluate import validate
from vrwkv.classification.model import Classifier, load_classifier
from vrwkv.classification.predict import predict
from vrwkv.classification.task import train
from vrwkv.runtime.config import load_config
from vrwkv.runtime.errors import UserError

__all__ = ["Classifier", "Config", "UserError", "load_classifier", "load_config", "predict", "train", "validate"]
