"""The layers of fourfold.nn: what each costs over the op that it calls, and against the idiom it replaces.

A layer adds a Python call to its op, so the yardstick is that op on the same problem; the rivals are those of the op that do
the same with a torch.nn layer's means, eager and compiled. Sizes and references are the op's own. Every layer runs forward and
backward, as in training; each has a second case so small that only the call costs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import fourfold as ff
import torch
from torch import Tensor, nn

from . import bench_blockdct as dct
from . import bench_blockdct_rgb as rgb
from . import bench_coordconv as coord
from . import bench_maskmm as masks
from . import bench_maskmm_sparse as sparse
from . import bench_maskmm_superposed as superposed
from . import cases as shapes
from .harness import Call, Case, Contestant, Settings, Tolerance, with_backward

FAMILY = "nn"
TINY = "so small that only the call costs"

Make = Callable[[Any, str], Call]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One of fourfold.nn at one size.

    ours: makes the layer and gives the call that runs it.
    op: the name of the op that it calls; by_op: the same without the layer.
    tensors: of what ours and by_op give, to compare.
    """

    name: str
    label: str
    source: str
    problem: Callable[[torch.device], Any]
    reference: Callable[[Any], Any]
    tolerance: Tolerance
    ours: Make
    op: str
    by_op: Make
    rivals: tuple[Contestant, ...]
    held: Callable[[Any], list[Tensor]]
    tensors: Callable[[Any], Any] | None = None

    def case(self, *, small: bool) -> Case:
        return Case(
            family=FAMILY,
            op=f"nn.{self.name}",
            label=self.label,
            problem=self.problem,
            reference=self.reference,
            ours=Contestant("fourfold", self.ours, tensors=self.tensors),
            rivals=() if small else self.rivals,
            tolerance=self.tolerance,
            yardsticks=(Contestant(self.op, self.by_op, tensors=self.tensors),),
            held=None if small else self.held,
            state="heap",
            source=self.source,
            quick=small,
            overhead=small,
        )


# --- coordconv ------------------------------------------------------------------------------------------------------------

KINDS = (ff.nn.CoordConv1d, ff.nn.CoordConv2d, ff.nn.CoordConv3d)


def _coord_layer(p: coord.Problem, state: str) -> Call:
    place = p.layer
    kind = ff.nn.CoordConvTranspose2d if place.transposed else KINDS[place.rank - 1]
    layer = kind(place.input[1], place.channels, place.kernel, place.stride, place.padding, device=p.x.device)
    for name, given in (("weight", p.weight), ("coord_weight", p.coord_weight), ("bias", p.bias)):
        setattr(layer, name, nn.Parameter(given.detach()))
    leaves = [layer.weight, layer.coord_weight, layer.bias, *p.input_leaf()]
    return with_backward(lambda: layer(p.x), leaves, [p.grad])


def _coord_conv(settings: Settings, place: shapes.Layer) -> Layer:
    op = "coord_conv_transpose2d" if place.transposed else f"coord_conv{place.rank}d"
    rivals = [Contestant("concat at its best", coord.concat_best), Contestant("concat as published", coord.concat_published)]
    if settings.compiles:
        rivals.append(Contestant("concat at its best, compiled", coord.concat_best_compiled))
    return Layer(
        name="CoordConvTranspose2d" if place.transposed else f"CoordConv{place.rank}d",
        label=str(place),
        source=place.source,
        problem=functools.partial(coord.Problem, place, torch.float32, coord.BACKWARD, True),
        reference=coord.with_coordinates,
        tolerance=coord.FLOAT32,
        ours=_coord_layer,
        op=op,
        by_op=coord.ours,
        rivals=tuple(rivals),
        held=coord.Problem.tensors,
    )


def _add_layer(p: coord.Image, state: str) -> Call:
    layer = ff.nn.AddCoords()
    return lambda: layer(p.x)


def _add_coords(settings: Settings, size: tuple[int, ...], source: str) -> Layer:
    rivals = {"cat with kept coordinates": coord.cat_kept, "as published": coord.cat_published}
    if settings.compiles:
        rivals["as published, compiled"] = coord.compiled(coord.cat_published)
    return Layer(
        name="AddCoords",
        label=f"channels_last {'x'.join(map(str, size))}",
        source=source,
        problem=functools.partial(coord.Image, size, True, torch.float32, gradient=True),
        reference=coord.with_coords_and_gradient,
        tolerance=Tolerance(1e-6, 1e-6),
        ours=coord.gradient_of_image(_add_layer),
        op="add_coords",
        by_op=coord.gradient_of_image(coord.add_to),
        rivals=tuple(Contestant(name, coord.gradient_of_image(make)) for name, make in rivals.items()),
        held=coord.Image.tensors,
    )


# --- blockdct -------------------------------------------------------------------------------------------------------------


