"""Torch programs run where torch alone is; safetensors come back as the classifier that they were."""

import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from support.colours import CLASSES
from support.scripts import REPOSITORY

from vrwkv.classification import UserError, load_classifier
from vrwkv.export import to_safetensors

TORCH_ALONE = """
import sys
for name in ("vrwkv", "timm", "onnx", "onnxruntime", "torchvision"):
    sys.modules[name] = None  # importing it fails
import torch
extra = {"facts.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module(check_guards=False)
images = torch.load(sys.argv[2])
torch.save([program(each) for each in images], sys.argv[3])
print(extra["facts.json"])
"""


@torch.no_grad()
def test_torch_program_in_a_process_with_torch_alone(classifier, torch_file, tmp_path):
    images = [torch.randn(batch, 3, *size) for batch, *size in ((1, 1, 1), (3, 33, 70), (1, 200, 160))]
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", TORCH_ALONE, torch_file, tmp_path / "images.pt", tmp_path / "logits.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"arch": "\\"test_vrwkv\\""' in done.stdout
    for each, logits in zip(images, torch.load(tmp_path / "logits.pt"), strict=True):
        expected = classifier.model(each)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_the_torch_program_does_not_say_where_it_was_made(torch_file):
    with zipfile.ZipFile(torch_file) as archive:
        assert not [name for name in archive.namelist() if str(REPOSITORY).encode() in archive.read(name)]


def test_safetensors(classifier, trained, data_root, tmp_path, export, capsys):
    output = tmp_path / "model.safetensors"
    assert export([str(trained), "--format", "safetensors", "--output", str(output)]) == 0
    again = load_classifier(output)
    assert again.class_names == list(CLASSES) and again.data_config == classifier.data_config
    picture = next(data_root.glob("val/*/0.png"))
    found, wanted = again.predict(picture), classifier.predict(picture)
    assert [each.class_name for each in found] == [each.class_name for each in wanted]
    # Matrix products may round otherwise where memory lies otherwise.
    assert [each.probability for each in found] == pytest.approx([each.probability for each in wanted], rel=1e-5)
    plain = timm.create_model("test_vrwkv", **classifier.model_args, checkpoint_path=str(output))
    torch.testing.assert_close(plain.state_dict(), classifier.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"named NAME\.safetensors"):
        to_safetensors(classifier, tmp_path / "model.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
