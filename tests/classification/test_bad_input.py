"""Every kind of bad input ends with one line that names it, a non-zero exit code, and nothing lost."""

import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from support.colours import picture, write_images
from support.scripts import REPOSITORY

from vrwkv.classification.task import ClassificationTask

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture
def own_data(tmp_path):
    """An image folder that a test may spoil."""
    return write_images(tmp_path / "data", train=4, val=2)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optim.lrr=1", "unknown config key 'optim.lrr'; nearest: optim.lr"),
        ("lr=1", "unknown config key 'lr'; nearest: optim.lr"),
        ("data.roots=x", "unknown config key 'data.roots'; nearest: data.root"),
        ("seed.x=1", "config key seed must be a valid integer, not {'x': 1}"),
        ("epochs=many", "config key epochs must be a valid integer, not 'many'"),
        ("epochs=0", "config key epochs must be greater than or equal to 1, not 0"),
        ("data.workers=true", "config key data.workers must be a valid integer, not True"),
        ("optim.lr=fast", "config key optim.lr must be a valid number, not 'fast'"),
        ("augment.scale=[1, x]", "config key augment.scale[1] must be a valid number, not 'x'"),
        ("amp=float8", "config key amp must be 'none', 'bfloat16' or 'float16', not 'float8'"),
        ("model=vit", "config key model must be a valid dictionary, not 'vit'"),
        ("epochs", "--set takes key=value, not 'epochs'"),
        ("epochs=[", "the value is not YAML"),
        ("model.name=test_vrwkw", "unknown model 'test_vrwkw'; nearest: test_vrwkv"),
        ("model.args.depht=2", "unexpected keyword argument 'depht'"),
        ("model.args.num_classes=4", "model.args.num_classes is 4"),
        ("model.checkpoint=absent.pth", "checkpoint absent.pth does not exist"),
        ("optim.name=adamv", "config key optim.name must be an optimizer of timm, not 'adamv'; nearest: adam, "),
        ("schedule.name=cosin", "config key schedule.name must be 'cosine', "),
        ("device=gpu", "device 'gpu' cannot be used"),
        ("data.batch_size=64", "the training data fill batches of 0 samples; one update needs 64"),
        ("device=meta", "device 'meta' cannot be used: "),
        ("device=3", "config key device must be a valid string, not 3"),
        ("data.root=absent", "no data root absent"),
        ("data.val_split=dev", "has no folder 'dev'"),
    ],
)
def test_settings(setting, expected, tmp_path, train, train_args, error):
    assert expected in error(train, train_args(tmp_path / "output", setting))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("output=''", "at least 1 character"),
        ("data.workers=-1", "greater than or equal to 0"),
        ("data.img_size=0", "greater than or equal to 1"),
        ("data.interpolation=foo", "must be 'bicubic', 'bilinear', 'nearest', 'lanczos', 'hamming' or 'box'"),
        ("data.crop_pct=-1", "greater than 0"),
        ("data.crop_pct=1.5", "less than or equal to 1"),
        ("data.mean=[]", "at least 1 item"),
        ("data.mean[1]=[0.5, 2, 0.5]", "less than or equal to 1"),
        ("data.std[0]=[0, 1, 1]", "greater than 0"),
        ("augment.scale=[1]", "at least 2 items"),
        ("augment.scale[1]=[1, 0]", "greater than 0"),
        ("augment.scale[1]=[0.1, 1.1]", "less than or equal to 1"),
        ("augment.scale=[1, 0.5]", "must rise, not [1.0, 0.5]"),
        ("augment.ratio[0]=[0, 0]", "greater than 0"),
        ("augment.ratio=[1, 2, 3]", "at most 2 items"),
        ("augment.hflip=2", "less than or equal to 1"),
        ("augment.color_jitter=-1", "greater than or equal to 0"),
        ("augment.auto_augment=foo", "must be in timm's notation, such as rand-m9-mstd0.5-inc1, not 'foo'"),
        ("augment.auto_augment=rand-m9-x5", "must be in timm's notation, not 'rand-m9-x5'"),
        ("augment.erase_prob=1.5", "less than or equal to 1"),
        ("augment.mixup=-1", "greater than or equal to 0"),
        ("augment.cutmix=.inf", "finite number"),
        ("augment.label_smoothing=1", "less than 1"),
        ("optim.lr=-1", "greater than or equal to 0"),
        ("optim.lr=.nan", "finite number"),
        ("optim.lr_batch_size=0", "greater than or equal to 1"),
        ("optim.weight_decay=-1", "greater than or equal to 0"),
        ("optim.clip_grad=-1", "greater than 0"),
        ("optim.accumulate=0", "greater than or equal to 1"),
        ("optim.ema_decay=2", "less than 1"),
        ("optim.ema_decay=0", "greater than 0"),
        ("schedule.warmup_epochs=-1", "greater than or equal to 0"),
        ("schedule.warmup_lr=-1", "greater than or equal to 0"),
        ("schedule.min_lr=-1", "greater than or equal to 0"),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=1e3", "valid integer"),
        ("model.args={1: 2}", "valid string"),
        ("model.args={drop_path_rate: 2}", "must have a drop_path_rate of at least 0 and less than 1, not 2"),
        ("model.compile=1", "valid boolean"),
        ("model.channels_last=1", "valid boolean"),
        ("model.grad_checkpointing=-1", "greater than or equal to 0"),
        ("model.grad_checkpointing=x", "must be a valid integer, not 'x'"),
    ],
)
def test_values_out_of_range(setting, expected, tmp_path, train, train_args, error):
    name, _, value = setting.partition("=")
    key = name.partition("[")[0]
    message = error(train, train_args(tmp_path / "output", f"{key}={value}"))
    assert message.startswith(f"error: config key {key}")
    assert expected in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["data.std=[1, 1]"], "data.std must have 1 or 3 values, not [1.0, 1.0]"),
        (["model.args.in_chans=1", "data.mean=[0.5, 0.5, 0.5]"], "data.mean must have 1 or 1 values"),
        (["model.args.in_chans=5"], "pictures have 1 or 3 channels, the model takes 5"),
        (["model.args.img_size=0"], "model test_vrwkv cannot be built"),
        (
            ["model.name=test_vit", "model.args={img_size: 32, dynamic_img_size: false}", "data.img_size=48"],
            "VisionTransformer cannot take pictures of 3 x 48 x 48: ",
        ),
        (["model.args.global_pool=''"], "VisionRWKV gives (1, 4, 3) for a picture, required are (1, 3) logits"),
        (["augment.mixup=0.2", "data.batch_size=3"], "mixup and cutmix need an even data.batch_size, not 3"),
        (
            ["model.grad_checkpointing=4"],
            "model.grad_checkpointing cannot be 4 for VisionRWKV: every must be 1 to 3, which is the number of blocks",
        ),
        (
            ["model.name=test_vit", "model.args={img_size: 16}", "model.grad_checkpointing=2"],
            "must be 0 or 1 for VisionTransformer, which recomputes no block or all, not 2",
        ),
        (["optim.name=adahessian"], "optim.name adahessian needs second derivatives"),
        (["optim.name=bnbadam"], "optim or schedule cannot be used: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_values_that_do_not_fit_each_other(settings, expected, tmp_path, train, train_args, error):
    assert expected in error(train, train_args(tmp_path / "output", *settings))
    assert not (tmp_path / "output").exists()


def test_half_precision_of_a_run_in_single(run, train, train_args, error):
    message = error(train, [*train_args(run, "epochs=3", "amp=float16"), "--resume"])
    assert message.endswith("is of another run: amp was 'none', is 'float16'")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--batch-size", "0"], "option batch_size must be greater than or equal to 1, not 0"),
        (["--workers", "-1"], "option workers must be greater than or equal to 0, not -1"),
        (["--img-size", "-3"], "option img_size must be greater than or equal to 1, not -3"),
        (["--crop-pct", "0"], "option crop_pct must be greater than 0, not 0.0"),
        (["--crop-pct", "nan"], "option crop_pct must be "),
        (["--split", "absent"], "has no folder 'absent'"),
        (["--device", "meta"], "device 'meta' cannot be used"),
    ],
)
def test_options_of_validate(options, expected, run, validate, error):
    assert expected in error(validate, ["--checkpoint", str(run / "best.pth"), *options])


