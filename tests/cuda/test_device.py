"""The kernels and models on a real CUDA device; tests/ops run there too. Skipped where there is none."""

import pytest
import timm
import torch
from support import wkv6_cases
from support.bi_wkv_cases import NAMES, REGIMES, make_case
from support.tolerances import BACKWARD, FORWARD, assert_close

import vrwkv  # noqa: F401
from vrwkv.ops import _extension, bi_wkv, q_shift, q_shift_mix, wkv6

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def kernels():
    if "cuda" not in _extension.NATIVE_DEVICES:
        pytest.fail("the CUDA kernels are not built: `VRWKV_CUDA=1 pip install . --no-build-isolation`")


@pytest.fixture(autouse=True)
def whole_convolutions():
    """Torch's default rounds the inputs of convolutions, the patch embedding among them, to 11 bits (TF32)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def random_inputs(batch, tokens, channels, dtype=torch.float32, device="cuda"):
    generator = torch.Generator(device).manual_seed(0)
    w = torch.linspace(-5, 3, channels, device=device) / tokens
    u, k, v = (
        torch.randn(shape, generator=generator, device=device)
        for shape in ((channels,), (batch, tokens, channels), (batch, tokens, channels))
    )
    return [w, u / tokens, k.to(dtype), v.to(dtype)]


def apply_all(w, u, k, v, grid):
    """Every op on these inputs; wkv6 has heads of 16 channels."""
    r, d, b = (x.unflatten(-1, (-1, 16)) for x in (v, k, u))
    return [bi_wkv(w, u, k, v), q_shift(k, grid), *q_shift_mix(v, [w, u], grid), wkv6(r, d, r, d, b)]


def run_all(inputs, grid):
    """Outputs and gradients of every op on these inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = apply_all(*inputs, grid)
    grads = [torch.ones_like(y) * (1 + i) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 64), (1, 49, 192), (3, 196, 33), (1, 257, 16), (1, 1024, 9)])
def test_bi_wkv_against_the_reference(shape, regime, dtype):
    case = make_case(*shape, regime)
    grad, *inputs = (x.cuda().requires_grad_() for x in case.to(dtype))
    y = bi_wkv(*inputs)
    assert_close(y, case.y, FORWARD, dtype, scale=case.scales[0])
    gradients = torch.autograd.grad(y, inputs, grad)
    for name, actual, wanted, scale in zip(NAMES, gradients, case.gradients, case.scales[1:], strict=True):
        assert_close(actual, wanted, BACKWARD, dtype, scale=scale), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decays", wkv6_cases.DECAYS)
@pytest.mark.parametrize("shape", [(3, 1, 2, 8), (2, 2, 1, 40), (1, 31, 2, 64), (2, 196, 3, 64), (1, 257, 1, 80)])
def test_wkv6_against_the_reference(shape, decays, dtype):
    case = wkv6_cases.make_case(*shape, decays)
    grad, *inputs = (x.cuda().requires_grad_() for x in case.to(dtype))
    y = wkv6(*inputs)
    assert_close(y, case.y, FORWARD, dtype)
    gradients = torch.autograd.grad(y, inputs, grad)
    for name, actual, wanted in zip(wkv6_cases.NAMES, gradients, case.gradients, strict=True):
        assert_close(actual, wanted, BACKWARD, dtype, scale=max(wanted.abs().max().item(), 1.0)), name


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_same_bits_on_every_run(dtype):
    inputs = random_inputs(4, 1024, 192, dtype)
    first = run_all(inputs, (32, 32))
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run_all(inputs, (32, 32)), strict=True))


def test_runs_on_the_current_stream():
    inputs = random_inputs(2, 196, 192)
    expected = run_all(inputs, (14, 14))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = [torch.empty_like(x).copy_(x) for x in inputs]  # ready on this stream only after the sleep
        actual = run_all(late, (14, 14))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_runs_on_a_device_that_is_not_current():
    inputs = random_inputs(2, 196, 192)
    expected = run_all(inputs, (14, 14))
    actual = run_all([x.to("cuda:1") for x in inputs], (14, 14))
    assert all(x.device.index == 1 for x in actual)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, actual, strict=True))


def test_cuda_graph():
    inputs = random_inputs(2, 600, 192)  # more than one tile
    run_all(inputs, (20, 30))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all(inputs, (20, 30))
    for x in inputs[2:]:
        x.mul_(0.5)
    graph.replay()
    expected = run_all(inputs, (20, 30))
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_torch_compile():
    inputs = random_inputs(2, 196, 64)
    expected = run_all(inputs, (14, 14))

    inputs = [x.requires_grad_() for x in inputs]
    outputs = torch.compile(apply_all, fullgraph=True)(*inputs, (14, 14))
    gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(y) * (1 + i) for i, y in enumerate(outputs)])
    for actual, wanted in zip((*outputs, *gradients), expected, strict=True):
        assert_close(actual, wanted, BACKWARD, torch.float32)


def test_more_elements_than_an_int_holds():
    batch, tokens, channels = 5, 2**22, 112  # 2^31.1 elements
    needed = 5 * batch * tokens * channels * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    w, u = torch.linspace(-5, 3, channels, device="cuda") / tokens, torch.zeros(channels, device="cuda")
    k = torch.zeros(batch, tokens, channels, device="cuda", dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    k[-1, :, :], v[-1, :, :] = torch.randn(2, tokens, channels, device="cuda").bfloat16()
    y = bi_wkv(w, u, k, v)
    assert torch.equal(y[-1:], bi_wkv(w, u, k[-1:], v[-1:])) and not y[0].any()
    del y
    shifted = q_shift(v, (2048, 2048))
    assert torch.equal(shifted[-1:], q_shift(v[-1:], (2048, 2048)))
    del shifted
    grad_k, grad_v = torch.ops.vrwkv._bi_wkv_backward(v, w, u, k, v)[2:]
    last = torch.ops.vrwkv._bi_wkv_backward(v[-1:], w, u, k[-1:], v[-1:])[2:]
    assert torch.equal(grad_k[-1:], last[0]) and torch.equal(grad_v[-1:], last[1])


def test_tensors_of_another_device_are_refused():
    w, u, k, v = random_inputs(1, 4, 8)
    with pytest.raises(RuntimeError, match="v must be on the device of k, cuda:0, got cpu"):
        bi_wkv(w, u, k, v.cpu())
    with pytest.raises(RuntimeError, match="v must be on the device of k, cpu, got cuda:0"):
        bi_wkv(w, u, k.cpu(), v)
    with pytest.raises(RuntimeError, match=r"mixes\[0\] must be on the device of x, cuda:0, got cpu"):
        q_shift_mix(k, [w.cpu()], (2, 2))


@pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_model_matches_the_cpu(size, name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(2, 3, *size)
    expected = model(images)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    actual = model(images.cuda())
    actual.square().sum().backward()
    assert_close(actual, expected.detach(), {torch.float32: 1e-4}, torch.float32)
    for name, p in model.named_parameters():
        scale = max(gradients[name].abs().max().item(), 1e-3)
        assert_close(p.grad, gradients[name], {torch.float32: 1e-2}, torch.float32, scale=scale), name


@pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_trains_under_autocast(dtype, name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).cuda()
    images = torch.randn(4, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        loss = torch.nn.functional.cross_entropy(model(images), torch.arange(4, device="cuda"))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
