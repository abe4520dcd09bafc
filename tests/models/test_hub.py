"""Models to a folder or a hub and back, by timm's functions and by transformers."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from support.pages import run_python
from support.scripts import REPOSITORY
from torch import nn

from vrwkv.models import VisionRWKVBase, model_card

every_family = pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6"])


def create(name: str, **kwargs) -> VisionRWKVBase:
    """A model, no parameter of which has its initial value."""
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@every_family
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_folder_and_back(name: str, safe: bool, tmp_path: Path) -> None:
    model = create(name, num_classes=7, in_chans=1, img_size=(48, 64), patch_size=8, depth=3, drop_path_rate=0.1)
    data = {"input_size": (1, 48, 64)}
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe, data_config=data)
    images = torch.randn(2, 1, 48, 64)

    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(back(images), model(images))
    assert (back.pretrained_cfg["num_classes"], back.pretrained_cfg["input_size"]) == (7, (1, 48, 64))

    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    expected = model.forward_intermediates(images, intermediates_only=True)
    for feature, wanted in zip(features(images), expected[-3:], strict=True):
        assert torch.equal(feature, wanted)

    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert other(images).shape == (2, 3)
    assert torch.equal(other.forward_features(images), model.forward_features(images))


@every_family
def test_model_that_was_changed_comes_back_as_it_is(name: str, tmp_path: Path) -> None:
    model = create(name, img_size=32)
    model.set_input_size((48, 80))
    model.reset_classifier(4)
    timm.models.save_for_hf(model, tmp_path)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 48, 80)
    assert back.pos_embed.shape == model.pos_embed.shape
    assert torch.equal(back(images), model(images))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub in a folder."""

    class Api:
        def __init__(self, **kwargs) -> None:
            pass

        def create_repo(self, repo_id: str, **kwargs) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id: str, filename: str, revision: str | None) -> bool:
            return (tmp_path / repo_id / filename).exists()

        def upload_folder(self, repo_id: str, folder_path: str, **kwargs) -> None:
            shutil.copytree(folder_path, tmp_path / repo_id)

    def download(repo_id: str, filename: str, **kwargs) -> str:
        path = tmp_path / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return tmp_path


@every_family
def test_hub_and_back(name: str, hub: Path) -> None:
    model = create(name, num_classes=5, img_size=(32, 48))
    card = model_card(model, "someone/small", Dataset="digits", Accuracy="98 %")
    timm.models.push_to_hf_hub(model, "someone/small", model_card=card)
    images = torch.randn(2, 3, 32, 48)
    back = timm.create_model("hf-hub:someone/small", pretrained=True).eval()
    assert torch.equal(back(images), model(images))

    readme = (hub / "someone/small/README.md").read_text()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    for fact in (
        "license: apache-2.0", "# Model card for small", f"A {name} of the package vrwkv", "  - Classes: 5\n",
        f"  - Parameters (M): {millions:.2f}\n", "  - Image size: 32 x 48\n", "https://arxiv.org/abs/2403.02308",
        "**Accuracy:** 98 %", "@inproceedings{duan2025vision",
    ):  # fmt: skip
        assert fact in readme
    names = run_python(readme, {}, slice(0, 1))
    assert torch.equal(names["model"](images), model(images))


@every_family
def test_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says."""
    pytest.importorskip("transformers")
    page = (REPOSITORY / "docs/timm.md").read_text()
    model = create(name, num_classes=5, img_size=32)
    monkeypatch.chdir(tmp_path)
    names = run_python(page, {"model": model}, slice(-1, None))
    wrapper: nn.Module = names["model"]
    assert type(wrapper).__name__ == "TimmWrapperForImageClassification"
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(wrapper.eval()(images).logits, model(images))
