"""What files say of timm models: how this one was made, not what its architecture usually is."""

from pathlib import Path

import pytest
import timm
import torch
from support.pages import run_python
from support.scripts import REPOSITORY
from support.stir import stir

from vrwkv.classification import UserError, load_classifier
from vrwkv.export import to_safetensors
from vrwkv.export.subject import subject_of

LARGE = dict(depth=1, embed_dim=32, head_hidden_size=32)  # of the real one, only the sizes matter here


def resized(size: int) -> torch.nn.Module:
    model = timm.create_model("test_vrwkv", depth=1)
    model.set_input_size(size)
    model.reset_classifier(7)
    return model


@pytest.mark.parametrize("older_timm", [False, True], ids=["timm", "older timm"])
@pytest.mark.parametrize(
    ("make", "input_size", "kept"),
    [
        (lambda: timm.create_model("test_vrwkv"), (3, 64, 64), {}),
        (lambda: timm.create_model("test_vrwkv", img_size=128, num_classes=10), (3, 128, 128), {"num_classes": 10}),
        (lambda: timm.create_model("test_vrwkv", img_size=(32, 48)), (3, 32, 48), {"img_size": (32, 48)}),
        (lambda: timm.create_model("test_vrwkv6", in_chans=1), (1, 64, 64), {"in_chans": 1}),
        (lambda: resized(96), (3, 96, 96), {"img_size": (96, 96), "num_classes": 7}),
        # Its position embedding is for 192 pixels.
        (lambda: timm.create_model("vrwkv_large_patch16_384", **LARGE), (3, 384, 384), {}),
        (lambda: timm.create_model("test_resnet", in_chans=1, num_classes=4), (1, 160, 160), {"num_classes": 4}),
    ],
)
def test_facts_are_those_of_the_model(make, input_size, kept, older_timm):
    model = make()
    if older_timm:
        create = timm.create_model  # the architecture's own is built for comparison: a smaller one will do
        del model._model_args
        with pytest.MonkeyPatch.context() as patch:
            large = model.pretrained_cfg["architecture"] == "vrwkv_large_patch16_384"
            patch.setattr(timm, "create_model", lambda name: create(name, **LARGE if large else {}))
            facts = subject_of(model).facts
    else:
        facts = subject_of(model).facts
    assert facts.input_size == input_size and len(facts.mean) == len(facts.std) == input_size[0]
    assert facts.arch == model.pretrained_cfg["architecture"]
    assert kept.items() <= facts.model_args.items()


def test_facts_of_a_folder_are_those_of_its_configuration(tmp_path: Path):
    """Unless the model was made otherwise."""
    model = timm.create_model("test_vrwkv", img_size=32, num_classes=3)
    timm.models.save_for_hf(model, tmp_path, data_config={"input_size": (3, 48, 48), "crop_pct": 0.7})
    source = f"local-dir:{tmp_path}"
    facts = subject_of(timm.create_model(source, pretrained=True)).facts
    assert (facts.input_size, facts.crop_pct, facts.arch) == ((3, 48, 48), 0.7, "test_vrwkv")
    assert facts.model_args["img_size"] == [32, 32] and facts.model_args["num_classes"] == 3
    assert subject_of(timm.create_model(source, img_size=96)).facts.input_size == (3, 96, 96)


def test_a_folder_as_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As docs/timm.md says."""
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_vrwkv", img_size=32, num_classes=2, post_norm=True)
    timm.models.save_for_hf(model, "folder", model_config={"label_names": ["cat", "dog"]})
    run_python((REPOSITORY / "docs/timm.md").read_text(), {"timm": timm}, slice(-2, -1))
    assert load_classifier("model.safetensors").class_names == ["cat", "dog"]


def test_class_names_of_a_folder(tmp_path: Path):
    """The user's own, though ImageNet has as many classes; a new head has none of them."""
    model, own = timm.create_model("test_vrwkv", depth=1), [f"own {index}" for index in range(1000)]
    source = f"local-dir:{tmp_path}"
    assert subject_of(model).facts.class_names[0] == "n01440764"
    for given, expected in ((own, own), ({3: "own 3"}, ["0", "1", "2", "own 3", *map(str, range(4, 1000))])):
        timm.models.save_for_hf(model, tmp_path, model_config={"label_names": given})
        back = timm.create_model(source, pretrained=True)
        assert subject_of(back).facts.class_names == expected
    to_safetensors(back, tmp_path / "exported.safetensors")
    assert load_classifier(tmp_path / "exported.safetensors").class_names == expected
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": own})
    assert subject_of(timm.create_model(source, pretrained=True, num_classes=5)).facts.class_names is None


def test_class_names_of_a_model_by_name(monkeypatch: pytest.MonkeyPatch):
    """`load_classifier` asks the configuration, too."""
    own, create_model = [f"own {index}" for index in range(1000)], timm.create_model
    overlay = {"label_names": own}
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained: create_model(name, pretrained_cfg_overlay=overlay)
    )
    assert load_classifier(model_name="test_vrwkv", pretrained=True, device="cpu").class_names == own


@pytest.mark.parametrize(
    "args",
    [
        {"post_norm": True},
        {"img_size": 128},
        {"shift_pixel": 2},
        {"num_classes": 10},
        {"in_chans": 1, "drop_path_rate": 0.3},
    ],
    ids=str,
)
@torch.no_grad()
def test_safetensors_of_timm_models_come_back_as_they_are(args, tmp_path: Path):
    model = timm.create_model("test_vrwkv", **args).train()
    stir(model)
    to_safetensors(model, tmp_path / "model.safetensors")
    again = load_classifier(tmp_path / "model.safetensors")
    images = torch.randn(2, *again.data_config["input_size"])
    assert model.training and images.shape[1:] == (args.get("in_chans", 3), *(2 * [args.get("img_size", 64)]))
    torch.testing.assert_close(again.model(images), model.eval()(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_safetensors_of_tied_weights(tmp_path: Path):
    model = timm.create_model("test_vrwkv").eval()
    model.blocks[1].att.key.weight = model.blocks[0].att.key.weight
    stir(model)
    to_safetensors(model, tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_classifier(tmp_path / "model.safetensors").model(images), model(images))


def test_safetensors_that_would_be_another_model_are_not_written(tmp_path: Path):
    model, path = timm.create_model("test_vit", act_layer=torch.nn.ReLU), tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"not written: the exported model must agree .* at 160 x 160 it differs by"):
        to_safetensors(model, path)
    del model.blocks[1]
    with pytest.raises(UserError, match=r"not written: it could not be loaded: .* of another model"):
        to_safetensors(model, path)
    with pytest.raises(UserError, match="required: a timm model, a Classifier or a segmentor, got FeatureGetterNet"):
        to_safetensors(timm.create_model("test_vrwkv", features_only=True), path)
    with pytest.raises(UserError, match="pictures have 1 or 3 channels, the model takes 4"):
        to_safetensors(timm.create_model("test_vrwkv", in_chans=4), path)
    assert not list(tmp_path.iterdir())
