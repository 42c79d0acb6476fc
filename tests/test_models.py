"""ResNet-50 on pixels and on coefficients: what they compute, what they cost, and what a backbone gives them."""

from __future__ import annotations

import copy
import io
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import fourfold as ff
import pytest
import torch
import torch.nn.functional as F
from fourfold import models
from fourfold.models import VARIANTS, Bottleneck, dct_resnet50, resnet50
from torch import Tensor, nn

ALIKE = ("upsampling_rfa", "late_concat", "late_concat_rfa")  # to others, for what costs more than it can show on them
SOME_SLOW = [pytest.param(v, marks=pytest.mark.slow) if v in ALIKE else v for v in VARIANTS]
BLOCKS = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coefficients(h: int, w: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """y and cbcr of a 4:2:0 image of 8h x 8w pixels."""
    return randn(batch, 64, h, w, dtype=dtype), randn(batch, 128, (h + 1) // 2, (w + 1) // 2, seed=2, dtype=dtype)


def lived_in(model: nn.Module) -> nn.Module:
    """With batch norms as after training: other gains, shifts and statistics in each."""
    random = torch.Generator().manual_seed(3)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value, low, high in ((norm.weight, 0.5, 1), (norm.bias, -0.2, 0.2)):
                if value is not None:
                    nn.init.uniform_(value, low, high, generator=random)
            norm.running_mean.uniform_(-0.3, 0.3, generator=random)
            norm.running_var.uniform_(0.5, 2, generator=random)
    return model


@cache
def backbone(stride_in_1x1: bool = False) -> nn.Module:
    """Shared by tests that do not change it."""
    torch.manual_seed(0)
    return lived_in(resnet50(stride_in_1x1=stride_in_1x1)).eval()


@cache
def network(variant: str) -> Any:
    """Shared by tests that do not change it."""
    torch.manual_seed(0)
    return lived_in(dct_resnet50(variant, 10)).eval()


def with_stride_in_3x3(variant: str) -> Any:
    """The same weights at the other place of the strides."""
    with torch.device("meta"):
        model = dct_resnet50(variant, 10, stride_in_1x1=False).eval()
    model.load_state_dict(network(variant).state_dict(), assign=True)
    return model


def assert_refused(error: type[Exception], message: str, call: Any) -> None:
    """Word for word."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# ---- the definition, from a state_dict -----------------------------------------------------------------------------------


class Definition:
    """The networks written down once more, as functions of named tensors."""

    def __init__(self, model: Any) -> None:
        self.tensors = {name: value.clone() if value.dim() < 2 else value for name, value in model.state_dict().items()}
        self.training, self.in_1x1 = model.training, model.stride_in_1x1

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.tensors.get(f"{name}.{k}") for k in ("running_mean", "running_var", "weight", "bias")
        )  # fmt: skip
        return F.batch_norm(x, mean, var, weight, bias, training=self.training)

    def conv(self, name: str, norm: str, x: Tensor, stride: int = 1, padding: tuple[int, ...] = (0, 0, 0, 0)) -> Tensor:
        return self.norm(norm, F.conv2d(F.pad(x, padding), self.tensors[f"{name}.weight"], stride=stride))

    def block(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        first, middle = (stride, 1) if self.in_1x1 else (1, stride)
        kernel = self.tensors[f"{name}.conv2.weight"].shape[-1]
        padding = {1: (0, 0, 0, 0), 2: (0, 1, 0, 1), 3: (1, 1, 1, 1)}[kernel]
        out = self.conv(f"{name}.conv1", f"{name}.bn1", x, first).relu()
        out = self.conv(f"{name}.conv2", f"{name}.bn2", out, middle, padding).relu()
        out = self.conv(f"{name}.conv3", f"{name}.bn3", out)
        if f"{name}.downsample.0.weight" in self.tensors:
            x = self.conv(f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
        else:
            assert stride == 1
        return (out + x).relu()

    def layer(self, name: str, x: Tensor, stride: int = 1, blocks: range | None = None) -> Tensor:
        for i in blocks or range(BLOCKS[name]):
            x = self.block(f"{name}.{i}", x, stride if i == 0 else 1)
        return x

    def head(self, x: Tensor) -> Tensor:
        return F.linear(self.layer("layer4", x, 2).mean((2, 3)), self.tensors["fc.weight"], self.tensors["fc.bias"])

    def on_pixels(self, x: Tensor) -> Tensor:
        x = self.conv("conv1", "bn1", x, 2, (3, 3, 3, 3)).relu()
        x = self.layer("layer1", F.max_pool2d(x, 3, 2, 1))
        return self.head(self.layer("layer3", self.layer("layer2", x, 2), 2))

    def rfa(self, x: Tensor) -> Tensor:
        for i in range(3):
            assert self.tensors[f"rfa.{i}.conv2.weight"].shape[-1] == i + 1
            x = self.block(f"rfa.{i}", x)
        return x

    def on_coefficients(self, variant: str, y: Tensor, cbcr: Tensor) -> Tensor:
        def doubled(x: Tensor) -> Tensor:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : y.shape[2], : y.shape[3]]

        if variant in ("upsampling", "upsampling_rfa", "deconvolution_rfa"):
            if variant == "deconvolution_rfa":
                parts = zip(cbcr.chunk(2, 1), ("deconv_cb.weight", "deconv_cr.weight"), strict=True)
                # [B, in, h, w] and [in, out, 2, 2]: each input position is a patch of its own
                patches = [torch.einsum("bihw,iouv->bohuwv", part, self.tensors[name]) for part, name in parts]
                chroma = torch.cat([p.flatten(2, 3).flatten(3, 4) for p in patches], 1)[..., : y.shape[2], : y.shape[3]]
            else:
                chroma = doubled(cbcr)
            x = self.norm("bn", torch.cat([y, chroma], 1))
            x = x if variant == "upsampling" else self.rfa(x)
            return self.head(self.layer("layer3", self.layer("layer2", x), 2))
        if variant == "downsampling":
            y = F.pad(self.norm("bn_y", y), (0, y.shape[3] % 2, 0, y.shape[2] % 2))
            y = F.conv2d(y, self.tensors["conv_y.weight"], stride=2)
            x = torch.cat([y, self.norm("bn_cbcr", cbcr)], 1)
            return self.head(self.layer("layer3", self.layer("layer2", x)))
        if variant == "dct24":
            y = self.norm("bn_y", torch.stack([y[:, 8 * u + v] for u in range(4) for v in range(4)], 1))
            chosen = [cbcr[:, 64 * c + 8 * u + v] for c in range(2) for u in range(2) for v in range(2)]
            x = torch.cat([y, doubled(self.norm("bn_cbcr", torch.stack(chosen, 1)))], 1)
            return self.head(self.layer("layer3", self.layer("layer2", self.layer("layer1", x), 2), 2))
        y = self.norm("bn_y", y)
        y = y if variant == "late_concat" else self.rfa(y)
        y = self.block("halve_y", self.layer("layer2", y), 2)
        x = torch.cat([y, self.block("block_cbcr", self.norm("bn_cbcr", cbcr))], 1)
        return self.head(self.layer("layer3", x, blocks=range(1, 6)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_resnet50_is_its_definition(stride_in_1x1, training):
    model = copy.deepcopy(backbone(stride_in_1x1)).train(training)
    definition = Definition(model)
    x = randn(2, 3, 65, 38)  # layer4: 3 x 2
    torch.testing.assert_close(model(x), definition.on_pixels(x), rtol=1e-5, atol=1e-5)
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, definition.tensors[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_its_definition(variant):
    """At even and odd sizes, down to one block."""
    for model, h, w in ((network(variant), 6, 8), (network(variant), 1, 1), (with_stride_in_3x3(variant), 5, 7)):
        y, cbcr = coefficients(h, w)
        with torch.no_grad():
            actual, expected = model(y, cbcr), Definition(model).on_coefficients(variant, y, cbcr)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_state_dict_of_resnet50():
    """Names and shapes as torchvision's, which need not be installed."""
    shapes = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name: str, channels: int) -> None:
        fields = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"{name}.{field}": (channels,) for field in fields} | {f"{name}.num_batches_tracked": ()})

    norm("bn1", 64)
    channels = 64
    for i, (layer, blocks) in enumerate(BLOCKS.items()):
        width = 64 * 2**i
        for j in range(blocks):
            sizes = [("1", (width, channels, 1, 1)), ("2", (width, width, 3, 3)), ("3", (4 * width, width, 1, 1))]
            for k, shape in sizes:
                shapes[f"{layer}.{j}.conv{k}.weight"] = shape
                norm(f"{layer}.{j}.bn{k}", shape[0])
            if j == 0:
                shapes[f"{layer}.{j}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                norm(f"{layer}.{j}.downsample.1", 4 * width)
            channels = 4 * width
    shapes |= {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    with torch.device("meta"):
        model = resnet50()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    assert list(model.state_dict()) == list(shapes)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_resnet50_is_torchvisions():
    """The same weights from the same seed, under the same names, and the same bits out."""
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision; run: pip install torchvision")
    torch.manual_seed(5)
    theirs = torchvision.models.resnet50(num_classes=12)
    torch.manual_seed(5)
    ours = resnet50(12)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    x = randn(2, 3, 64, 50)
    for training in (True, False, True):
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
        for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(a, b)


def test_weights_are_drawn_as_the_paper_does():
    """Normal, with 2 / fan-out as variance: convolutions of late_concat_rfa, deconvolutions."""
    torch.manual_seed(0)
    for variant in ("late_concat_rfa", "deconvolution_rfa"):
        for name, module in dct_resnet50(variant).named_modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                fan_out = module.weight[:, 0].numel()
                assert module.bias is None
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name


def test_kernel_of_two_looks_right_and_below():
    block = Bottleneck(2, 3, 2, kernel_size=2).double().eval()
    nn.init.constant_(block.bn1.bias, 9.0)  # so that no ReLU closes
    nn.init.constant_(block.bn2.bias, 9.0)
    nn.init.constant_(block.bn3.bias, 9.0)
    x = randn(1, 2, 5, 6, dtype=torch.float64).requires_grad_()
    for i, j in ((2, 3), (4, 5), (0, 0)):
        (seen,) = torch.autograd.grad(block(x)[0, :, i, j].sum(), x)
        rows, columns = seen[0].abs().sum(0).nonzero().T.tolist()
        assert set(rows) == {i, min(i + 1, 4)}
        assert set(columns) == {j, min(j + 1, 5)}


# ---- cost ----------------------------------------------------------------------------------------------------------------


def multiply_adds(model: nn.Module, *inputs: Tensor) -> int:
    """Of convolutions and linear layers."""
    counts = []

    def count(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        positions = (args[0] if isinstance(layer, nn.ConvTranspose2d) else out).numel()
        counts.append(positions * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            layer.register_forward_hook(count)
    model(*inputs)
    return sum(counts)


@cache
def cost(variant: str, stride_in_1x1: bool) -> tuple[int, int]:
    """Parameters and multiply-adds at 1000 classes and 224 x 224 pixels, dct24 at 448 x 448. Meta tensors cost nothing."""
    with torch.device("meta"):
        if variant == "resnet50":
            model: Any = resnet50(stride_in_1x1=stride_in_1x1)
            inputs = (torch.empty(1, 3, 224, 224),)
        else:
            model = dct_resnet50(variant, stride_in_1x1=stride_in_1x1)
            h = 56 if variant == "dct24" else 28
            inputs = (torch.empty(1, 64, h, h), torch.empty(1, 128, h // 2, h // 2))
        return sum(p.numel() for p in model.parameters()), multiply_adds(model, *inputs)


@pytest.mark.parametrize(
    ("variant", "params", "gmac"),
    [
        ("resnet50", 25.6, 3.86),
        ("late_concat_rfa", 27.4, 5.11),
        ("late_concat_rfa_thinner", 25.9, 3.98),
        ("deconvolution_rfa", 28.4, 5.40),
    ],
)
def test_cost_is_the_published_one(variant, params, gmac):
    assert cost(variant, True) == pytest.approx((params * 1e6, gmac * 1e9), rel=0.005)


def test_cost_is_the_documented_one():
    number = r"(\d+\.\d+)"
    rows = re.findall(rf"^ +(\w+) +{number} M +{number} +{number} ", dct_resnet50.__doc__, re.M)
    assert [row[0] for row in rows] == list(VARIANTS)
    (itself,) = re.findall(rf"itself has {number} M, {number} and {number}\.", dct_resnet50.__doc__)
    for variant, *stated in (*rows, ("resnet50", *itself)):
        (params, with_1x1), (same, with_3x3) = cost(variant, True), cost(variant, False)
        assert params == same
        assert stated == [f"{params / 1e6:.1f}", f"{with_1x1 / 1e9:.2f}", f"{with_3x3 / 1e9:.2f}"]
    assert {"25.6", "4.09", "3.86"} >= set(re.findall(r"\d\d?\.\d+", resnet50.__doc__.split("version")[0]))


# ---- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["resnet50", *SOME_SLOW])
def test_learns(variant):
    """Every parameter has a gradient that is not rounding noise, and a small step along it lowers the loss by what it says."""
    model = (resnet50(3) if variant == "resnet50" else dct_resnet50(variant, 3)).double()
    pixels = (randn(3, 3, 40, 48, dtype=torch.float64),)
    inputs = pixels if variant == "resnet50" else coefficients(6, 8, batch=3, dtype=torch.float64)
    target = torch.tensor([0, 2, 1])
    before = F.cross_entropy(model(*inputs), target)
    before.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.norm() < 1e-4] == []
    lr = 1e-4 / sum(p.grad.square().sum().item() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=lr).step()
    with torch.no_grad():
        assert (before - F.cross_entropy(model(*inputs), target)).item() == pytest.approx(1e-4, rel=0.2)


@pytest.mark.parametrize("variant", ["upsampling", "downsampling", "late_concat", "dct24"])
def test_needs_no_normalised_input(variant):
    """While it trains, any gain and shift of a frequency cancel."""
    model = copy.deepcopy(network(variant)).double().train()
    y, cbcr = (100 * x for x in coefficients(8, 10, batch=3, dtype=torch.float64))
    changed = [x * (1 + torch.rand(1, x.shape[1], 1, 1)) + 50 * torch.randn(1, x.shape[1], 1, 1) for x in (y, cbcr)]
    with torch.no_grad():
        torch.testing.assert_close(model(*changed), model(y, cbcr), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_learns_from_jpeg_files():
    """Three epochs of the example, from bytes to nine digits in ten; five reach 95 %."""
    for package in ("sklearn", "PIL"):
        pytest.importorskip(package, reason="needs scikit-learn and pillow; run: pip install scikit-learn pillow")
    if not ff.has_jpeg():
        pytest.skip("needs libjpeg, which this build was made without")
    script = Path(__file__).parents[1] / "examples" / "train_on_jpegs.py"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # on a busy machine two mostly wait for each other
    command = [sys.executable, str(script), "--epochs", "3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert result.returncode == 0, result.stderr
    last = re.fullmatch(r" +3 +\S+ +(\S+)% +\S+", result.stdout.splitlines()[-1])
    assert last, result.stdout
    assert float(last[1]) > 90


# ---- dct24 ---------------------------------------------------------------------------------------------------------------


def test_dct24_needs_sixteen_frequencies():
    model, (y, cbcr) = network("dct24"), coefficients(6, 5)
    freqs = list(model.freqs)
    both = cbcr.unflatten(1, (2, 64))[:, :, freqs].flatten(1, 2)
    with torch.no_grad():
        assert torch.equal(model(y[:, freqs], both), model(y, cbcr))
    assert [variant for variant in VARIANTS if network(variant).freqs is not None] == ["dct24"]


def test_dct24_takes_chroma_in_full():
    model, (y, cbcr) = network("dct24"), coefficients(6, 5)
    full = F.interpolate(cbcr, size=(6, 6))[..., :5]
    with torch.no_grad():
        assert torch.equal(model(y, full), model(y, cbcr))
        assert not torch.equal(model(y, full.roll(1, 2)), model(y, cbcr))


# ---- a backbone ----------------------------------------------------------------------------------------------------------

NEW_LAYERS = {
    "upsampling": ["layer2.0.bn1", "layer2.0.conv1", "layer2.0.downsample"],
    "upsampling_rfa": ["layer2.0.bn1", "layer2.0.conv1", "layer2.0.downsample", "rfa"],
    "deconvolution_rfa": ["deconv_cb", "deconv_cr", "layer2.0.bn1", "layer2.0.conv1", "layer2.0.downsample", "rfa"],
    "downsampling": ["conv_y", "layer2.0.bn1", "layer2.0.conv1", "layer2.0.downsample"],
    "late_concat": ["block_cbcr", "halve_y", "layer2.0.bn1", "layer2.0.conv1", "layer2.0.downsample"],
    "late_concat_rfa": ["block_cbcr", "halve_y", "layer2.0.bn1", "layer2.0.conv1", "layer2.0.downsample", "rfa"],
    "late_concat_rfa_thinner": ["block_cbcr", "halve_y", "layer2", "rfa"],
    "dct24": ["layer1.0.bn1", "layer1.0.conv1", "layer1.0.downsample"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbone_carries_over(variant):
    stride_in_1x1 = variant in ("late_concat", "downsampling")
    source = backbone(stride_in_1x1)
    before = copy.deepcopy(source.state_dict())
    model = dct_resnet50(variant, backbone=source)
    assert model.stride_in_1x1 == stride_in_1x1
    assert not model.training

    # The very same Parameters and statistics under the same names, and no others.
    theirs = dict(source.named_parameters()) | dict(source.named_buffers())
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    new = [name for name, value in ours.items() if theirs.get(name) is not value]
    assert {name for name in new if not name.startswith("bn")} == {
        name for name in ours if any(name.startswith(f"{layer}.") for layer in NEW_LAYERS[variant])
    }
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())

    with torch.no_grad():
        x = randn(2, 1024, 3, 4)
        assert torch.equal(model.layer4(x), source.layer4(x))
        assert torch.equal(model.layer3[-5:](x), source.layer3[-5:](x))
        y, cbcr = coefficients(4, 4)
        torch.testing.assert_close(model(y, cbcr), Definition(model).on_coefficients(variant, y, cbcr), rtol=1e-4, atol=1e-4)


def test_backbone_with_other_classes_dtype_and_mode():
    source = copy.deepcopy(backbone()).to(torch.bfloat16).train()
    source.layer4.requires_grad_(False)
    source.layer3[2].bn1.eps = 0.25
    model = dct_resnet50("late_concat", 7, backbone=source)
    assert model.fc.weight.shape == (7, 2048)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.layer4.parameters())
    assert model.layer2[0].conv1.weight.requires_grad
    assert model.layer3[1].bn1.eps == 0.25


def test_backbone_trains_along():
    source = copy.deepcopy(backbone()).train()
    kept = copy.deepcopy(source)
    model = dct_resnet50("upsampling", backbone=source)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*coefficients(4, 4)).square().mean().backward()
    optimizer.step()
    x = randn(2, 1024, 3, 4)
    for layer in (model.layer4.eval(), source.layer4.eval()):
        assert torch.equal(layer(x), model.layer4(x))
        assert not torch.equal(layer(x), kept.layer4.eval()(x))


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_backbone_of_another_package(package):
    module = pytest.importorskip(package, reason=f"needs {package}; run: pip install {package}")
    source = (module.models.resnet50() if package == "torchvision" else module.create_model("resnet50")).eval()
    lived_in(source)
    model = dct_resnet50("late_concat_rfa_thinner", backbone=source)
    assert not model.stride_in_1x1
    x = randn(2, 1024, 3, 4)
    assert torch.equal(model.layer4(model.layer3(x)), source.layer4(source.layer3[1:](x)))
    assert model.fc.weight is source.fc.weight


def changed(change: Any) -> nn.Module:
    with torch.device("meta"):
        model = resnet50()
    change(model)
    return model


def prune(model: nn.Module) -> None:
    from torch.nn.utils import prune as pruning

    pruning.identity(model.layer4[1].conv2, "weight")


@pytest.mark.parametrize(
    ("error", "problem", "source"),
    [
        (TypeError, "got dict", dict),
        (ValueError, "Linear has 0 blocks in layer1 instead of 3", lambda: nn.Linear(2, 2)),
        (ValueError, "ResNet has 5 blocks in layer3 instead of 6", lambda: changed(lambda m: m.layer3.pop(5))),
        (
            ValueError,
            "the strides of conv1 and conv2 where layer2, layer3 and layer4 begin are ['((1, 1), (1, 1))', '((1, 1), (2, 2))']",
            lambda: changed(lambda m: setattr(m.layer4[0].conv2, "stride", (1, 1))),
        ),
        (TypeError, "layer1.2.bn3 is a ReLU", lambda: changed(lambda m: setattr(m.layer1[2], "bn3", nn.ReLU()))),
        (TypeError, "layer2.0.downsample.1 is missing", lambda: changed(lambda m: m.layer2[0].downsample.pop(1))),
        (TypeError, "layer3.1.se is a Conv2d", lambda: changed(lambda m: setattr(m.layer3[1], "se", nn.Conv2d(1, 1, 1)))),
        (
            ValueError,
            "layer4.1.conv2.weight is missing, pruned or reparametrised, not of shape (512, 512, 3, 3)",
            lambda: changed(prune),
        ),
        (
            ValueError,
            "layer2.3.conv1.weight is of shape (256, 512, 1, 1), not of shape (128, 512, 1, 1)",
            lambda: changed(lambda m: setattr(m.layer2[3], "conv1", nn.Conv2d(512, 256, 1, bias=False))),
        ),
        (
            ValueError,
            "layer3.4.conv2 has dilation=(2, 2) instead of (1, 1)",
            lambda: changed(lambda m: setattr(m.layer3[4].conv2, "dilation", (2, 2))),
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_other_networks_are_no_backbones(error, problem, source):
    message = (
        f"dct_resnet50: backbone must be a torchvision-style ResNet-50, but {problem}; pass torchvision.models.resnet50() or "
        "ff.models.resnet50()"
    )
    assert_refused(error, message, lambda: dct_resnet50("late_concat", backbone=source()))


def test_stride_convention_against_the_backbone():
    message = (
        "dct_resnet50: stride_in_1x1=False was given, but the backbone has its strides in the 1×1 convolutions; leave the "
        "argument out"
    )
    assert_refused(ValueError, message, lambda: dct_resnet50("upsampling", backbone=backbone(True), stride_in_1x1=False))


# ---- wherever torch goes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("deconvolution_rfa", torch.bfloat16),
        ("late_concat_rfa_thinner", torch.float16),
        ("late_concat_rfa_thinner", torch.float64),
    ],
)
def test_dtypes(variant, dtype):
    """Against float32, within the rounding of some fifty layers."""
    y, cbcr = coefficients(4, 4)
    with torch.no_grad():
        expected = network(variant)(y, cbcr)
        actual = copy.deepcopy(network(variant)).to(dtype)(y.to(dtype), cbcr.to(dtype))
    assert actual.dtype == dtype
    allowed = 50 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps / 2
    assert (actual.float() - expected).norm() < allowed * expected.norm()


@pytest.mark.parametrize("variant", ["downsampling", "dct24"])
def test_autocast(variant):
    y, cbcr = coefficients(4, 4)
    with torch.no_grad():
        expected = network(variant)(y, cbcr)
        with torch.autocast("cpu", torch.bfloat16):
            actual = network(variant)(y, cbcr)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 50 * torch.finfo(torch.bfloat16).eps / 2 * expected.norm()


@pytest.mark.parametrize("variant", SOME_SLOW)
def test_channels_last(variant):
    y, cbcr = (x.contiguous(memory_format=torch.channels_last) for x in coefficients(5, 4))
    model = copy.deepcopy(network(variant)).to(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    model.layer4.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        torch.testing.assert_close(model(y, cbcr), network(variant)(y, cbcr), rtol=1e-4, atol=1e-4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_copies_and_files():
    source = network("late_concat")
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    loaded = dct_resnet50("late_concat", 10)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    y, cbcr = coefficients(4, 4)
    with torch.no_grad():
        for model in (loaded.eval(), copy.deepcopy(source)):
            assert torch.equal(model(y, cbcr), source(y, cbcr))


@pytest.mark.parametrize(
    "variant", [v if v == "late_concat" else pytest.param(v, marks=pytest.mark.slow) for v in ("resnet50", *VARIANTS)]
)
def test_compiles_in_one_graph(variant):
    torch.compiler.reset()
    model = backbone() if variant == "resnet50" else network(variant)
    inputs = (randn(1, 3, 40, 40),) if variant == "resnet50" else coefficients(5, 4, batch=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["deconvolution_rfa", "late_concat_rfa_thinner", "dct24"])
def test_compiles_with_inductor(variant):
    torch.compiler.reset()
    inputs = coefficients(5, 4)
    with torch.no_grad():
        actual = torch.compile(network(variant), fullgraph=True)(*inputs)
        torch.testing.assert_close(actual, network(variant)(*inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", [v if v == "downsampling" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_exports(variant):
    """Once for any number of images."""
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(network(variant), coefficients(5, 4), dynamic_shapes=(batch, batch)).module()
    y, cbcr = coefficients(5, 4, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(program(y, cbcr), network(variant)(y, cbcr), rtol=1e-4, atol=1e-4)


# ---- refusals ------------------------------------------------------------------------------------------------------------


def test_refuses_wrong_arguments():
    for build, name in ((resnet50, "resnet50"), (lambda *a, **k: dct_resnet50("upsampling", *a, **k), "dct_resnet50")):
        assert_refused(ValueError, f"{name}: num_classes must be 1 or more, got 0", lambda build=build: build(0))
        assert_refused(TypeError, f"{name}: num_classes must be an int, got 2.5", lambda build=build: build(2.5))
        message = f"{name}: stride_in_1x1 must be a bool, got 1"
        assert_refused(TypeError, message, lambda build=build: build(stride_in_1x1=1))
    assert_refused(
        ValueError, f"dct_resnet50: variant must be one of {VARIANTS}, got 'lateconcat'", lambda: dct_resnet50("lateconcat")
    )


Y = (
    "y must be planar coefficients [B, {}, h, w], got {}; ff.rgb_to_dct(rgb) gives y and cbcr, and ff.jpeg.DctDataset those of "
    "files"
)
CBCR = "cbcr must have shape {} beside y {}, got {}; pass the cbcr that came with y, of subsampling='4:2:0'"


@pytest.mark.parametrize(
    ("variant", "y", "cbcr", "problem"),
    [
        ("upsampling", (64, 4, 4), (128, 2, 2), Y.format("64", (64, 4, 4))),
        ("upsampling", (2, 4, 4, 64), (2, 2, 2, 128), Y.format("64", (2, 4, 4, 64))),
        ("downsampling", (2, 16, 4, 4), (2, 32, 2, 2), Y.format("64", (2, 16, 4, 4))),
        ("dct24", (2, 24, 4, 4), (2, 48, 2, 2), Y.format("64 or 16", (2, 24, 4, 4))),
        ("upsampling", (2, 64, 4, 4), (2, 128, 4, 4), CBCR.format((2, 128, 2, 2), (2, 64, 4, 4), (2, 128, 4, 4))),
        ("late_concat", (2, 64, 5, 4), (2, 128, 2, 2), CBCR.format((2, 128, 3, 2), (2, 64, 5, 4), (2, 128, 2, 2))),
        ("late_concat", (2, 64, 4, 4), (1, 128, 2, 2), CBCR.format((2, 128, 2, 2), (2, 64, 4, 4), (1, 128, 2, 2))),
        ("late_concat", (2, 64, 4, 4), (2, 64, 2, 2), CBCR.format((2, 128, 2, 2), (2, 64, 4, 4), (2, 64, 2, 2))),
        (
            "dct24",
            (2, 16, 4, 4),
            (2, 128, 2, 2),
            CBCR.format("(2, 32, 2, 2), or (2, 32, 4, 4)", (2, 16, 4, 4), (2, 128, 2, 2)),
        ),
    ],
)
def test_refuses_wrong_shapes(variant, y, cbcr, problem):
    call = lambda: network(variant)(torch.zeros(y), torch.zeros(cbcr))  # noqa: E731
    assert_refused(ValueError, f"dct_resnet50 {variant}: {problem}", call)


def test_refuses_wrong_types():
    y, cbcr = coefficients(2, 2)
    message = "dct_resnet50 late_concat: y must be float16, bfloat16, float32 or float64, got int16"
    assert_refused(TypeError, message, lambda: network("late_concat")(y.short(), cbcr))
    message = "dct_resnet50 late_concat: cbcr must be a Tensor, got NoneType"
    assert_refused(TypeError, message, lambda: network("late_concat")(y, None))
    message = "resnet50: x must be float16, bfloat16, float32 or float64, got uint8"
    assert_refused(TypeError, message, lambda: backbone()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
    message = "resnet50: x must be [B, 3, H, W], got (3, 32, 32); a single image needs x[None]"
    assert_refused(ValueError, message, lambda: backbone()(torch.zeros(3, 32, 32)))


def test_says_what_it_is():
    assert repr(network("dct24")).startswith("_DCT24(\n  'dct24', stride_in_1x1=True\n")
    assert isinstance(network("dct24"), models.DCTResNet)