def _dct_layer(p: dct.Trained, state: str) -> Call:
    layer = (ff.nn.BlockIDCT2d if p.inverse else ff.nn.BlockDCT2d)(p.n, layout=p.layout)
    return lambda: layer(p.x)


def _block_transform(settings: Settings, shape: shapes.Shape, inverse: bool) -> Layer:
    rivals = {"conv_transpose2d": dct.conv_transpose2d} if inverse else {"conv2d": dct.conv2d}
    separable = dct.two_pass_inverse if inverse else dct.two_pass
    rivals["two-pass GEMM"] = separable
    if settings.compiles:
        rivals["two-pass GEMM, compiled"] = dct.compiled(separable)
    return Layer(
        name="BlockIDCT2d" if inverse else "BlockDCT2d",
        label=f"planar {shape}",
        source=shape.source,
        problem=lambda device: dct.Trained(shape.size, 8, "planar", None, torch.float32, device, inverse),
        reference=dct.exactly_with_gradient,
        tolerance=dct.FLOAT32,
        ours=dct.backward(_dct_layer),
        op="block_idct" if inverse else "block_dct",
        by_op=dct.backward(dct.ours),
        rivals=tuple(Contestant(name, dct.backward(make)) for name, make in rivals.items()),
        held=dct.Trained.tensors,
    )


def _rgb_layer(p: rgb.TrainedImages, state: str) -> Call:
    layer = ff.nn.RGBToDCT()
    return lambda: layer(p.rgb)


def _rgb_to_dct(settings: Settings, shape: shapes.Shape) -> Layer:
    rivals = {"two convolutions": rgb.two_convolutions(False), "GEMMs": rgb.gemms}
    if settings.compiles:
        rivals["GEMMs, compiled"] = dct.compiled(rgb.gemms)
    return Layer(
        name="RGBToDCT",
        label=f"float32 {shape} 4:2:0",
        source=shape.source,
        problem=functools.partial(rgb.TrainedImages, shape.size),
        reference=rgb.with_gradient_of_rgb,
        tolerance=rgb.FLOAT32,
        ours=rgb.of_rgb(_rgb_layer),
        op="rgb_to_dct",
        by_op=rgb.of_rgb(rgb.to_dct),
        rivals=tuple(Contestant(name, rgb.of_rgb(make)) for name, make in rivals.items()),
        held=rgb.TrainedImages.tensors,
    )


# --- maskmm ---------------------------------------------------------------------------------------------------------------


def _plain_layer(place: shapes.Linear | shapes.Layer, weight: Tensor) -> Any:
    """torch.nn's with this weight."""
    if isinstance(place, shapes.Linear):
        layer: nn.Module = nn.Linear(place.columns, place.rows, bias=False, device=weight.device)
    else:
        sizes = (place.input[1], place.channels, place.kernel, place.stride, place.padding)
        layer = nn.Conv2d(*sizes, bias=False, device=weight.device)
    layer.weight = nn.Parameter(weight.detach())
    return layer


def _run(p: Any, layer: Any, leaves: list[Tensor]) -> Call:
    """Forward and backward. What the layer holds of its own lives anyway, as p's tensors do: it is not saved for backward."""
    vars(p).update({f"the layer's {name}": t for name, t in layer.state_dict(keep_vars=True).items()})
    return with_backward(lambda: layer(p.x), leaves, [p.grad])


def _masked_layer(p: masks.Problem, state: str) -> Call:
    plain = _plain_layer(p.place, p.weight)
    if isinstance(p.place, shapes.Linear):
        layer: Any = ff.nn.MaskedLinear.from_linear(plain, p.bits)
    else:
        layer = ff.nn.MaskedConv2d.from_conv(plain, p.bits)
    return _run(p, layer, [layer.weight, p.x])


def _supermask_layer(p: masks.Problem, state: str) -> Call:
    plain, options = _plain_layer(p.place, p.weight), {"sampler": p.mode.sampler, "density": p.mode.density}
    if isinstance(p.place, shapes.Linear):
        layer: Any = ff.nn.SupermaskLinear.from_linear(plain, **options)
    else:
        layer = ff.nn.SupermaskConv2d.from_conv(plain, **options)
    layer.scores = nn.Parameter(p.scores.detach())
    return _run(p, layer, [layer.scores, p.x])


