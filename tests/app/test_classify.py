"""What the first tab shows of a picture, without a browser."""

import pytest
import timm
import torch
from support.colours import CLASSES, picture

from vrwkv.app.page import _classify
from vrwkv.classification import Classifier, load_classifier


@pytest.fixture(scope="module")
def classifier(classifier_path) -> Classifier:
    return load_classifier(classifier_path, device="cpu")


def test_classes_are_those_of_the_picture(classifier: Classifier) -> None:
    for name, colour in CLASSES.items():
        image = picture(colour, seed=100)
        classes, votes = _classify(classifier, image)
        expected = {each.label: each.probability for each in classifier.predict(image)}
        assert classes == pytest.approx(expected, abs=1e-5)
        assert max(classes, key=classes.__getitem__) == name
        assert votes is not None


@pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6", "test_vit", "test_resnet"])
def test_a_picture_takes_one_pass(name: str) -> None:
    """Whatever speaks for a class: votes and shares, votes alone, or nothing."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    data = timm.data.resolve_model_data_config(model)
    classifier = Classifier(model, data, ["a", "b", "c"])
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    passes = []
    first.register_forward_hook(lambda *_: passes.append(1))
    classes, votes = _classify(classifier, picture(CLASSES["red"], seed=0))
    assert len(passes) == 1
    assert classes.keys() == {"a", "b", "c"}
    assert (votes is None) == (name == "test_vit")  # whose classifier is given a class token alone
