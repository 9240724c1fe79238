"""Which convolutions have wrong gradients in which layout, against float64; the reason for core/nets/layout.py.

Each case runs in a process of its own, because the worst of them corrupt the heap. Two cores, about 12 minutes:

    python bench/convolutions.py
    ONEDNN_MAX_CPU_ISA=AVX2 python bench/convolutions.py
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LIMITS = {"float32": 1e-5, "bfloat16": 3e-2}  # of the largest gradient
PASSES = 12  # the fault shows after some


def cases() -> Iterator[dict[str, Any]]:
    """Plain, depthwise, grouped and transposed convolutions, around the sizes of vector blocks."""
    dtypes = ("float32", "bfloat16")
    for channels, stride, kernel, dtype in itertools.product(range(1, 18), (1, 2), (1, 3), dtypes):
        for outputs in (8, 16) if kernel == 1 and stride == 2 else (8,):
            yield {"channels": channels, "outputs": outputs, "kernel": kernel, "stride": stride, "dtype": dtype}
    for channels, stride, kernel in itertools.product((2, 4, 8, 16), (1, 2), (1, 3)):
        yield {"channels": channels, "kernel": kernel, "stride": stride, "layout": "contiguous"}
    for channels, kernel, dtype in itertools.product((2, 4, 6, 8, 12, 16), (1, 3), dtypes):
        yield {"channels": channels, "outputs": channels, "kernel": kernel, "groups": channels, "dtype": dtype}
        yield {"channels": channels, "outputs": 2 * channels, "kernel": kernel, "groups": 2, "dtype": dtype}
        yield {"channels": channels, "kernel": kernel, "kind": "transposed", "dtype": dtype}
        yield {"channels": channels, "kernel": kernel, "dtype": dtype, "wanted": "input"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution, its arithmetic, and whose gradient is wanted."""

    channels: int
    kernel: int
    outputs: int = 8
    stride: int = 2
    dtype: str = "float32"
    layout: str = "channels-last"
    groups: int = 1
    kind: str = "conv"
    wanted: str = "both"

    def make(self) -> nn.Module:
        """The layer with random weights."""
        layer = {"conv": nn.Conv2d, "transposed": nn.ConvTranspose2d}[self.kind]
        options: dict[str, Any] = {"stride": self.stride, "padding": self.kernel // 2, "groups": self.groups}
        return layer(self.channels, self.outputs, self.kernel, bias=False, **options)


def measure(case: Case) -> float:
    """The largest difference of a gradient from that in float64, as a share of the largest gradient."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    exact, conv = case.make().double(), case.make()
    conv.load_state_dict(exact.state_dict())
    x = torch.rand(64, case.channels, 8, 8)
    if case.layout == "channels-last":
        conv, x = conv.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    conv.requires_grad_(case.wanted == "both")
    exact.requires_grad_(case.wanted == "both")
    weight = torch.randn(exact(x.double()).shape)
    want = _gradients(exact, x.double(), weight.double(), "float64")
    worst = 0.0
    for _ in range(PASSES):
        for mine, theirs in zip(_gradients(conv, x, weight, case.dtype), want, strict=True):
            worst = max(worst, float((mine.double() - theirs).abs().max() / theirs.abs().max()))
    return worst


def _gradients(conv: nn.Module, x: Tensor, weight: Tensor, dtype: str) -> list[Tensor]:
    conv.zero_grad()
    pixels = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        out = conv(pixels)
    (out.to(weight.dtype) * weight).sum().backward()
    found = [pixels.grad, *(part.grad for part in conv.parameters() if part.requires_grad)]
    return [gradient for gradient in found if gradient is not None]


def judge(case: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A case, and how it went: "" where its gradients are right."""
    run = subprocess.run([sys.executable, __file__, json.dumps(case)], capture_output=True, text=True, check=False)
    if run.returncode:
        return case, f"crash ({run.returncode})"
    apart = float(run.stdout)
    return case, "" if apart <= LIMITS[case.get("dtype", "float32")] else f"wrong by {apart:.1%}"


def main() -> None:
    """Judge every case, and print those that went wrong."""
    with ThreadPoolExecutor(2) as pool:
        judged = list(pool.map(judge, cases()))
    wrong = [(case, fault) for case, fault in judged if fault]
    for case, fault in wrong:
        print(", ".join(f"{name} {value}" for name, value in case.items()), "->", fault)
    print(f"{len(wrong)} of {len(judged)} cases are wrong")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(Case(**json.loads(sys.argv[1]))))
    else:
        main()