@pytest.mark.parametrize("topk", ["0", "-1"])
def test_topk(topk, run, predict, data_root, error):
    argv = [str(data_root / "val/red/0.png"), "--checkpoint", str(run / "best.pth"), "--topk", topk]
    assert f"topk must be at least 1, not {topk}" in error(predict, argv)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"class_names": ["a"]}, "the model has 3 classes, 1 names are given"),
        ({"class_names": [1, 2, 3]}, "entry class_names[0] must be a valid string, not 1"),
        ({"model_args": []}, "entry model_args must be a valid dictionary"),
        ({"arch": 3}, "entry arch must be a valid string"),
        ({"arch": "absent"}, "unknown model 'absent'"),
        ({"data_config": {}}, "entry 'data_config.input_size' is missing"),
        ({"data_config.input_size": (3, 16)}, "entry 'data_config.input_size[2]' is missing"),
        ({"data_config.mean": (0.5, 0.5)}, "mean must have 1 or 3 values"),
        ({"data_config.std": (0.0, 1.0, 1.0)}, "entry data_config.std[0] must be greater than 0"),
        ({"data_config.interpolation": "foo"}, "entry data_config.interpolation must be "),
        ({"data_config.crop_mode": "foo"}, "entry data_config.crop_mode must be "),
        ({"config": {"data": 3}}, "entry config.data must be a valid dictionary"),
    ],
    ids=str,
)
def test_entries_of_a_checkpoint(change, expected, run, data_root, tmp_path, predict, error):
    content = torch.load(run / "best.pth", weights_only=True)
    for key, value in change.items():
        name, _, inner = key.partition(".")
        content[name] = {**content[name], inner: value} if inner else value
    torch.save(content, tmp_path / "x.pth")
    assert expected in error(predict, [str(data_root / "val/red/0.png"), "--checkpoint", str(tmp_path / "x.pth")])


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("vrwkv_tny", "vrwkv_tiny_patch16_224"),
        ("vrkwv_small", "vrwkv_small_patch16_224"),
        ("resnet51", "resnet5"),
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
    ],
)
def test_nearest_model(name, first, tmp_path, train, train_args, error):
    message = error(train, train_args(tmp_path / "output", f"model.name={name}"))
    assert message.startswith(f"error: unknown model {name!r}; nearest: {first}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "is not YAML"),
        ("just words", "must be a mapping"),
        ("epochs: 1", "config key 'output' is missing"),
        ("epochs: 1\nepochs: 2", "key 'epochs' stands twice"),
        (
            "{output: o, epochs: 0, model: {name: x}, data: {}, optim: {lr: 1e-3, lrr: 1}}",
            "error: config key epochs must be greater than or equal to 1, not 0\n"
            "error: unknown config key 'optim.lrr'; nearest: optim.lr, optim, optim.clip_grad\n"
            "error: config key 'data.root' is missing\n"
            "error: config key 'data.batch_size' is missing",
        ),
    ],
)
def test_config_file(text, expected, tmp_path, train, error):
    (tmp_path / "config.yaml").write_text(text)
    assert expected in error(train, ["--config", str(tmp_path / "config.yaml")])


