"""Operators of Vision-RWKV: each takes the native kernel of the tensor's device, or pure torch where there is none."""

from vrwkv.ops._bi_wkv import bi_wkv
from vrwkv.ops._extension import use_backend
from vrwkv.ops._gating import sigmoid_gate, squared_relu
from vrwkv.ops._low_rank import low_rank, low_rank_mix
from vrwkv.ops._norm_gate import norm_gate
from vrwkv.ops._q_shift import q_shift, q_shift_mix
from vrwkv.ops._wkv6 import wkv6

__all__ = [
    "bi_wkv",
    "low_rank",
    "low_rank_mix",
    "norm_gate",
    "q_shift",
    "q_shift_mix",
    "sigmoid_gate",
    "squared_relu",
    "use_backend",
    "wkv6",
]
