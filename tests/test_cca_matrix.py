"""CKA of all pairs of layers on one batch: against the reference, against cka pair by pair, and wrong calls."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from battery import FLOATING, Refusal, assert_same, unreached_raises
from fourfold.ops import cca_matrix as module
from fourfold.ops.cca import cka
from fourfold.ops.cca_matrix import cka_matrix
from fourfold.reference import cca as reference
from test_cca import Largest
from torch import Tensor

F64 = torch.float64
#: n, widths: kernels, some of them of layers that are narrow; then a scatter matrix.
SHAPES = [(40, (300, 7, 50)), (90, (200, 500)), (130, (90, 80)), (5, (1, 9)), (200, (7, 9, 30)), (30, (10, 12, 8)), (50, (3,))]
both = pytest.mark.parametrize("unbiased", [False, True])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed), dtype=F64)


def layers_of(n: int, widths: tuple[int, ...], seed: int = 0, mean: float = 3.0) -> dict[str, Tensor]:
    """Layers that share some of what they say."""
    common = randn(n, 5, seed=seed)
    return {f"l{i}": common @ randn(5, d, seed=i) + randn(n, d, seed=seed + i + 1) + mean for i, d in enumerate(widths)}


def pair_by_pair(layers: dict[str, Tensor], unbiased: bool) -> Tensor:
    return torch.stack([torch.stack([cka(x, y, unbiased=unbiased) for y in layers.values()]) for x in layers.values()])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


# ---- values --------------------------------------------------------------------------------------------------------------


@both
@every_shape
def test_is_cka_pair_by_pair(shape, unbiased):
    layers = layers_of(*shape)
    found = cka_matrix(layers, unbiased=unbiased)
    assert (found.names, found.method, found.columns) == (tuple(layers), "cka", None)
    assert found.matrix.dtype == F64 and not found.matrix.requires_grad
    close(found.matrix, pair_by_pair(layers, unbiased))
    close(found.matrix, reference.cka_matrix(layers, unbiased=unbiased))
    assert torch.equal(found.matrix, found.matrix.T)


@both
@pytest.mark.parametrize("n", [20, 300])
def test_rectangular(n, unbiased):
    """The layers of two models; the names may be the same."""
    layers, other = layers_of(n, (30, 7, 50)), layers_of(n, (12, 40), seed=3)
    found = cka_matrix(layers, other, unbiased=unbiased)
    assert (found.names, found.columns, found.matrix.shape) == (("l0", "l1", "l2"), ("l0", "l1"), (3, 2))
    close(found.matrix, reference.cka_matrix(layers, other, unbiased=unbiased))
    close(found.matrix, cka_matrix(other, layers, unbiased=unbiased).matrix.T)
    close(cka_matrix(layers, layers, unbiased=unbiased).matrix, cka_matrix(layers, unbiased=unbiased).matrix)


@both
@every_shape
def test_fast_is_near(shape, unbiased):
    """In one block and with a product of another width."""
    layers = {name: x.float() for name, x in layers_of(*shape).items()}
    with warnings.catch_warnings():
        if shape[0] == 5:
            warnings.filterwarnings("ignore", "cka_matrix: layer 'l0' has an unbiased HSIC", UserWarning)
        found = cka_matrix(layers, unbiased=unbiased, precision="fast").matrix
    exact = cka_matrix(layers, unbiased=unbiased).matrix
    close(found, exact, 1e-4 if shape[0] == 5 else 1e-6)
    assert not torch.equal(found, exact) or len(layers) == 1


@pytest.mark.parametrize("tracked", [False, True])
def test_fast_of_wide_layers(tracked):
    """Samples that have next to nothing in common: their inner products are small beside their squares."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(128, 40, generator=generator)
    layers = {}
    for name, share, mean in (("a", 1, 0), ("b", 0.1, 3), ("noise", 0, 0)):
        mix, noise = (torch.randn(k, 8192, generator=generator) for k in (40, 128))
        layers[name] = (common @ mix * share + noise + mean).requires_grad_(tracked)
    found = cka_matrix(layers, unbiased=True, precision="fast").matrix
    close(found.detach(), cka_matrix(layers, unbiased=True).matrix.detach(), 5e-8)


