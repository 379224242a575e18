"""Peak rates of accelerators, by the name that the driver gives."""

from collections.abc import Mapping

PEAK_BF16_TFLOPS: Mapping[str, float] = {
    # Dense tensor-core rates of NVIDIA's data sheets, without sparsity.
    "A100": 312.0,
    "A800": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    "H20": 148.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
}


def peak_bf16_tflops(device_name: str) -> float | None:
    """Of the longest known name in `device_name`; None: unknown."""
    known = [name for name in PEAK_BF16_TFLOPS if name in device_name]
    return PEAK_BF16_TFLOPS[max(known, key=len)] if known else None
