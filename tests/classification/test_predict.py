"""Validation and prediction from a trained checkpoint."""

import json

import pytest
import timm
import torch
from PIL import Image
from support.colours import CLASSES, picture

from vrwkv.classification import Classifier, UserError, load_classifier, predict_files

pytestmark = pytest.mark.usefixtures("no_curves")


def test_validate_gives_the_metrics_of_training(run, validate, capsys):
    assert validate(["--checkpoint", str(run / "best.pth"), "--workers", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    metrics = torch.load(run / "best.pth", weights_only=True)["metrics"]
    assert result["images"] == 15
    for key in ("loss", "top1", "top5"):
        assert result[key] == pytest.approx(metrics[key], rel=1e-5)


@pytest.mark.parametrize(
    "setting",
    [
        "data.crop_pct=0.5",
        "data.interpolation=nearest",
        "data.img_size=32",
        "data.mean=[0.1, 0.2, 0.3]",
        "data.std=[0.5]",
        "data.val_split=train",
    ],
)
def test_validate_follows_the_data_keys_of_training(setting, run, tmp_path, train, validate, train_args, capsys):
    """And the classifier's own preprocessing is the loader's."""
    checkpoint = run / "best.pth"
    frozen = ["epochs=1", "optim.lr=0", "schedule.warmup_lr=0", f"model.checkpoint={checkpoint}"]
    assert train(train_args(tmp_path, setting, *frozen)) == 0
    capsys.readouterr()
    metrics = {}
    for path in (checkpoint, tmp_path / "best.pth"):
        assert validate(["--checkpoint", str(path), "--workers", "0", "--json"]) == 0
        metrics[path] = json.loads(capsys.readouterr().out)
    trained = torch.load(tmp_path / "best.pth", weights_only=True)["metrics"]
    for key, value in trained.items():
        assert metrics[tmp_path / "best.pth"][key] == pytest.approx(value, rel=1e-6)
    assert metrics[checkpoint]["loss"] != pytest.approx(trained["loss"], rel=1e-4)  # the key matters


def test_predictions_agree_with_validation(run, data_root, validate, predict, capsys):
    """The same preprocessing: as many pictures are right one by one as in batches of the loader."""
    assert validate(["--checkpoint", str(run / "best.pth"), "--workers", "0", "--json"]) == 0
    top1 = json.loads(capsys.readouterr().out)["top1"]
    paths = sorted((data_root / "val").glob("*/*.png"))
    assert predict([*map(str, paths), "--checkpoint", str(run / "best.pth"), "--topk", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["image"] for result in results] == [str(path) for path in paths]
    right = [path.parent.name == result["predictions"][0]["class"] for path, result in zip(paths, results, strict=True)]
    assert 100 * sum(right) / len(right) == pytest.approx(top1)
    for result in results:
        first, second = (each["probability"] for each in result["predictions"])
        assert 1 >= first >= second >= 0


def test_predict_prints_classes_and_probabilities(run, data_root, predict, capsys):
    path = next((data_root / "val" / "red").iterdir())
    assert predict([str(path), "--checkpoint", str(run / "best.pth")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path)
    assert {line.split()[-1] for line in lines[1:]} == set(CLASSES)
    assert sum(float(line.split()[0]) for line in lines[1:]) == pytest.approx(100, abs=0.2)


def test_weights_without_metadata_need_the_model_name(tmp_path, predict, error, capsys):
    model = timm.create_model("test_vrwkv", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    picture((9, 9, 9), seed=0).save(tmp_path / "x.png")
    argv = [str(tmp_path / "x.png"), "--checkpoint", str(tmp_path / "bare.pth"), "--json"]
    assert "give --model" in error(predict, argv)
    assert predict([*argv, "--model", "test_vrwkv"]) == 0
    best = json.loads(capsys.readouterr().out)[0]["predictions"][0]
    assert best["class"].startswith("n0") or best["class"].startswith("n1")  # ImageNet's folder name
    assert not best["label"].startswith(best["class"])  # and its words


def test_validate_img_size(run, validate):
    assert validate(["--checkpoint", str(run / "best.pth"), "--workers", "0", "--img-size", "32"]) == 0
    classifier = load_classifier(run / "best.pth", img_size=32)
    assert classifier.data_config["input_size"] == (3, 32, 32)


def test_predict_one_and_many(run, data_root):
    """Files or pictures, one or a sequence, in batches of any number."""
    classifier = load_classifier(run / "best.pth", device="cpu")
    paths = sorted((data_root / "val").glob("*/*.png"))
    many = classifier.predict(paths * 3, topk=2)  # 45 pictures, more than a batch
    assert len(many) == 45
    assert all(len(each) == 2 for each in many)
    for path, expected in zip(paths, many, strict=False):
        with Image.open(path) as picture:
            for given in (path, str(path), picture):
                found = classifier.predict(given, topk=2)
                assert [each.class_name for each in found] == [each.class_name for each in expected]
                assert found[0].probability == pytest.approx(expected[0].probability, rel=1e-4)
    assert classifier.predict([]) == []
    assert len(classifier.predict(paths[0])) == len(CLASSES)
    first = classifier.predict(paths[0], topk=1)[0]
    assert first.label == first.class_name == "blue"
    with pytest.raises(UserError, match="topk must be at least 1, not 0"):
        classifier.predict(paths[0], topk=0)
    with pytest.raises(UserError, match=r"absent.png does not exist"):
        classifier.predict([paths[0], "absent.png"])


def test_predict_in_lower_precision(run, data_root, predict, capsys):
    path = str(data_root / "val" / "red" / "0.png")
    probabilities = {}
    for amp in ("none", "bfloat16"):
        assert predict([path, "--checkpoint", str(run / "best.pth"), "--amp", amp, "--json"]) == 0
        probabilities[amp] = json.loads(capsys.readouterr().out)[0]["predictions"][0]["probability"]
    assert probabilities["none"] == pytest.approx(probabilities["bfloat16"], rel=0.1)
    assert probabilities["none"] != probabilities["bfloat16"]


def save_untrained(path, **entries):
    """A checkpoint of a grey model with random weights and seven classes."""
    args = {"img_size": 16, "patch_size": 8, "in_chans": 1, "num_classes": 7}
    torch.manual_seed(0)
    model = timm.create_model("test_vrwkv", **args)
    torch.nn.init.normal_(model.head.weight)
    torch.save({"arch": "test_vrwkv", "model_args": args, "state_dict": model.state_dict(), **entries}, path)
    return path


def test_grey_model_without_class_names(tmp_path):
    """It is given grey pictures, and names its classes by number."""
    classifier = load_classifier(save_untrained(tmp_path / "x.pth"), device="cpu")
    red = Image.new("RGB", (16, 16), (200, 0, 0))
    assert classifier.data_config["input_size"] == (1, 16, 16)
    assert classifier.open(red).mode == "L"
    assert classifier.prepare(red).shape == (1, 16, 16)
    found = classifier.predict(red, topk=99)
    assert sorted(each.class_name for each in found) == list("0123456")
    assert sum(each.probability for each in found) == pytest.approx(1)
    assert classifier.predict(red.convert("L"), topk=99) == found
    assert len(classifier.predict(red)) == 5


def test_predict_files_in_batches(run, data_root, tmp_path):
    """Their results stay with them, whatever is bad between them."""
    classifier = load_classifier(run / "best.pth", device="cpu")
    good = sorted((data_root / "val").glob("*/*.png"))
    paths = [path for each in good * 5 for path in (each, tmp_path / "absent.png")]  # 150, five batches
    results = predict_files(classifier, paths, topk=1)
    assert [result["image"] for result in results] == [str(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if path in good:
            assert result["predictions"][0]["class"] == path.parent.name
            assert "error" not in result
        else:
            assert result == {"image": str(path), "error": f"image {path} does not exist"}
    assert len(predict_files(classifier, good)[0]["predictions"]) == 3


def test_published_weights(tmp_path, monkeypatch, predict, error):
    """They are asked for where no checkpoint is given, of a model that is named."""
    path, asked = save_untrained(tmp_path / "x.pth"), []
    create_model = timm.create_model

    def create(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return create_model(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    assert load_classifier(model_name="test_vrwkv", pretrained=True, device="cpu").class_names[0] == "n01440764"
    load_classifier(path, "test_vrwkv", pretrained=True)
    load_classifier(path)
    assert asked == [("test_vrwkv", True), ("test_vrwkv", False), ("test_vrwkv", False)]
    for argv in (["--model", "test_vrwkv"], ["--pretrained"], []):
        expected = "error: required: --checkpoint PATH, or --model NAME with --pretrained"
        assert error(predict, ["x.png", *argv]) == expected


def test_data_root_that_is_not_known(tmp_path, data_root, validate, error):
    path = save_untrained(tmp_path / "x.pth")
    expected = "error: required: --data-root DIR, because the checkpoint does not name one"
    assert error(validate, ["--checkpoint", path]) == expected
    expected = f"error: the model has 7 classes, {data_root / 'val'} has 3"
    assert error(validate, ["--checkpoint", path, "--data-root", data_root]) == expected


def test_number_of_class_names(run):
    model = load_classifier(run / "best.pth", device="cpu")
    with pytest.raises(UserError, match="the model has 3 classes, 2 names are given"):
        Classifier(model.model, model.data_config, ["a", "b"])


def test_cmyk(run, predict, tmp_path):
    picture((10, 10, 10), seed=1).convert("CMYK").save(tmp_path / "x.jpg")
    assert predict([str(tmp_path / "x.jpg"), "--checkpoint", str(run / "best.pth")]) == 0


def test_nothing_but_json_on_stdout(run, data_root, validate, predict, monkeypatch, capsys):
    """Whatever else a library prints there."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: print("hello") or create_model(*args, **kwargs))
    argv = ["--checkpoint", str(run / "best.pth"), "--json"]
    assert validate([*argv, "-j", "0"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 15
    assert "hello" in captured.err
    assert predict([str(data_root / "val/red/0.png"), *argv]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
