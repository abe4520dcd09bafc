"""What timm's users expect of every model, and what the constructor promises."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support.small_models import CONFIGS, create, every_family, every_model
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, group_parameters
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from vrwkv.ops import _extension


@torch.no_grad()
def enlarge_low_rank_matrices(model: nn.Module) -> None:
    """Of VRWKV6, whose initial values are too small to tell what depends on them."""
    for name, parameter in model.named_parameters():
        if name.endswith(("maa_w1", "maa_w2", "decay_w1", "decay_w2")):
            nn.init.normal_(parameter, std=0.05)


def loss_and_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(images).square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


# Registration


def test_registered_models() -> None:
    assert sorted(timm.list_models(module="vrwkv") + timm.list_models(module="vrwkv6")) == sorted(CONFIGS)


@every_model
def test_pretrained_config(name: str) -> None:
    tag, file, size, num_classes = CONFIGS[name]
    cfg = get_pretrained_cfg(name)
    assert (cfg.tag, cfg.hf_hub_filename, cfg.num_classes) == (tag, file, num_classes)
    assert cfg.hf_hub_id == (file and "OpenGVLab/Vision-RWKV")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.num_classes == num_classes
    assert isinstance(model.get_submodule(cfg.first_conv), nn.Conv2d)
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    data = resolve_model_data_config(model)
    assert data == dict(
        input_size=(3, size, size),
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=0.875,
        crop_mode="center",
    )


# Forward and backward


@every_model
def test_every_parameter_has_a_gradient(name: str, backend: str) -> None:
    model = create(name)
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 5)
    _, gradients = loss_and_gradients(model, images)
    for parameter, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), parameter


@every_model
def test_gradient_checkpointing_changes_nothing_but_recomputes(name: str) -> None:
    model = create(name)
    calls = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    images = torch.randn(2, 3, 64, 64)
    expected = loss_and_gradients(model, images)
    assert len(calls) == 1
    model.set_grad_checkpointing()
    torch.testing.assert_close(loss_and_gradients(model, images), expected, rtol=0, atol=0)
    assert len(calls) == 3
    model.set_grad_checkpointing(False)
    loss_and_gradients(model, images)
    assert len(calls) == 4


@every_family
def test_gradient_checkpointing_of_every_so_manieth_block(name: str) -> None:
    model = create(name, depth=5)
    calls = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    images = torch.randn(2, 3, 64, 64)
    expected = loss_and_gradients(model, images)
    for every, recomputed in ((1, [4, 3, 2, 1, 0]), (2, [4, 2, 0]), (3, [3, 0]), (5, [0])):
        calls.clear()
        model.set_grad_checkpointing(every=every)
        torch.testing.assert_close(loss_and_gradients(model, images), expected, rtol=0, atol=0)
        assert calls == [0, 1, 2, 3, 4, *recomputed]
    for every in (0, 6):
        with pytest.raises(ValueError, match=f"^every must be 1 to 5, which is the number of blocks, got {every}$"):
            model.set_grad_checkpointing(every=every)


@every_family
@torch.no_grad()
def test_image_is_padded_at_the_right_and_bottom(name: str) -> None:
    model = create(name).eval()
    images = torch.randn(2, 3, 50, 65)
    torch.testing.assert_close(model(images), model(F.pad(images, (0, 15, 0, 14))))


@pytest.mark.parametrize("size", [(64, 64), (32, 128), (80, 16), (5, 7), (200, 120)], ids=str)
@every_family
@torch.no_grad()
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    model = create(name, global_pool="").eval()
    nn.init.normal_(model.pos_embed)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, -(-size[0] // 16) * -(-size[1] // 16), 5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("img_size", [(96, 48), [96, 48], (90, 40)], ids=str)
@torch.no_grad()
def test_rectangular_img_size(img_size: Any) -> None:
    model = create(img_size=img_size).eval()
    nn.init.normal_(model.pos_embed)
    assert model.grid_size == (6, 3) and model.pos_embed.shape == (1, 18, 32)
    tokens = model.patch_embed(images := torch.randn(1, 3, 96, 48)).flatten(1, 2)
    first = model.blocks[0](model.ln0(tokens + model.pos_embed), (6, 3))
    torch.testing.assert_close(model.forward_intermediates(images, [0], output_fmt="NLC")[1][0], first)


@every_family
def test_empty_batch(name: str) -> None:
    assert create(name)(torch.randn(0, 3, 64, 64)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_vrwkv", {}),
        ("test_vrwkv", dict(post_norm=True, key_norm=True, init_values=1.0)),
        ("test_vrwkv6", {}),
        ("test_vrwkv6", dict(post_norm=True, init_values=1.0)),
    ],
    ids=str,
)
@torch.no_grad()
def test_low_precision(name: str, dtype: torch.dtype, args: dict[str, Any], backend: str) -> None:
    model = create(name, **args).eval()
    nn.init.normal_(model.pos_embed)
    enlarge_low_rank_matrices(model)
    images = torch.randn(2, 3, 80, 64)
    expected = model(images)
    with torch.autocast("cpu", dtype):
        mixed = model(images)
    converted = model.to(dtype)(images.to(dtype))
    assert mixed.dtype == converted.dtype == dtype
    for logits in (mixed, converted):
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())


@every_family
def test_backward_hooks_on_every_module(name: str, backend: str) -> None:
    model, images = create(name), torch.randn(2, 3, 64, 64, requires_grad=True)
    expected = loss_and_gradients(model, images)
    called = set()
    for path, module in model.named_modules():
        module.register_full_backward_hook(lambda *_, path=path: called.add(path))
    torch.testing.assert_close(loss_and_gradients(model, images), expected, rtol=0, atol=0)
    assert {"", "blocks.0.att.key", "blocks.2.ffn.key", "blocks.2.ffn.value"} <= called


@every_family
def test_same_bits_on_every_run(name: str, backend: str) -> None:
    torch.set_num_threads(4)
    model, images = create(name), torch.randn(2, 3, 320, 320)

    def run() -> list[torch.Tensor]:
        logits = model(images)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("args", [dict(drop_path_rate=0.6), dict(drop_rate=0.5)], ids=str)
def test_drop_rates_act_in_training_only(args: dict[str, float]) -> None:
    model = create(**args)
    images = torch.randn(4, 3, 64, 64)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_drop_path_rises_with_depth_until_both_mixes_are_dropped() -> None:
    model = create(drop_path_rate=1.0)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks] == [0, 0.5, 1]
    _, (_, second, third) = model.forward_intermediates(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(third, second, rtol=0, atol=0)


def kept_for_the_backward_pass(model: nn.Module, images: Tensor) -> int:
    """Bytes of all tensors that autograd keeps, parameters left out."""
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # which must live on, or its place would be taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


@pytest.mark.parametrize("name", ["vrwkv_tiny_patch16_224", "vrwkv6_tiny_patch16_224"])
def test_training_keeps_less_than_deit(name: str) -> None:
    if not _extension.NATIVE_DEVICES:
        pytest.skip("pure torch keeps what its many steps make")
    images = torch.randn(1, 3, 224, 224)
    ours, deit = (
        kept_for_the_backward_pass(timm.create_model(each, depth=3), images) for each in (name, "deit_tiny_patch16_224")
    )
    assert ours < deit
    assert (
        ours < (3 * 15 + 7) * 196 * 192 * 4
    )  # 15 tensors of all tokens in a block; images, ln0, norm and their statistics


# Head


@every_model
@torch.no_grad()
def test_head(name: str) -> None:
    model = create(name).eval()
    width = 48 if "large" in name else 32
    assert (model.num_features, model.head_hidden_size) == (32, width)
    features = model.forward_features(images := torch.randn(2, 3, 64, 64))
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, width)
    torch.testing.assert_close(model.head(before), model(images), rtol=0, atol=0)

    model.reset_classifier(7)
    assert model.num_classes == 7 and model(images).shape == (2, 7)
    model.reset_classifier(7, "")
    assert model(images).shape == (2, 16, 7)
    model.reset_classifier(0, "avg")
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    assert create(name, num_classes=0)(images).shape == (2, width)
    assert create(name, num_classes=0, global_pool="")(images).shape == (2, 16, width)


def test_new_classifier_keeps_dtype_device_and_mode() -> None:
    model = create().eval().to(torch.bfloat16)
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.bfloat16 and not model.head.training
    model.to("meta").reset_classifier(4)
    assert model.head.weight.is_meta


@torch.no_grad()
def test_logits_are_of_the_mean_token() -> None:
    model = create(head_hidden_size=24).eval()
    mean = model.forward_features(images := torch.randn(2, 3, 64, 64)).mean(1)
    expected = model.head(torch.tanh(model.pre_logits.fc(mean)))
    torch.testing.assert_close(model(images), expected)


# Input size


@torch.no_grad()
def test_set_input_size() -> None:
    model = create().eval()
    nn.init.normal_(model.pos_embed)
    expected = model(images := torch.randn(1, 3, 96, 32))
    model.set_input_size((96, 32))
    assert model.pos_embed.shape == (1, 12, 32) and model.pos_embed.requires_grad
    torch.testing.assert_close(model(images), expected)
    model.set_input_size(patch_size=8)
    assert model.grid_size == (12, 4) and model.pos_embed.shape == (1, 48, 32)
    assert model(images).isfinite().all()


# Training


@pytest.mark.parametrize(
    ("name", "args", "own"), [("test_vrwkv", dict(key_norm=True), 7), ("test_vrwkv6", {}, 14)], ids=str
)
def test_weight_decay_spares_what_is_no_matrix(name: str, args: dict[str, Any], own: int) -> None:
    """Nor the low-rank matrices of VRWKV6, which add to vectors."""
    model = create(name, depth=1, init_values=1.0, **args)
    spared = {name for name, _ in model.named_parameters() if ".spatial_" in name or ".time_" in name}
    assert model.no_weight_decay() == spared | {"pos_embed"} and len(spared) == own
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (name.endswith(".weight") and parameter.ndim > 1), name


def test_layer_groups() -> None:
    model = create(head_hidden_size=24)
    groups = group_parameters(model, model.group_matcher())
    names = [{name.split(".")[0] for name in groups[i]} for i in sorted(groups)]
    stem, blocks, head = {"pos_embed", "patch_embed"}, {"blocks"}, {"pre_logits", "head"}
    assert names == [stem, blocks | {"ln0"}, blocks, blocks | {"norm"}, head]
    assert {name.split(".")[1] for name in groups[2]} == {"1"}


# Constructor


@torch.no_grad()
def test_keywords_reach_the_model() -> None:
    model = timm.create_model("test_vrwkv", embed_dim=40, depth=4, img_size=64, post_norm=True, mlp_ratio=2)
    assert len(model.blocks) == 4 and model.blocks[0].ffn.key.weight.shape == (80, 40)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    images = torch.randn(1, 3, 64, 64)
    for kwargs in (dict(post_norm=True), dict(init_values=0.5)):
        torch.manual_seed(0)
        plain = create().eval()(images)
        torch.manual_seed(0)
        assert not torch.allclose(create(**kwargs).eval()(images), plain), kwargs


@pytest.mark.parametrize("mix", ["att", "ffn"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_vrwkv", dict(shift_pixel=2)),
        ("test_vrwkv", dict(channel_gamma=0.125)),
        ("test_vrwkv", dict(key_norm=True)),
        ("test_vrwkv6", dict(shift_pixel=2)),
        ("test_vrwkv6", dict(channel_gamma=0.125)),
        ("test_vrwkv6", dict(head_size=8)),
    ],
    ids=str,
)
@torch.no_grad()
def test_keywords_reach_both_mixes(mix: str, name: str, kwargs: dict[str, Any]) -> None:
    plain, changed = (create(name, **args).blocks[1].get_submodule(mix) for args in ({}, kwargs))
    values = plain.state_dict()
    if "head_size" in kwargs and mix == "att":
        values["time_faaaa"] = values["time_faaaa"].view(4, 8)
    changed.load_state_dict(values, strict=False)
    tokens = torch.randn(1, 16, 32)
    assert not torch.allclose(changed(tokens, (4, 4)), plain(tokens, (4, 4)))


@every_family
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(embed_dim=0), "embed_dim must be >= 1, got 0"),
        (dict(depth=0), "depth must be >= 1, got 0"),
        (dict(in_chans=0), "in_chans must be >= 1, got 0"),
        (dict(num_classes=-1), "num_classes must be >= 0, got -1"),
        (dict(img_size=(64, 0)), "img_size must be >= 1, got 0"),
        (dict(patch_size=0), "patch_size must be >= 1, got 0"),
        (dict(mlp_ratio=0), "mlp_hidden_width must be >= 1, got 0"),
        (dict(head_hidden_size=0), "head_hidden_size must be >= 1, got 0"),
        (dict(shift_pixel=-1), "shift_pixel must be >= 0, got -1"),
        (dict(channel_gamma=0.3), r"channel_gamma must lie in \[0, 1/4\].*got 0.3"),
        (dict(global_pool="token"), "global_pool must be 'avg' or '', got 'token'"),
    ],
    ids=str,
)
def test_bad_argument(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **kwargs)


@pytest.mark.parametrize("head_size", [0, -16, 24, 64])
def test_bad_head_size(head_size: int) -> None:
    with pytest.raises(ValueError, match=f"head_size must be >= 1 and divide embed_dim = 32, got {head_size}"):
        create("test_vrwkv6", head_size=head_size)


def test_device_and_dtype() -> None:
    model = create(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="num_heads"):
        create(num_heads=4)


def test_bad_reset() -> None:
    with pytest.raises(ValueError, match="global_pool must be 'avg' or '', got 'map'"):
        create().reset_classifier(5, "map")
