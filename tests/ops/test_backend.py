"""vrwkv.ops.use_backend: the choice between the compiled and the pure-torch ops, in eager and in compiled code."""

import pytest
import torch
from torch import Tensor

from vrwkv.ops import _extension, bi_wkv, q_shift, q_shift_mix, sigmoid_gate, squared_relu, use_backend, wkv6

pytestmark = pytest.mark.skipif("cpu" not in _extension.NATIVE_DEVICES, reason="the compiled ops are not built")


def all_ops(x: Tensor) -> Tensor:
    mix = torch.full_like(x[0, 0], 0.3)
    x = q_shift(x, (2, 3)) + q_shift_mix(x, [mix], (2, 3))[0]
    heads = x.unflatten(-1, (2, 4))
    y = bi_wkv(mix, mix, x, x) + wkv6(heads, heads, heads, heads, heads[0, 0]).flatten(-2)
    return sigmoid_gate(squared_relu(x), y)


def kernels_in(function, x: Tensor) -> set[str]:
    """The ops of this package that the dispatcher sees."""

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "vrwkv":
                names.add(op._opname)
            return op(*args, **(kwargs or {}))

    names: set[str] = set()
    with Seen():
        function(x)
    return names


ALL = {"bi_wkv", "q_shift", "q_shift_mix", "sigmoid_gate", "squared_relu", "wkv6"}


def test_chooses_for_every_op():
    x = torch.randn(2, 6, 8)
    assert kernels_in(all_ops, x) == ALL
    with use_backend("torch"):
        assert kernels_in(all_ops, x) == set()
        expected = all_ops(x)
    torch.testing.assert_close(all_ops(x), expected)


def test_nests_and_is_restored_after_errors():
    x = torch.empty(0)
    with use_backend("torch"):
        with use_backend("auto"):
            assert _extension.is_native(x)
            with pytest.raises(KeyError), use_backend("torch"):
                assert not _extension.is_native(x)
                raise KeyError
            assert _extension.is_native(x)
        assert not _extension.is_native(x)
    assert _extension.is_native(x)


def test_an_unknown_backend_changes_nothing():
    with pytest.raises(ValueError, match="backend must be one of auto, torch, got 'cuda'"), use_backend("cuda"):
        pass
    assert _extension.is_native(torch.empty(0))


def test_compiled_code_follows_the_choice():
    torch._dynamo.reset()
    graphs: list[set[str]] = []

    def record(module, inputs):
        graphs.append({str(node.target).split(".")[1] for node in module.graph.nodes if "vrwkv." in str(node.target)})
        return module.forward

    compiled = torch.compile(all_ops, backend=record, fullgraph=True)
    x = torch.randn(2, 6, 8)
    expected = all_ops(x)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
        with use_backend("torch"):
            torch.testing.assert_close(compiled(x), expected)
    assert graphs == [ALL, set()]  # one for each backend, taken again the second time


def test_the_choice_may_stand_in_compiled_code():
    torch._dynamo.reset()

    def both(x):
        with use_backend("torch"):
            y = all_ops(x)
        return y, all_ops(x)

    x = torch.randn(2, 6, 8)
    for y in torch.compile(both, backend="eager", fullgraph=True)(x):
        torch.testing.assert_close(y, all_ops(x))
    assert _extension.is_native(x)
