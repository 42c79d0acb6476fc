"""That the benchmarks leave nothing out: every op and layer, its compiled idiom, its backward pass and its memory."""

import dataclasses
import inspect

import fourfold
import pytest
import torch
from fourfold.benchmarks import (
    bench_blockdct,
    bench_blockdct_domain,
    bench_blockdct_rgb,
    bench_coordconv,
    bench_jpeg,
    bench_maskmm,
    bench_maskmm_sparse,
    bench_maskmm_superposed,
    bench_nn,
    cases,
    every_case,
    harness,
)
from fourfold.benchmarks.harness import Case, Session, Settings

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark; run: pip install pytest-benchmark")


# --- what there is to measure ---------------------------------------------------------------------------------------------


def leaf_ops() -> set[str]:
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fourfold::")}
    return {name.removeprefix("fourfold::") for name in names if not name.startswith("fourfold::_")}


def functions() -> set[str]:
    """The public functions over tensors that do work: leaf ops, and composites of internal ones."""
    public = {name for name in fourfold.__all__ if inspect.isfunction(getattr(fourfold, name))}
    ops = {name for name in public if getattr(fourfold, name).__module__.startswith("fourfold.ops.")}
    return ops - {"zigzag"}  # a list of constants


def layers() -> set[str]:
    return {f"nn.{name}" for name in fourfold.nn.__all__}


def others() -> set[str]:
    """What takes time and is no function over tensors."""
    files = {f"jpeg.{name}" for name in fourfold.jpeg.__all__ if name not in {"JpegCoefficients", "JpegError", "collate"}}
    whole = {f"metrics.{name}" for name in fourfold.metrics.__all__} | {"models.dct_resnet50", "compare"}
    return files | whole | {"StreamingCCA", "StreamingCCA.update", "_gram_"}


# Of these no idiom is compiled, and why.
UNCOMPILED = {
    "compress": "how many values there are is known from the mask alone",
    "dft_cca": "of complex numbers inductor makes no code",
    "compare": "runs models that are the user's",
    "metrics.CCAMetric": "its rival only collects; what it whitens with races compiled under cca",
    "_gram_": "its rivals are single products",
}
NO_GRADIENT = {  # masks are bits, a task is an int, sums of a stream are constants
    *("pack_mask", "unpack_mask", "bernoulli_mask", "topk_mask", "threshold_mask", "mask_from_criterion", "infer_task"),
    *("StreamingCCA", "StreamingCCA.update", "_gram_", "compare", "metrics.CCAMetric", "models.dct_resnet50"),
}
# What they hold is some hundred kilobytes, or is told of the class that they belong to, or is the network's.
NO_MEMORY = {"jpeg.read", "jpeg.write", "jpeg.frequency_stats", "StreamingCCA.update", "_gram_", "models.dct_resnet50"}


