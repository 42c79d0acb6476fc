"""A network on quantised JPEG coefficients, exported for any batch size, saved, loaded, and compared with itself."""

import tempfile
from pathlib import Path

import fourfold as ff
import torch
from torch import Tensor


class Net(torch.nn.Module):
    """int16 blocks [B, h, w, 64] and one quantisation table per image [B, 64] to 10 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.freqs = ff.zigzag()[:24].tolist()
        self.register_buffer("mean", torch.zeros(24))
        self.register_buffer("std", torch.full((24,), 100.0))
        self.head = torch.nn.Sequential(
            torch.nn.Conv2d(24, 32, 3),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(32, 10),
        )

    def forward(self, coefs: Tensor, qtables: Tensor) -> Tensor:
        """[B, h, w, 64] and [B, 64] -> [B, 10]."""
        return self.head(ff.dct_normalize(coefs, qtables, mean=self.mean, std=self.std, freqs=self.freqs))


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Random coefficients and tables."""
    return torch.randint(-50, 50, (size, 28, 28, 64), dtype=torch.int16), torch.randint(1, 99, (size, 64))


torch.manual_seed(0)
net = Net().eval()
dynamic = {0: torch.export.Dim("batch")}
program = torch.export.export(net, batch(2), dynamic_shapes=(dynamic, dynamic))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "net.pt2"
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()  # wherever it is loaded, `import fourfold` must have run before

for size in (2, 5):
    x = batch(size)
    difference = (loaded(*x) - net(*x)).abs().max().item()
    print(f"batch of {size}: the exported program differs by {difference:.1g}")
