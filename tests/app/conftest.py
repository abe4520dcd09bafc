"""Models whose predictions are known: random weights, and a last layer that is fitted to what the pictures show."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from support.colours import CLASSES, half_and_half, picture
from support.small_segmentors import write_detail_config

import vrwkv  # noqa: F401 # registers the models

if importlib.util.find_spec("gradio") is None:
    collect_ignore_glob = ["test_*.py"]


def fitted(features: torch.Tensor, targets: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (classes, C) and biases (classes,) of least squares for features (N, C) and targets (N,)."""
    ones = torch.nn.functional.pad(features.double(), (0, 1), value=1.0)
    wanted = 20 * torch.nn.functional.one_hot(targets, classes).double()
    gram = ones.T @ ones + 1e-3 * torch.eye(ones.shape[1])
    solution = torch.linalg.solve(gram, ones.T @ wanted).float()  # (C + 1, classes)
    return solution[:-1].T.contiguous(), solution[-1]


@pytest.fixture(scope="session")
def classifier_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a VRWKV that tells blue, green and red."""
    torch.manual_seed(0)
    args = dict(img_size=32, patch_size=8, num_classes=len(CLASSES))
    model = timm.create_model("test_vrwkv", **args).eval()
    pictures = [picture(colour, seed).resize((32, 32)) for colour in CLASSES.values() for seed in range(8)]
    images = torch.stack([torch.from_numpy(np.asarray(each) / 127.5 - 1).float().permute(2, 0, 1) for each in pictures])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        weight, bias = fitted(features, torch.arange(3).repeat_interleave(8), 3)
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    data = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0,
                crop_mode="squash")  # fmt: skip
    path = tmp_path_factory.mktemp("classifier") / "best.pth"
    content = {"arch": "test_vrwkv", "model_args": args, "class_names": list(CLASSES), "data_config": data}
    torch.save({**content, "model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def segmentor_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Config and checkpoint of a segmentor that tells blue (class 1), green (2) and red (3)."""
    pytest.importorskip("mmseg")
    from vrwkv.segmentation import load_segmentor, segment

    folder = tmp_path_factory.mktemp("segmentor")
    config, checkpoint = folder / "config.py", folder / "weights.pth"
    write_detail_config(config, size=64, width=8)
    from mmseg.apis import init_model

    torch.manual_seed(0)
    torch.save({"state_dict": init_model(str(config), device="cpu").state_dict(), "meta": {}}, checkpoint)
    model = load_segmentor(config, checkpoint)
    features, targets, names = [], [], list(CLASSES)
    pairs = [(left, right) for left in names for right in names]

    def remember(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:  # (1, C, some rows, W) each time
        height, width = args[0].shape[2:]
        left = torch.arange(width).repeat(height) * 96 // width < 32
        features.append(args[0][0].flatten(1).T)
        targets.append(torch.where(left, *(names.index(each) + 1 for each in pair)))

    hook = model.decode_head.conv_seg.register_forward_pre_hook(remember)
    for seed, pair in enumerate(pairs):  # remember() reads it
        segment(model, half_and_half(*pair, seed))
    hook.remove()
    weight, bias = fitted(torch.cat(features), torch.cat(targets), 11)
    content = torch.load(checkpoint)
    content["state_dict"]["decode_head.conv_seg.weight"] = weight[:, :, None, None]
    content["state_dict"]["decode_head.conv_seg.bias"] = bias
    torch.save(content, checkpoint)
    return config, checkpoint
