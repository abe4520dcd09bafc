"""How far a result may lie from the float64 reference, by dtype, relative to the largest reference value.

One table for every op, device and backend; it follows from the rounding of the dtype and is never widened for a kernel.
"""

import torch

FORWARD = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BACKWARD = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    tolerances: dict[torch.dtype, float],
    dtype: torch.dtype,
    scale: float | None = None,
) -> None:
    """Compare with ``tolerances[dtype] * scale``, ``scale`` the largest magnitude of ``expected`` unless given."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), "not finite"
    if scale is None:
        scale = expected.abs().max().item()
    error = (actual.double().cpu() - expected.double().cpu()).abs().max().item()
    limit = tolerances[dtype] * max(scale, 1e-6)
    assert error <= limit, f"error {error:.3g} > {limit:.3g} at {dtype}"