def test_missing_config_file(train, error):
    assert "cannot read config absent.yaml" in error(train, ["--config", "absent.yaml"])


def test_empty_class_folder(own_data, tmp_path, train, train_args, error):
    (own_data / "train" / "yellow").mkdir()
    message = error(train, train_args(tmp_path / "output", f"data.root={own_data}"))
    assert f"class folder {own_data / 'train' / 'yellow'} is empty" in message


def test_no_class_folders(tmp_path, train, train_args, error):
    (tmp_path / "train").mkdir()
    assert "holds no class folders" in error(train, train_args(tmp_path / "output", f"data.root={tmp_path}"))


def test_validation_class_unknown_to_training(own_data, tmp_path, train, train_args, error):
    (own_data / "val" / "red").rename(own_data / "val" / "reds")
    message = error(train, train_args(tmp_path / "output", f"data.root={own_data}"))
    assert f"class {own_data / 'val' / 'reds'} is none of the 3 known classes; nearest: red" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_training_image(workers, own_data, tmp_path, train, train_args, error):
    path = own_data / "train" / "red" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    settings = [f"data.root={own_data}", f"data.workers={workers}", "data.batch_size=2"]
    assert f"error: cannot read image {path}: " in error(train, train_args(tmp_path / "output", *settings))
    assert torch.load(tmp_path / "output" / "last.pth", weights_only=True)["epoch"] == 0
    picture((210, 40, 30), seed=1).save(path)
    assert train([*train_args(tmp_path / "output", *settings), "--resume"]) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_vanish_within_an_epoch(workers, own_data, tmp_path, train, train_args, error, monkeypatch):
    """They are named; with them back, the run ends with the weights of one that they never left."""
    settings = [f"data.root={own_data}", f"data.workers={workers}", "data.batch_size=2", "save.minutes=1e-9"]
    assert train(train_args(tmp_path / "unbroken", *settings)) == 0
    step, steps = ClassificationTask.training_step, []

    def vanish(self, model, batch):
        steps.append(1)
        if len(steps) == 8:
            own_data.rename(tmp_path / "away")
        return step(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", vanish)
        argv = train_args(tmp_path / "broken", *settings)
        assert f"error: image {own_data}/train/" in (message := error(train, argv))
        assert message.endswith(".png does not exist")
    assert f"error: no data root {own_data}" in error(train, [*argv, "--resume", "auto"])
    (tmp_path / "away").rename(own_data)
    assert train([*argv, "--resume", "auto"]) == 0
    one, other = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("unbroken", "broken"))
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())