@both
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("precision", ["high", "fast"])
def test_bands_and_slices(monkeypatch, unbiased, tracked, precision):
    """What more samples and wider layers are computed by."""
    monkeypatch.setattr(module, "_TILE", 1)
    monkeypatch.setattr(module, "_step", lambda n: 77)
    layers = {name: x.requires_grad_(tracked) for name, x in layers_of(201, (300, 7, 50)).items()}
    found = cka_matrix(layers, unbiased=unbiased, precision=precision).matrix
    close(found.detach(), reference.cka_matrix(layers, unbiased=unbiased).detach(), 1e-12 if precision == "high" else 1e-6)


@pytest.mark.parametrize("n", [600, 1100])
def test_many_samples_of_wide_layers(n):
    """Taller strips."""
    layers = layers_of(n, (800, 700))
    close(cka_matrix(layers, unbiased=True).matrix, reference.cka_matrix(layers, unbiased=True), 1e-11)


@pytest.mark.parametrize("precision", ["high", "fast"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("n", [40, 200])
def test_dtypes(n, dtype, precision):
    """Whatever comes in, mixed with others too."""
    layers = {name: x.to(dtype) for name, x in layers_of(n, (50, 7)).items()} | {"other": randn(n, 9)}
    found = cka_matrix(layers, unbiased=True, precision=precision).matrix
    close(found, reference.cka_matrix(layers, unbiased=True), 1e-12 if precision == "high" else 1e-6)


def test_any_shape_and_strides():
    """Features in any order: channels_last maps, tokens, and samples that don't lie first."""
    n = 24
    image, tokens, flat = randn(n, 6, 5, 4), randn(n, 7, 3), randn(n, 40)
    expected = cka_matrix({"i": image.flatten(1), "t": tokens.flatten(1), "f": flat}).matrix
    found = cka_matrix(
        {"i": image.to(memory_format=torch.channels_last), "t": tokens.mT.contiguous().mT, "f": flat.T.contiguous().T}
    )
    close(found.matrix, expected)
    whole = torch.full((2 * n, 80), math.nan, dtype=F64)
    whole[::2, ::2] = flat
    close(cka_matrix({"i": image, "t": tokens, "f": whole[::2, ::2]}).matrix, expected)
    close(cka_matrix({"i": image[..., None], "t": tokens.flip(1), "f": flat}).matrix, expected)
    thin = randn(n, 1).expand(n, 50)
    close(cka_matrix({"a": thin, "b": flat}).matrix, reference.cka_matrix({"a": thin, "b": flat}))


@both
@pytest.mark.parametrize("n", [40, 200])
def test_permutations_rotations_and_scales_change_nothing(n, unbiased):
    layers = layers_of(n, (60, 9))
    expected = cka_matrix(layers, unbiased=unbiased).matrix
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(randn(60, 60))[0]
    changed = {"l0": 1e3 * layers["l0"][order] @ rotation - 5, "l1": -1e-6 * layers["l1"][order].flip(1)}
    close(cka_matrix(changed, unbiased=unbiased).matrix, expected, 1e-11)
    close(cka_matrix(dict(reversed(layers.items())), unbiased=unbiased).matrix, expected.flip(0, 1))


@pytest.mark.parametrize("precision", ["high", "fast"])
@pytest.mark.parametrize("n", [40, 200])
@pytest.mark.parametrize("scale", [1e-130, 1e-30, 1e30, 1e130])
def test_numbers_of_any_size(n, scale, precision):
    """Also where their squares leave the range of float32."""
    layers = layers_of(n, (60, 9), mean=0.0)
    scaled = {name: x * scale for name, x in layers.items()}
    if 1e-38 < scale < 1e38:
        scaled["l1"] = scaled["l1"].float()
    close(cka_matrix(scaled, unbiased=True, precision=precision).matrix, cka_matrix(layers, unbiased=True).matrix, 1e-6)


@pytest.mark.parametrize("precision", ["high", "fast"])
@pytest.mark.parametrize("n", [40, 200])
@pytest.mark.parametrize("mean", [100.0, 1e6])
def test_means_far_from_zero(n, mean, precision):
    """And a first sample far from all others."""
    layers = layers_of(n, (60, 9), mean=mean)
    layers["l1"][0] += 50 * mean
    expected = cka_matrix({name: x - x.mean(0) for name, x in layers.items()}).matrix
    close(cka_matrix(layers, precision=precision).matrix, expected, 1e-8 if precision == "high" else 1e-5)


# ---- layers that do not vary -----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("precision", ["high", "fast"])
@pytest.mark.parametrize("n", [20, 200])
def test_constant_layers_are_nan_and_warn_once(n, precision, unbiased):
    layers = layers_of(n, (30, 7))
    flat = {"a": layers["l0"], "flat": torch.full((n, 9), 0.1), "b": layers["l1"], "zero": torch.zeros(n, 4, 2)}
    with pytest.warns(UserWarning, match="cka_matrix") as caught:
        found = cka_matrix(flat, unbiased=unbiased, precision=precision).matrix
    (said,) = [str(w.message) for w in caught]
    same = "cka_matrix: 2 layers have the same value in every sample, and are NaN (0 / 0), the first 'flat'"
    assert said == f"{same}; leave them out (see docs/cca.md#limits)"
    assert caught[0].filename == __file__
    close(found[::2, ::2], cka_matrix(layers, unbiased=unbiased).matrix, 1e-6)
    assert found.isnan().sum() == 12
    with pytest.warns(
        UserWarning, match=r"^cka_matrix: 1 layers .*, the first 'flat' of other; leave them out \(see .*#limits\)$"
    ):
        found = cka_matrix(layers, {"flat": flat["flat"], "a": layers["l0"]}).matrix
    assert found[:, 0].isnan().all() and not found[:, 1].isnan().any()


def test_samples_equally_far_from_each_other():
    """Have an unbiased HSIC of 0, to rounding, but a biased one."""
    layers = {"corners": torch.eye(6, dtype=F64), "x": randn(6, 8)}
    with pytest.warns(
        UserWarning, match=r"^cka_matrix: 1 layers have an HSIC .* the first 'corners': all its samples are equally"
    ):
        found = cka_matrix(layers, unbiased=True).matrix
    assert found.isnan().tolist() == [[True, True], [True, False]]
    close(cka_matrix(layers).matrix, pair_by_pair(layers, False))


def test_fast_warns_where_it_is_not_enough():
    """Of a difference that float32 leaves little of, with its size."""
    n = 50
    corners = torch.eye(n, dtype=F64)
    layers = {"noise": randn(n, 60), "near": corners + 1e-3 * randn(n, n)}
    exact = cka_matrix(layers, unbiased=True).matrix
    with pytest.warns(UserWarning, match="cka_matrix") as caught:
        found = cka_matrix(layers, unbiased=True, precision="fast").matrix
    words = [str(w.message) for w in caught]
    assert len(words) == 1 and words[0].startswith("cka_matrix: layer 'near' has an unbiased HSIC with itself")
    size = float(words[0].split("terms ")[1].split(" times")[0])
    assert 1e4 < size < 1e8
    close(found, exact, 1e-16 * 2**29 * size)  # float32's rounding, that much larger
    cka_matrix(layers, precision="fast")  # biased, nothing is lost


# ---- gradients -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("shape", [(12, (30, 5, 20)), (60, (7, 9))], ids=str)
def test_gradients_match_reference(shape, unbiased):
    layers = {name: x.requires_grad_() for name, x in layers_of(*shape).items()}
    weight = randn(len(layers), len(layers))
    found, expected = (
        torch.autograd.grad((weight * matrix).sum(), list(layers.values()))
        for matrix in (cka_matrix(layers, unbiased=unbiased).matrix, reference.cka_matrix(layers, unbiased=unbiased))
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_gradients_of_shapes_types_and_far_sizes():
    image = (randn(16, 4, 3, 2) * 1e20).float().to(memory_format=torch.channels_last).requires_grad_()
    other = {"a": randn(16, 9), "b": randn(16, 40).bfloat16()}
    for precision in ("high", "fast"):
        (found,) = torch.autograd.grad(cka_matrix({"i": image}, other, precision=precision).matrix.sum(), image)
        (expected,) = torch.autograd.grad(reference.cka_matrix({"i": image}, other).sum(), image)
        assert found.dtype == torch.float32 and found.shape == image.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("n", [20, 200])
def test_gradients_past_a_constant_layer_are_finite(n):
    layers = {name: x.requires_grad_() for name, x in layers_of(n, (30, 7)).items()}
    flat = torch.full((n, 9), 0.1, requires_grad=True)
    with pytest.warns(UserWarning, match="and are NaN"):
        found = cka_matrix({**layers, "flat": flat}).matrix
    grads = torch.autograd.grad(found[:2, :2].sum(), [*layers.values(), flat])
    expected = torch.autograd.grad(cka_matrix(layers).matrix.sum(), list(layers.values()))
    assert_same(grads[2], torch.zeros_like(flat), "flat")
    for ours, theirs in zip(grads, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_refused():
    x = randn(9, 20).requires_grad_()
    (grad,) = torch.autograd.grad(cka_matrix({"x": x, "y": randn(9, 4)}).matrix.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        grad.sum().backward()


def test_gradcheck():
    y = randn(6, 9)
    for unbiased in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, unbiased=unbiased: cka_matrix({"x": x, "y": y, "z": x[:, :3]}, unbiased=unbiased).matrix,
            randn(6, 5).requires_grad_(),
        )


# ---- behaviour -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "limit"), [(10, 200_000), (300, 50_000)])
def test_memory(n, limit):
    """No [d, d] of wide layers, and nothing larger than the data of narrow ones but their scatter matrix."""
    layers = {name: x.float() for name, x in layers_of(n, (10_000, 9_000) if n == 10 else (5,) * 30).items()}
    with Largest() as largest:
        cka_matrix(layers, unbiased=True)
    assert largest.numel <= limit


def test_many_samples_take_bands_of_kernels(monkeypatch):
    monkeypatch.setattr(module, "_TILE", 50_000)
    layers = layers_of(400, (500, 3))
    with Largest() as largest:
        cka_matrix(layers)
    assert largest.numel < 2 * 400 * 400


def test_same_on_any_number_of_threads():
    layers = layers_of(128, (700, 90, 2000))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(cka_matrix(layers, unbiased=True).matrix)
    finally:
        torch.set_num_threads(threads)
    close(found[0], found[1], 1e-14)  # the products are a library's


def test_autocast_and_inference_mode_change_nothing():
    layers = {name: x.float().requires_grad_() for name, x in layers_of(20, (40, 9)).items()}
    expected = cka_matrix(layers).matrix.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(cka_matrix(layers).matrix.detach(), expected, "autocast")
    with torch.inference_mode():
        close(cka_matrix(layers).matrix, expected)


def test_names_of_any_kind():
    layers = {("a", 1): randn(9, 3), 7: randn(9, 4)}
    assert cka_matrix(layers).names == (("a", 1), 7)


# ---- wrong calls -----------------------------------------------------------------------------------------------------------


def refusals() -> list[Refusal]:
    x, y = randn(9, 20), randn(9, 4)
    bad = y.clone()
    bad[2, 1:3] = math.nan
    bad[0, 0] = math.inf
    good = {"x": x, "y": y}
    shape = "must be [n, d] or [n, ...] with samples and neurons, got shape"
    floats = "must be float16, bfloat16, float32 or float64, got"
    size = "square leaves the range of float64; multiply the layer by a constant, which changes no similarity"

    def of(error: type[Exception], message: str, *args: Any, **options: Any) -> Refusal:
        return Refusal(error, f"cka_matrix: {message}", lambda: cka_matrix(*args, **options))

    wide, tracked = {"a": x, "b": randn(9, 30)}, {"a": x.clone().requires_grad_()}
    mapped = "is mapped by torch.func.vmap, which cannot follow constant layers; loop over the batch"
    return [
        of(TypeError, "layers must be a dict {name: tensor}, got Tensor", x),
        of(TypeError, "layers must be a dict {name: tensor}, got list", [x]),
        of(TypeError, "other must be a dict {name: tensor}, got Tensor", good, x),
        of(ValueError, "layers must hold at least one layer, got an empty dict", {}),
        of(ValueError, "other must hold at least one layer, got an empty dict", good, {}),
        of(TypeError, f"layer 'y' of layers {floats} int64", {"x": x, "y": y.long()}),
        of(TypeError, f"layer 'y' of other {floats} complex128", good, {"y": y.to(torch.complex128)}),
        of(TypeError, "layer 'y' of layers must be a Tensor, got ndarray", {"y": y.numpy()}),
        of(ValueError, f"layer 'x' of layers {shape} (9,)", {"x": x[:, 0]}),
        of(ValueError, f"layer 'x' of layers {shape} (0, 20)", {"x": x[:0]}),
        of(ValueError, f"layer 'x' of other {shape} (9, 0, 2)", good, {"x": x.new_zeros(9, 0, 2)}),
        of(
            ValueError,
            "layers must have the same samples, got n=9 for 'x' (9, 20) and n=8 for 'y' (8, 4)",
            {"x": x, "y": y[1:]},
        ),
        of(
            ValueError,
            "layers must have the same samples, got n=9 for 'x' (9, 20) and n=8 for 'x' of other (8, 20)",
            good,
            {"x": x[1:]},
        ),
        of(
            ValueError,
            "layers must be on one device, got cpu for 'x' and meta for 'y'; move one with .to()",
            {"x": x, "y": y.to("meta")},
        ),
        of(TypeError, "unbiased must be a bool, got 1", good, unbiased=1),
        of(ValueError, "precision must be one of ('high', 'fast'), got 'low'", good, precision="low"),
        of(TypeError, "precision must be one of ('high', 'fast'), got None", good, precision=None),
        of(ValueError, "n must be at least 4 with unbiased=True, got n=3 samples", {"x": x[:3]}, unbiased=True),
        of(ValueError, "n must be at least 2, got n=1 samples", {"x": x[:1]}),
        *(
            of(ValueError, "layer 'bad' must be finite, got 3 NaN or infinite values of 36", {"x": a, "bad": b}, **options)
            for a, b in ((x, bad), (x.float(), bad.bfloat16()), (randn(9, 2), bad), (x.clone().requires_grad_(), bad))
            for options in ({}, {"precision": "fast"})
        ),
        of(ValueError, "layer 'bad' of other must be finite, got 3 NaN or infinite values of 36", wide, {"bad": bad}),
        *(
            of(
                ValueError,
                f"the largest number of layer 'y' must lie between 1e-140 and 1e+140 in size, got {value}: its {size}",
                {"x": others, "y": y.sign() * float(value)},
                **options,
            )
            for value in ("1e+160", "1e-160")
            for others in (x, randn(9, 2), tracked["a"])
            for options in ({}, {"precision": "fast"})
        ),
        Refusal(
            ValueError,
            f"cka_matrix: layer 'y' of layers {mapped}",
            lambda: torch.func.vmap(lambda y: cka_matrix({"x": x, "y": y}).matrix)(torch.stack([y, y])),
        ),
    ]


REFUSALS = refusals()


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.message[:60])
def test_refuses_wrong_input(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert f"{caught.type.__name__}: {caught.value}" == f"{refusal.error.__name__}: {refusal.message}"


def test_every_raise_is_reached():
    assert unreached_raises((), module, REFUSALS) == []
