"""ONNX files: the same logits at every size, standard operators, linear cost, and all that is needed to use them."""

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from support.colours import CLASSES, picture
from support.scripts import load_tool

from vrwkv.classification import load_classifier, validate
from vrwkv.export import formats, report, to_onnx
from vrwkv.runtime.errors import MissingExtra, UserError
from vrwkv.runtime.onnx_model import OnnxModel

SIZES = [(1, 1, 1), (3, 33, 70), (1, 16, 200), (2, 160, 112), (1, 96, 96)]


@pytest.fixture(params=["VRWKV", "VRWKV6"])
def pair(request):
    """A network and the file that was made of it."""
    if request.param == "VRWKV":
        return request.getfixturevalue("classifier").model, request.getfixturevalue("onnx_file")
    return request.getfixturevalue("second_family"), request.getfixturevalue("second_onnx_file")


@torch.no_grad()
def test_logits_at_every_size(pair):
    """Sizes and batches that neither tracing nor the tool's own comparison have seen."""
    network, path = pair
    exported = OnnxModel(path, "classification")
    for batch, height, width in SIZES:
        images = torch.randn(batch, 3, height, width)
        expected = network(images)
        torch.testing.assert_close(exported(images), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_standard_operators_of_one_opset(pair):
    model = onnx.load(pair[1])
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param  # the batch has a name, no number
    assert all(side.dim_param for side in model.graph.input[0].type.tensor_type.shape.dim[2:])


def test_nothing_grows_faster_than_the_picture(pair, tmp_path):
    """Every tensor in the graph is looked at, for 64 and for 256 tokens."""
    model = onnx.load(pair[1])
    names = [name for node in model.graph.node for name in node.output if name]
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    onnx.save(model, tmp_path / "all.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx", providers=["CPUExecutionProvider"])
    sizes = []
    for side in (128, 256):
        outputs = session.run(None, {"images": np.zeros((1, 3, side, side), np.float32)})
        sizes.append({each.name: np.size(value) for each, value in zip(session.get_outputs(), outputs, strict=True)})
    small, large = sizes
    assert len(small) > 100
    grown = {name: (small[name], large[name]) for name in small if large[name] > 6 * small[name]}  # 16 if quadratic
    assert not grown


def test_the_file_says_how_to_use_it(onnx_file):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    found = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert found["class_names"] == list(CLASSES)
    assert found["mean"] == [0.4, 0.5, 0.6] and found["std"] == [0.2, 0.25, 0.3]
    assert found["input_size"] == [3, 32, 32] and found["crop_pct"] == 0.9 and found["interpolation"] == "bilinear"
    assert found["task"] == "classification" and found["arch"] == "test_vrwkv"


def test_the_file_does_not_say_where_it_was_made(pair):
    content = pair[1].read_bytes()
    assert b".py" not in content and b"stack_trace" not in content
    assert all(not node.metadata_props for node in onnx.load(pair[1]).graph.node)


def test_tools_take_it_as_a_checkpoint(trained, onnx_file, data_root, capsys):
    predict, validate = load_tool("predict"), load_tool("validate")
    pictures = [str(path) for path in sorted(data_root.glob("val/*/0.png"))]
    found = []
    for path in (trained, onnx_file):
        assert predict([*pictures, "--checkpoint", str(path), "--json"]) == 0
        found.append([each["predictions"] for each in json.loads(capsys.readouterr().out)])
        options = ["--checkpoint", str(path), "--data-root", str(data_root), "--workers", "0", "--json"]
        assert validate(options) == 0
        found[-1].append(json.loads(capsys.readouterr().out)["loss"])
    *expected, loss = found[0]
    for one, other in zip(expected, found[1], strict=False):
        assert [each["class"] for each in one] == [each["class"] for each in other]
        assert [each["probability"] for each in one] == pytest.approx([each["probability"] for each in other], abs=1e-5)
    assert found[1][-1] == pytest.approx(loss, rel=1e-5)


def test_plain_timm_models(onnx_file, tmp_path, monkeypatch):
    """Their facts are those of timm; what was traced does not matter here."""
    model = timm.create_model("test_vrwkv", num_classes=1000, depth=1)
    monkeypatch.setattr(formats, "_save_onnx", lambda network, facts, path: path.write_text(str(facts)))
    monkeypatch.setattr(formats, "OnnxModel", lambda path, task: None)
    monkeypatch.setattr(formats, "compare", lambda subject, exported: [report.Row(1, 1, 0.0, 1.0, 1.0)])
    to_onnx(model, tmp_path / "model.onnx")
    facts = (tmp_path / "model.onnx").read_text()
    assert "n01440764" in facts and "arch='test_vrwkv'" in facts and "input_size=(3, 64, 64)" in facts


def test_int8(trained, data_root, tmp_path, export, monkeypatch, capsys, onnx_file):
    monkeypatch.setattr(formats, "_save_onnx", lambda network, facts, path: path.write_bytes(onnx_file.read_bytes()))
    measured = []
    patched = "vrwkv.classification.validate"
    monkeypatch.setattr(patched, lambda *args, **keys: measured.append(keys) or validate(*args, **keys))
    output = tmp_path / "int8.onnx"
    assert export([str(trained), "--output", str(output), "--quantize", "int8"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("top-1") == 2 and "of 15 images" in printed
    assert [keys["batch_size"] for keys in measured] == [1, 1]
    weights = [each for each in onnx.load(output).graph.initializer if each.data_type == onnx.TensorProto.INT8]
    assert len(weights) >= 8
    # Two products of these with activations of 8 bits, without sign, stay in the 16 bits that some processors have.
    assert all(2 * 255 * np.abs(onnx.numpy_helper.to_array(each).astype(int)).max() < 2**15 for each in weights)
    images = torch.randn(4, 3, 32, 32)
    difference = load_classifier(output).model(images) - load_classifier(onnx_file).model(images)
    assert 0 < difference.abs().max() < 0.2 * load_classifier(onnx_file).model(images).abs().max()
    assert load_classifier(output).class_names == list(CLASSES)


def test_validated_on_the_cpu_where_there_is_a_gpu(onnx_file, monkeypatch):
    def joined(device):
        raise UserError(device)

    monkeypatch.setattr("vrwkv.classification.evaluate.join_world", joined)
    for path, device, expected in (
        (onnx_file, "auto", "cpu"),
        (onnx_file, "cuda", "cuda"),
        ("best.pth", "auto", "auto"),
    ):
        with pytest.raises(UserError, match=f"^{expected}$"):
            validate(path, device=device)


def test_what_differs_is_not_written(classifier, onnx_file, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_save_onnx", lambda network, facts, path: path.write_bytes(onnx_file.read_bytes()))
    changed = copy.deepcopy(classifier)
    torch.nn.init.ones_(changed.model.head.bias)
    with pytest.raises(UserError, match=r"not written: the exported model must agree .* to 1e-04 .* differs by"):
        to_onnx(changed, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_input(classifier, trained, onnx_file, tmp_path, export, error, monkeypatch):
    output = ["--output", tmp_path / "model.onnx"]
    assert "must be named NAME.onnx" in error(export, [trained, "--output", tmp_path / "model.bin"])
    assert "must be named NAME.pt2" in error(export, [trained, *output, "--format", "torch"])
    monkeypatch.setattr("vrwkv.export.formats.trace", lambda *_: pytest.fail("traced"))
    monkeypatch.setattr("vrwkv.classification.validate", lambda *_, **__: pytest.fail("measured"))
    missing = ["--output", tmp_path / "none" / "model.onnx", "--quantize", "int8"]
    assert f"folder {tmp_path / 'none'} does not exist" in error(export, [trained, *missing])
    with pytest.raises(UserError, match="cannot write"):
        to_onnx(classifier, tmp_path / "none" / "model.onnx")
    (tmp_path / "model.onnx").mkdir()
    assert "model.onnx: it is a folder" in error(export, [trained, *output])
    (tmp_path / "model.onnx").rmdir()
    assert "unknown model 'vrwk'" in error(export, ["vrwk", *output])
    assert "does not exist" in error(export, [tmp_path / "none.pth", *output])
    assert "for classifiers as ONNX" in error(export, [trained, *output, "--format", "torch", "--quantize", "int8"])
    assert "a model with layers, got an ONNX file" in error(export, [onnx_file, *output])
    with pytest.raises(UserError, match="required: a timm model, a Classifier or a segmentor, got Linear"):
        to_onnx(torch.nn.Linear(2, 2), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_files(onnx_file, tmp_path, error):
    predict = load_tool("predict")
    broken, foreign = tmp_path / "broken.onnx", tmp_path / "foreign.onnx"
    broken.write_bytes(onnx_file.read_bytes()[:5000])
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, foreign)
    assert "no ONNX file that onnxruntime can run" in error(predict, ["picture.png", "--checkpoint", broken])
    assert "was not written by tools/export.py" in error(predict, ["picture.png", "--checkpoint", foreign])
    assert "runs on the CPU" in error(predict, ["picture.png", "--checkpoint", onnx_file, "--device", "cuda"])
    assert "number format" in error(predict, ["picture.png", "--checkpoint", onnx_file, "--amp", "bfloat16"])
    assert "holds test_vrwkv, not resnet18" in error(
        predict, ["picture.png", "--checkpoint", onnx_file, "--model", "resnet18"]
    )
    picture((200, 40, 40), seed=0).save(tmp_path / "red.png")
    look = [tmp_path / "red.png", "--checkpoint", onnx_file, "--out", tmp_path / "out"]
    assert "Bi-WKV" in error(load_tool("visualize"), look)
    with pytest.raises(UserError, match="is for classification, required is one for segmentation"):
        OnnxModel(onnx_file, "segmentation")


def test_decays_beyond_the_graph(tmp_path):
    model = timm.create_model("test_vrwkv", depth=1)
    model.blocks[0].att.spatial_decay.data[3] = -700.0
    with pytest.raises(UserError, match=r"needs decays below 320, blocks\.0\.att.spatial_decay has 700"):
        formats.trace(model, 3)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package(missing, classifier, onnx_file, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(MissingExtra, match=r"pip install 'vrwkv\[export\]'"):
        to_onnx(classifier, tmp_path / "model.onnx")
    if missing == "onnxruntime":
        with pytest.raises(MissingExtra, match=r"pip install 'vrwkv\[export\]'"):
            OnnxModel(onnx_file, "classification")