def test_unwritable_output(tmp_path, train, train_args, error):
    (tmp_path / "file").write_text("in the way")
    assert f"cannot write to output {tmp_path / 'file'}" in error(train, train_args(tmp_path / "file"))


def test_earlier_run_is_not_overwritten(run, train, train_args, error):
    before = (run / "last.pth").read_bytes()
    assert "holds an earlier run (last.pth, last.1.pth, best.pth, summary.csv, curves.png): add --resume" in error(
        train, train_args(run)
    )
    assert (run / "last.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.args.embed_dim=40", "model.args was {"),
        ("model.name=test_vit", "model.name was 'test_vrwkv', is 'test_vit'"),
        ("optim.weight_decay=0.1", "optim.weight_decay was 0.05, is 0.1"),
        ("data.batch_size=4", "data.batch_size was 8, is 4"),
        ("data.crop_pct=0.5", "data.crop_pct was None, is 0.5"),
    ],
)
def test_resume_with_another_config(setting, expected, run, tmp_path, train, train_args, error):
    message = error(train, [*train_args(tmp_path / "output", setting), "--resume", str(run / "last.pth")])
    assert f"checkpoint {run / 'last.pth'} is of another run: {expected}" in message
    assert not (tmp_path / "output").exists()


def test_resume_with_other_classes(run, own_data, tmp_path, train, train_args, error):
    argv = [*train_args(tmp_path / "output", f"data.root={own_data}"), "--resume", str(run / "last.pth")]
    for split in ("train", "val"):
        (own_data / split / "red").rename(own_data / split / "rot")
    start = f"error: checkpoint {run / 'last.pth'} is of another run: "
    message = error(train, argv)
    assert message.startswith(start)
    assert message.endswith("class_names (3 were, 3 are; red is missing; rot is new)")
    for split in ("train", "val"):
        shutil.rmtree(own_data / split / "rot")
    message = error(train, argv)
    assert message.startswith(start)
    assert message.endswith("class_names (3 were, 2 are; red is missing)")
    assert not (tmp_path / "output").exists()


