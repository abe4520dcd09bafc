"""Models that `tools/export.py` wrote as ONNX, run by onnxruntime."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vrwkv.runtime.errors import MissingExtra, UserError, first_line
from vrwkv.runtime.facts import Facts, TaskName
from vrwkv.runtime.processes import Amp


def is_onnx(path: str | Path | None) -> bool:
    """Whether a checkpoint is one for :class:`OnnxModel`, by the ending of its name."""
    return path is not None and Path(path).suffix == ".onnx"


class OnnxModel(nn.Module):
    """An ONNX file as a module for inference on the CPU, in as many threads as torch has.

    Attributes:
        facts: What the file says of itself.
        num_classes: Outputs, for segmentors of each pixel.

    Args:
        path: The file.
        task: What it must be for.
        device: What was asked for: only the processor can be had.
        amp: Likewise: only "none" can be had.

    Raises:
        UserError: the file, onnxruntime in it, `device` or `amp` cannot be used.
    """

    def __init__(self, path: str | Path, task: TaskName, device: str = "auto", amp: Amp = "none") -> None:
        super().__init__()
        if not Path(path).is_file():
            raise UserError(f"checkpoint {path} does not exist")
        if device not in ("auto", "cpu") or amp != "none":
            raise UserError(
                f"{path} runs on the CPU in its own number format: required is device cpu and amp none, "
                f"got {device} and {amp}"
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra(f"{path} needs onnxruntime ({error}): pip install 'vrwkv[export]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # bytes that are no ONNX file raise a dozen types
            raise UserError(f"{path} is no ONNX file that onnxruntime can run: {first_line(error)}") from error
        self.facts = Facts.from_metadata(self._session.get_modelmeta().custom_metadata_map, path)
        if self.facts.task != task:
            raise UserError(f"{path} is for {self.facts.task}, required is one for {task}")
        (self._input,), (output,) = self._session.get_inputs(), self._session.get_outputs()
        self.num_classes: int = output.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)``, of segmentors ``(B, classes, H, W)``, of normalised images ``(B, C, H, W)``."""
        given = {self._input.name: images.detach().float().cpu().contiguous().numpy()}
        try:
            return torch.from_numpy(self._session.run(None, given)[0])
        except Exception as error:  # onnxruntime has a type for each status
            raise UserError(f"onnxruntime cannot run images of {tuple(images.shape)}: {first_line(error)}") from error