def by_op(chosen: list[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in chosen:
        found.setdefault(case.op, []).append(case)
    return found


def test_every_op_and_layer_is_raced_and_its_overhead_stated():
    assert "block_dct" in leaf_ops() < functions() and "coord_conv2d" in functions() and len(layers()) == 14
    assert {"jpeg.read", "jpeg.read_batch", "jpeg.write", "jpeg.frequency_stats", "jpeg.DctDataset"} <= others()
    chosen = every_case(Settings())
    assert {case.op for case in chosen if case.rivals and not case.overhead} == functions() | layers() | others()
    assert {case.op for case in chosen if case.overhead} == functions() | layers()
    assert {case.op for case in chosen if case.overhead and case.overhead_goal} == leaf_ops()
    quick = every_case(Settings(quick=True))
    assert {case.op for case in quick if case.rivals and not case.overhead} == functions() | others()
    assert {case.op for case in quick if case.overhead} == functions() | layers()
    for names in ([case.name for case in chosen], [case.name for case in quick]):
        assert len(names) == len(set(names))


def test_every_overhead_is_over_something():
    """A yardstick, or the clone of what the op is given."""
    for case in every_case(Settings()):
        if case.overhead and not case.yardsticks:
            assert isinstance(case.problem(torch.device("cpu")).clone(), torch.Tensor), case.name


def test_every_shape_has_a_source():
    for settings in (Settings(), Settings(random_shapes=True)):
        assert not [case.name for case in every_case(settings) if not case.source]


def test_every_op_races_a_compiled_idiom_or_it_is_said_why_not():
    if not Settings().compiles:
        pytest.skip("no compiler for torch.compile; install g++, or name one with CXX")
    compiled = {
        op
        for op, of in by_op(every_case(Settings())).items()
        if any("compiled" in rival.name for case in of for rival in case.rivals) or any("compiled" in case.title for case in of)
    }
    files = {op for op in others() if op.startswith("jpeg.")}  # reading files is no tensor code
    assert compiled == (functions() | layers() | others()) - set(UNCOMPILED) - files


def test_every_backward_pass_is_measured_with_what_it_saves():
    trained = {op for op, of in by_op(every_case(Settings())).items() if any(case.held is not None for case in of)}
    files = {op for op in others() if op.startswith("jpeg.")}
    assert trained == (functions() | layers() | others()) - NO_GRADIENT - files


def test_memory_is_measured_of_every_op():
    of_ops = by_op(every_case(Settings()))
    told = {op for op, of in of_ops.items() if any(case.peak for case in of)}
    assert told == (functions() | others()) - NO_MEMORY  # a layer's is its op's
    assert all(case.state == "fresh" for of in of_ops.values() for case in of if case.peak)


# --- what races is right --------------------------------------------------------------------------------------------------


@pytest.fixture
def session():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Session(Settings(quick=True), fourfold, runs=1)
    torch.set_num_threads(threads)


def check(session: Session, case: Case) -> None:
    """Everybody takes part, and is right."""
    calls, _, wrong, absent = session._entrants(case)
    assert not wrong and not absent, (case.name, wrong, absent)
    assert len(calls) == 1 + len(case.rivals) + len(case.yardsticks)
    if case.held is not None:
        problem, _ = session._given(case)
        saved = harness.saved_for_backward(calls[case.ours.name], case.held(problem))
        assert saved["bytes"] >= saved["anew"] >= 0


IMAGE = cases.Shape((2, 3, 20, 27), "neither side is whole blocks")
BLOCKS = cases.Shape((2, 4, 6, 64), "a few blocks")
EAGER = Settings(seconds=1.0, only_ours=True)  # without compiled forms, but else with all rivals


def _trained_transforms() -> list[Case]:
    given = [
        bench_blockdct._with_backward(EAGER, IMAGE, layout, inverse)
        for layout in ("planar", "blocks")
        for inverse in (False, True)
    ]
    given += [bench_blockdct._normalize_training(EAGER, BLOCKS, layout) for layout in ("planar", "blocks")]
    given += [bench_blockdct_rgb._to_dct_training(EAGER, IMAGE), bench_blockdct_rgb._to_rgb_training(EAGER, IMAGE)]
    return given + [bench_blockdct_domain._training(EAGER, operation, BLOCKS) for operation in bench_blockdct_domain.OPERATIONS]


def _trained_masks() -> list[Case]:
    place = cases.Linear(20, 70, 5, "rows that don't fill whole words")
    return [
        bench_maskmm_sparse._sddmm_training(EAGER, place, 0.3),
        bench_maskmm_sparse._compression_training(EAGER, place, 0.3),
        bench_maskmm_superposed._samples_training(EAGER, place, 3),
        bench_coordconv._add_coords(EAGER, (2, 3, 5, 7), "small", True, torch.float32, backward=True),
    ]


@pytest.mark.parametrize("make", [_trained_transforms, _trained_masks])
def test_every_contestant_with_a_backward_pass_is_right(session, make):
    for case in make():
        assert case.held is not None and case.rivals, case.name
        check(session, case)


def test_every_contestant_of_the_layers_is_right(session):
    small = list(bench_nn.layers(EAGER, small=True))
    assert {f"nn.{layer.name}" for layer in small} == layers()
    for layer in small:
        check(session, layer.case(small=False))
        check(session, layer.case(small=True))


def test_a_layer_that_does_something_else_is_wrong(session):
    layer = next(layer for layer in bench_nn.layers(EAGER, small=True) if layer.name == "MaskedLinear")
    case = layer.case(small=False)
    _, _, wrong, _ = session._entrants(dataclasses.replace(case, reference=bench_maskmm.masked_beforehand))
    assert "fourfold" in wrong and "masked_linear" in wrong  # a gradient off the mask was expected


needs_jpeg = pytest.mark.skipif(not fourfold.has_jpeg(), reason="built without libjpeg-turbo")


@needs_jpeg
def test_every_installed_writer_keeps_the_coefficients(session):
    photos = cases.Photos(75, 101, 90, count=3)
    for case in (bench_jpeg._writing(photos, True), bench_jpeg._writing(photos, False), bench_jpeg._stats(photos)):
        calls, _, wrong, absent = session._entrants(case)
        assert not wrong and "fourfold" in calls, (case.name, wrong)
        assert all(why.startswith(("not installed (pip install ", "no C compiler")) for why in absent.values())
    shelf, plain = (bench_jpeg.Shelf(photos, optimize, torch.device("cpu")) for optimize in (True, False))
    own, standard = (bench_jpeg.write_ours(p, "heap")()[1] for p in (shelf, plain))
    assert all(len(a) < len(b) for a, b in zip(own, standard, strict=True))
    other = [torch.roll(plane, 1, 0) for plane in shelf.coefficients]
    assert harness.deviation(other, [plane.double() for plane in shelf.coefficients], bench_jpeg.REENCODED)[1] is not None


def test_on_a_gpu_memory_is_told_where_nothing_is_fresh():
    chosen = every_case(Settings(device="cuda"))
    assert not any(case.state == "fresh" for case in chosen)
    assert all(case.label.endswith(", memory") for case in chosen if case.peak) and any(case.peak for case in chosen)
    names = [case.name for case in chosen]
    assert len(names) == len(set(names))
