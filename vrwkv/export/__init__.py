"""Models as files that run without this package: ONNX, torch programs; and safetensors, which say what they hold.

.. code-block:: python

    to_onnx(timm.create_model("vrwkv_tiny_patch16_224", pretrained=True), "vrwkv_tiny.onnx")
    to_onnx(load_classifier("output/run1/best.pth"), "classifier.onnx")
    to_onnx(load_segmentor("CONFIG", "CHECKPOINT"), "segmentor.onnx")
"""

from vrwkv.export.formats import to_onnx, to_safetensors, to_torch
from vrwkv.export.report import Row

__all__ = ["Row", "to_onnx", "to_safetensors", "to_torch"]