def test_resume_without_training_state(tmp_path, train, train_args, error):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "weights.pth")
    argv = [*train_args(tmp_path / "output"), "--resume", str(tmp_path / "weights.pth")]
    assert "has no training state" in error(train, argv)


def test_checkpoint_of_other_model(tmp_path, train, train_args, error):
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    message = error(train, train_args(tmp_path / "output", f"model.checkpoint={tmp_path / 'other.pth'}"))
    assert "missing (pos_embed, " in message
    assert "1 unexpected (fc.weight)" in message


def test_checkpoint_that_is_none(tmp_path, validate, error):
    for content in (b"", b"no checkpoint"):
        (tmp_path / "x.pth").write_bytes(content)
        assert f"{tmp_path / 'x.pth'} is not a checkpoint" in error(validate, ["--checkpoint", str(tmp_path / "x.pth")])
    for value in ([1, 2], {"a": 1}, {}):
        torch.save(value, tmp_path / "x.pth")
        argv = ["--checkpoint", str(tmp_path / "x.pth"), "--model", "test_vrwkv"]
        assert f"{tmp_path / 'x.pth'} is not a checkpoint" in error(validate, argv)


def test_checkpoint_that_would_run_code(tmp_path, predict, error):
    torch.save({"state_dict": test_checkpoint_that_is_none}, tmp_path / "x.pth")
    argv = ["x.png", "--checkpoint", str(tmp_path / "x.pth")]
    assert "is not a checkpoint that can be read safely: it asks for " in error(predict, argv)


def test_other_model_than_the_checkpoints(run, validate, error):
    argv = ["--checkpoint", str(run / "best.pth"), "--model", "resnet18"]
    assert "holds test_vrwkv, not resnet18" in error(validate, argv)


def test_no_model_and_no_checkpoint(validate, error):
    assert "required: --checkpoint PATH, or --model NAME" in error(validate, ["--model", "test_vrwkv"])


def test_checkpoint_with_other_classes(data_root, tmp_path, validate, error):
    torch.save(timm.create_model("test_vrwkv", num_classes=7).state_dict(), tmp_path / "x.pth")
    argv = ["--checkpoint", str(tmp_path / "x.pth"), "--model", "test_vrwkv", "--data-root", str(data_root)]
    message = error(validate, argv)
    assert "head.weight (7, 32) for (1000, 32)" in message


def test_bad_pictures_do_not_stop_the_others(run, data_root, tmp_path, predict, capsys):
    good = data_root / "val" / "red" / "0.png"
    bad, absent = tmp_path / "bad.png", tmp_path / "absent.png"
    shutil.copy(good, bad)
    bad.write_bytes(bad.read_bytes()[:200])
    argv = [str(bad), str(good), str(absent), "--checkpoint", str(run / "best.pth"), "--json"]
    assert predict(argv) == 1
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [list(result) for result in results] == [["image", "error"], ["image", "predictions"], ["image", "error"]]
    assert f"error: cannot read image {bad}: " in captured.err
    assert f"error: image {absent} does not exist" in captured.err


def test_without_pydantic(subprocess_environment):
    """`import vrwkv` does not need it; a script of this folder names in one line what to install."""
    program = (
        "import runpy, sys\n"
        "import vrwkv\n"
        "assert 'pydantic' not in sys.modules\n"
        "sys.modules['pydantic'] = None\n"
        "sys.argv = ['train.py']\n"
        f"runpy.run_path({str(REPOSITORY / 'tools' / 'train.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], env=subprocess_environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: vrwkv.classification needs pydantic: pip install 'vrwkv[train]'\n"