def _masked(settings: Settings, place: shapes.Linear | shapes.Layer, mode: masks.Mode) -> Layer:
    learned, kind = mode.sampler is not None, "Linear" if isinstance(place, shapes.Linear) else "Conv2d"
    if learned:
        rivals = [Contestant("kthvalue", masks.idiom(masks.by_kthvalue))]
        rivals += [Contestant("kthvalue, compiled", masks.idiom(masks.by_kthvalue, compiled=True))] * settings.compiles
    else:
        rivals = [Contestant("weight * float mask", masks.times_numbers)]
        rivals += [Contestant("weight * float mask, compiled", masks.times_numbers_compiled)] * settings.compiles
    return Layer(
        name=("Supermask" if learned else "Masked") + kind,
        label=str(place) + f", {mode.name}" * learned,
        source=place.source,
        problem=functools.partial(masks.Problem, place, mode, torch.float32, True),
        reference=masks.REFERENCES[mode.sampler],
        tolerance=masks.FLOAT32,
        ours=_supermask_layer if learned else _masked_layer,
        op=("supermask_" if learned else "masked_") + kind.lower(),
        by_op=masks.ours,
        rivals=tuple(rivals),
        held=masks.Problem.tensors,
    )


def _sparse_layer(p: sparse.Pruned, state: str) -> Call:
    layer = ff.nn.SparseLinear.from_linear(_plain_layer(p.place, p.weight), p.mask, batch_hint=p.place.batch)
    return _run(p, layer, [layer.values, p.x])


def _sparse(settings: Settings, place: shapes.Linear, density: float) -> Layer:
    rivals = [Contestant("weight * float mask", sparse.retrain_numbers, reference=sparse.retrained)]
    if settings.compiles:
        rivals.append(Contestant("weight * float mask, compiled", sparse.retrain_compiled, reference=sparse.retrained))
    return Layer(
        name="SparseLinear",
        label=f"{place}, density {density}",
        source=place.source,
        problem=functools.partial(sparse.Pruned, place, density, torch.float32, True),
        reference=sparse.retrained_values,
        tolerance=sparse.FLOAT32,
        ours=_sparse_layer,
        op="sparse_linear",
        by_op=sparse.retrain_ours,
        rivals=tuple(rivals),
        held=sparse.Pruned.tensors,
        tensors=sparse.values_as_a_row,
    )


def _superposed_layer(p: superposed.Superposition, state: str) -> Call:
    layer = ff.nn.SuperposedLinear.from_linear(_plain_layer(p.place, p.weight), p.bools)
    layer.alpha = p.alpha
    return _run(p, layer, [p.alpha])


def _superposed(settings: Settings, place: shapes.Linear, tasks: int) -> Layer:
    rivals = [
        Contestant("stacked float masks, as published", superposed.superposed(superposed.published)),
        Contestant("matrix times vector", superposed.superposed(superposed.matvec)),
    ]
    if settings.compiles:
        compiled = superposed.superposed(superposed.published, compiled=True)
        rivals.append(Contestant("stacked float masks, compiled", compiled))
    return Layer(
        name="SuperposedLinear",
        label=f"{place}, {tasks} masks, gradient of alpha",
        source=place.source,
        problem=functools.partial(superposed.Superposition, place, tasks, True),
        reference=superposed.superposed_exactly,
        tolerance=superposed.FLOAT32,
        ours=_superposed_layer,
        op="superposed_linear",
        by_op=superposed.superposed_ours,
        rivals=tuple(rivals),
        held=superposed.Superposition.tensors,
    )


# --- what the harness asks for --------------------------------------------------------------------------------------------


def layers(settings: Settings, *, small: bool) -> Iterator[Layer]:
    """Every layer once."""
    image = shapes.Shape((1, 3, 16, 16), TINY) if small else shapes.CLASSIFIER
    linear = shapes.Linear(8, 64, 2, TINY)
    conv = shapes.Layer((1, 8, 8, 8), 8, 1, 1, TINY)

    def at(place: Any, tiny: Any) -> Any:
        return tiny if small else place

    yield _add_coords(settings, at(shapes.SQUARE_1X1.input, conv.input), at(shapes.SQUARE_1X1.source, TINY))
    yield _coord_conv(settings, at(shapes.SERIES, conv._replace(input=(1, 8, 8))))
    yield _coord_conv(settings, at(shapes.WIDE_3X3, conv))
    yield _coord_conv(settings, at(shapes.VOLUME, conv._replace(input=(1, 8, 4, 4, 4))))
    yield _coord_conv(settings, at(shapes.DECODER, conv._replace(kernel=2, stride=2, transposed=True)))
    yield _block_transform(settings, image, inverse=False)
    yield _block_transform(settings, image, inverse=True)
    yield _rgb_to_dct(settings, image)
    for mode in (masks.FIXED, masks.EDGE_POPUP):
        yield _masked(settings, at(shapes.SQUARE, linear), mode)
        yield _masked(settings, at(shapes.CONV6[-1], conv), mode)
    yield _sparse(settings, at(shapes.SQUARE, linear), 0.1 if not small else 0.5)
    yield _superposed(settings, at(shapes.SUPSUP, linear), 10 if not small else 2)


def cases(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        return
    for small in (True, False):
        for layer in layers(settings, small=small):
            yield layer.case(small=small)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
