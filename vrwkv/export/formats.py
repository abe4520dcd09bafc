"""The files: written beside their name, compared with the network, and renamed."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vrwkv.export.program import trace, uncached
from vrwkv.export.report import Row, compare, compare_at, require_equal
from vrwkv.export.subject import subject_of
from vrwkv.runtime.errors import MissingExtra, UserError, first_line
from vrwkv.runtime.facts import Facts
from vrwkv.runtime.files import written
from vrwkv.runtime.onnx_model import OnnxModel

OPSET = 20
Quantize = Literal["none", "int8"]


def to_onnx(model: Any, path: str | Path, quantize: Quantize = "none") -> list[Row]:
    """Writes a model as one ONNX file of standard operators (opset 20) for every batch and image size.

    Input ``images`` ``(batch, channels, height, width)``, normalised as the file's metadata say; output ``logits``
    ``(batch, classes)``, of segmentors ``(batch, classes, height, width)``.

    Args:
        model: A timm model of this package, a `Classifier`, or a segmentor of `load_segmentor`.
        path: The file, NAME.onnx.
        quantize: "int8" keeps the weights of matrix products as 8-bit integers, by onnxruntime's dynamic quantisation.

    Returns:
        How far it is from `model` at five image sizes. With int8, which is less exact, nothing is required of it.

    Raises:
        UserError: it cannot be exported, differs from `model` by more than 1e-4 of the largest logit, or cannot be
            written; then nothing is.
    """
    path = Path(path)
    _require(path.suffix == ".onnx", f"the file of an ONNX model must be named NAME.onnx, got {path}")
    _require(quantize in ("none", "int8"), f"quantize must be none or int8, got {quantize!r}")
    _import_onnx()
    network, facts = subject = subject_of(model)
    with written(path) as temporary:
        _save_onnx(network, facts, temporary)
        rows = compare(subject, OnnxModel(temporary, facts.task))
        require_equal(rows, path)
        if quantize == "int8":
            _quantize(temporary)
            rows = compare(subject, OnnxModel(temporary, facts.task))
    return rows


def to_torch(model: Any, path: str | Path) -> list[Row]:
    """Writes a model as a torch program, which runs where torch is, without this package.

    .. code-block:: python

        program = torch.export.load("model.pt2").module(check_guards=False)
        logits = program(images)

    Args:
        model: As for :func:`to_onnx`.
        path: The file, NAME.pt2. What ONNX files have as metadata is in its extra file ``facts.json``.

    Returns:
        As :func:`to_onnx`.

    Raises:
        UserError: as :func:`to_onnx`.
    """
    path = Path(path)
    _require(path.suffix == ".pt2", f"the file of a torch program must be named NAME.pt2, got {path}")
    network, facts = subject = subject_of(model)
    with written(path) as temporary:
        program = trace(network, facts.input_size[0])
        torch.export.save(program, temporary, extra_files={"facts.json": json.dumps(facts.to_metadata())})
        # The guards are what tracing its example found true; what holds for every size is compared here.
        rows = compare(subject, torch.export.load(temporary).module(check_guards=False))
        require_equal(rows, path)
    return rows


def to_safetensors(model: Any, path: str | Path) -> None:
    """Writes the weights of a classifier by timm's names, with what `load_classifier` needs as the file's metadata.

    Raises:
        UserError: `model` is no classifier, what `load_classifier` makes of the file differs from it by more than 1e-4
            of the largest logit, or it cannot be written; then nothing is.
    """
    from vrwkv.classification import load_classifier

    path = Path(path)
    _require(path.suffix == ".safetensors", f"the file must be named NAME.safetensors, got {path}")
    network, facts = subject = subject_of(model)
    _require(facts.task == "classification", "safetensors are written of classifiers; a segmentor's file is its .pth")
    _require(facts.arch is not None, "safetensors need timm's name of the model: Classifier(..., arch=NAME)")
    whole: Any = {"memory_format": torch.contiguous_format}  # a tensor in two places is written twice
    weights = {name: tensor.detach().cpu().clone(**whole) for name, tensor in network.state_dict().items()}
    with written(path) as temporary:
        try:
            save_file(weights, temporary, facts.to_metadata())
        except SafetensorError as error:
            raise UserError(f"cannot write {path}: {first_line(error)}") from error
        try:
            with torch.random.fork_rng(devices=[]):  # a model draws its first weights
                again = load_classifier(temporary, device="cpu").model
        except UserError as error:
            raise UserError(f"{path} is not written: it could not be loaded: {error}") from error
        require_equal(compare_at([facts.input_size[1:]], subject, again), path)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _import_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"ONNX files need onnx, onnxscript and onnxruntime ({error}): pip install 'vrwkv[export]'"
                           ) from error  # fmt: skip


def _save_onnx(network: torch.nn.Module, facts: Facts, path: Path) -> None:
    program = trace(network, facts.input_size[0])
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        with warnings.catch_warnings(), uncached():
            warnings.simplefilter("ignore")  # of names that the exporter itself chose
            exported: Any = torch.onnx.export(program, **names, opset_version=OPSET, dynamo=True, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{type(network).__name__} cannot be written in ONNX's operators: {reason}") from error
    nodes = list(exported.model.graph.all_nodes())
    domains = {node.domain for node in nodes} - {"", "ai.onnx"}
    _require(not domains, f"{path} is not written: it would need operators of {', '.join(sorted(domains))}")
    for node in nodes:  # what of the network made it: up to a fifth of a small model's file
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    exported.model.metadata_props.update(facts.to_metadata())
    exported.save(path, external_data=False)


def _quantize(path: Path) -> None:
    """Replace the float weights of matrix products in the file `path` by integers of 7 bits.

    AVX2 and AVX-512 without VNNI add pairs of products in 16 bits, which those of 8 bits overflow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    integers: Any = {"weight_type": QuantType.QInt8, "reduce_range": True}
    logging.getLogger().addFilter(_no_advice)
    try:
        quantize_dynamic(path, path, op_types_to_quantize=["MatMul", "Gemm"], **integers)
    finally:
        logging.getLogger().removeFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    """Whether a message is other than onnxruntime's advice to prepare a model for integer activations."""
    return "pre-processing" not in record.getMessage()
