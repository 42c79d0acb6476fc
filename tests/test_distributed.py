"""Training on several processes: DDP, FSDP2, checkpoints, scaled gradients, similarity; what DTensors get; sampled datasets."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed_workers as workers
import fourfold as ff
import pytest
import torch
import torch.distributed as dist
from distributed_workers import ALONE, BF16, CASES, HALFWAY, STEPS, Process, batch, build
from fourfold.ops.cca_streaming import _reachable
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

EXAMPLES = Path(__file__).parents[1] / "examples"
#: A whole batch's mean gradient and the mean of its parts' add up the same float64 numbers in another order. Nothing here is
#: worse conditioned than that; a gradient that is left out, or counted twice, is wrong in the first digit.
TOLERANCE = 1e-12


# ---- the processes -------------------------------------------------------------------------------------------------------


class World:
    """What the processes of a world returned: {case: [by rank]}."""

    def __init__(self, size: int, folder: Path) -> None:
        began = time.monotonic()
        # Children of one server, which has imported for all of them what takes seconds.
        modules = ["fourfold", "torch.distributed.checkpoint.state_dict", "torch.distributed.tensor.parallel"]
        multiprocessing.get_context("forkserver").set_forkserver_preload([*modules, "torch.distributed.fsdp"])
        context = torch.multiprocessing.start_processes(
            workers.run, (size, str(folder)), nprocs=size, join=False, start_method="forkserver"
        )
        while not context.join(timeout=1):
            if time.monotonic() - began > 120:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{size} processes were not done in 2 minutes")
        self.results = [torch.load(folder / f"{size}.{rank}.pt", weights_only=True) for rank in range(size)]

    def __getitem__(self, name: str) -> list[Any]:
        for result in self.results:
            if name not in result:
                pytest.fail(result["failed"])
        return [result[name] for result in self.results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def two(folder: Path) -> World:
    return World(2, folder)


@pytest.fixture(scope="module")
def four(two: World, folder: Path) -> World:
    """After two, whose checkpoints it loads."""
    return World(4, folder)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> World:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def named(prefix: str) -> list[Any]:
    """The cases whose names begin so, with each of their worlds."""
    found = [(name, worlds) for name, (worlds, _) in CASES.items() if name.startswith(prefix)]
    return [pytest.param(size, name, id=f"{name} {size}") for name, worlds in found for size in worlds]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limits = {"rtol": tolerance, "atol": tolerance} if value.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[name], value, **limits, msg=lambda text, name=name: f"{name}: {text}")


# ---- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "name"), [*named("ddp: "), *named("fsdp: ")], indirect=["world"])
def test_trains_as_one_process(world, name):
    """Every process ends with the state, bits included, that one process ends with on whole batches."""
    model = name.partition(": ")[2]
    expected, losses = workers.trained_alone(model)
    for result in world[name]:
        close(result["state"], expected)
    means = torch.tensor([result["losses"] for result in world[name]], dtype=torch.float64).mean(0)
    torch.testing.assert_close(means, torch.tensor(losses, dtype=torch.float64), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", sorted(workers.MODELS))
def test_training_is_worth_comparing(name):
    """Every trained parameter moves, and so do learned masks; frozen ones and buffers stay."""
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masks = [layer.make_mask() for layer in model.modules() if getattr(layer, "sampler", "") in ("topk", "threshold")]
    workers.train(model, workers.optimizer_of(model), ALONE)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    for key, value in model.state_dict().items():
        moved = (value.double() - before[key].double()).abs().max() > 1e-6
        assert moved == (key in trained), key
    after = [layer.make_mask() for layer in model.modules() if getattr(layer, "sampler", "") in ("topk", "threshold")]
    assert not any(torch.equal(a, b) for a, b in zip(masks, after, strict=True))


def test_shards_are_uneven(four):
    """Of 33 and 31 values, and of the two rows of coordinates that a transposed convolution has."""
    sparse, coords = ([result["shards"] for result in four[f"fsdp: {name}"]] for name in ("sparse", "coordconv"))
    assert [shards["2.values"] for shards in sparse] == [[9], [9], [9], [6]]
    assert [shards["4.values"] for shards in sparse] == [[8], [8], [8], [7]]
    assert [shards["1.coord_weight"][0] for shards in coords] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("world", "name"), [*named("ddp_masks_of_their_own"), *named("fsdp_masks_of_their_own")], indirect=["world"]
)
def test_masks_of_their_own(world, name):
    """Processes with seeds of their own draw masks of their own; gradients are the mean over them."""
    results = world[name]
    x, target = batch(0)
    model, masks = build("bernoulli"), []
    for rank in range(len(results)):
        process = Process(rank, len(results), Path())
        torch.manual_seed(rank)
        masks.append(model[0].make_mask())
        torch.manual_seed(rank)
        (workers.loss_of(model(process.part(x)), process.part(target)) / len(results)).backward()
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for found in results:
        close(found, expected)


# ---- precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", workers.HALVED)
def test_fsdp_in_bfloat16(two, name):
    """MixedPrecisionPolicy(param_dtype=bfloat16) is the model with its parameters converted; gradients are in float32."""
    x, target = batch(0, torch.float32)
    expected: dict[str, Tensor] = {}
    for rank, result in enumerate(two[f"bfloat16: {name}"]):
        process, model = Process(rank, 2, Path()), workers.near_ties(build(name, torch.float32))
        for parameter in model.parameters():  # and no buffer
            parameter.data = parameter.data.to(BF16)
        if name == "topk":  # of scores that are rounded before they are ranked
            assert all(torch.equal(a, b.make_mask()) for a, b in zip(result["masks"], (model[0], model[4]), strict=True))
            exact = workers.near_ties(build(name, torch.float32))
            assert not all(torch.equal(a, b.make_mask()) for a, b in zip(result["masks"], (exact[0], exact[4]), strict=True))
        torch.manual_seed(0)
        output = model(process.part(x).to(BF16))
        assert torch.equal(result["output"], output)
        workers.loss_of(output.float(), process.part(target)).backward()
        for key, p in model.named_parameters():
            if p.requires_grad:
                expected[key] = expected.get(key, 0) + p.grad.float() / 2
    for result in two[f"bfloat16: {name}"]:
        close(result["gradients"], expected, 1e-6)


@pytest.mark.parametrize("name", workers.HALVED)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_autocast(two, how, name):
    """The same bits as in one process: scores are ranked, and compared, in float32."""
    x, _ = batch(0, torch.float32)
    for rank, output in enumerate(two[f"autocast, {how}: {name}"]):
        model = build(name, torch.float32)
        torch.manual_seed(0)
        with torch.autocast("cpu", BF16):
            expected = model(Process(rank, 2, Path()).part(x))
        assert torch.equal(output, expected)


@pytest.mark.parametrize("name", workers.SCALED)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_scaled_gradients(two, how, name):
    """What overflows in one process is a step that none takes, and half the scale for all."""
    expected = workers.scaled(build(name, torch.float32), ALONE)
    assert expected["scales"] == [1024.0, 512.0, 512.0, 1024.0]
    assert [any(step) for step in expected["changed"]] == [True, False, True, True]
    for result in two[f"float16, {how}: {name}"]:
        assert result["scales"] == expected["scales"]
        assert result["changed"] == expected["changed"]
        close(result["state"], expected["state"], 5e-3)  # gradients of parts are rounded to float16 before they are added


# ---- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def never_stopped() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States halfway and at the end, in one process."""
    model = build("all masks")
    optimizer = workers.optimizer_of(model)
    workers.train(model, optimizer, ALONE, range(HALFWAY))
    halfway = {name: value.clone() for name, value in model.state_dict().items()}
    workers.train(model, optimizer, ALONE, range(HALFWAY, 2 * HALFWAY))
    return halfway, model.state_dict()


def check_resumed(result: dict[str, Any], never_stopped: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    halfway, end = never_stopped
    close(result["loaded"], halfway)
    masks = [name for name in halfway if name.endswith("mask_bits")]
    assert len(masks) == 4
    assert all(torch.equal(result["loaded"][name], halfway[name]) for name in masks)
    close(result["state"], end)


@pytest.mark.parametrize(
    ("world", "name"),
    [case for name in ("fsdp_goes_on", "ddp_goes_on_from_fsdp") for case in named(name)],
    indirect=["world"],
)
def test_training_goes_on(world, name, never_stopped):
    """On as many processes as before or others, with the masks and the optimizer's state that two have saved."""
    for result in world[name]:
        check_resumed(result, never_stopped)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # which one process does on purpose
@pytest.mark.parametrize("saved", ["of_fsdp", "of_ddp"])
def test_training_goes_on_alone(two, folder, saved, never_stopped):
    assert two["saves"] == [None, None]
    check_resumed(workers.go_on(Process(0, 1, folder), workers.forgetful("all masks"), saved), never_stopped)


@pytest.mark.parametrize("name", workers.ON_META)
def test_model_from_meta(two, name):
    """Made without memory, sharded, then filled: training is the same."""
    expected, _ = workers.trained_alone(name)
    for state in two[f"meta: {name}"]:
        close(state, expected)


def test_sharded_values_keep_their_number(two):
    for message in two["other_number_of_values"]:
        assert "SparseLinear: values (20,) are sharded and can't become (30,); load before fully_shard" in message


def test_frozen_values_are_not_remembered(two):
    """A sharded layer's memory is filled anew for every forward, without a trace."""
    for first, *others in two["frozen_values"]:
        assert first.any()
        for doublings, later in enumerate(others, 1):
            assert torch.equal(later, first * 2**doublings)


def test_what_is_put_back_is_looked_at_again():
    """The same in one process: the Parameter of before, at its address and of its version, with other contents."""
    weight = torch.randn(6, 8)
    layer = ff.nn.SparseLinear(ff.compress(weight, format="dense")).requires_grad_(False)
    assert torch.equal(layer(torch.eye(8)), weight.T)
    values = layer.values
    layer.values = nn.Parameter(torch.empty_like(values), requires_grad=False)
    with torch.autograd._unsafe_preserve_version_counter(values):
        values.mul_(2)
    layer.values = values
    assert torch.equal(layer(torch.eye(8)), 2 * weight.T)


# ---- similarity in a running job -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "name"), [*named("ddp_watched"), *named("fsdp_watched")], indirect=["world"])
def test_similarity_of_layers_in_training(world, name):
    """At every step that of one process's run, on all processes, and training does not notice."""
    model = build("coordconv")
    expected = workers.watched(model, workers.watched_layers(model), ALONE)
    assert len(expected["matrices"]) == STEPS
    assert not torch.allclose(*expected["matrices"][:2])
    results = world[name]
    for result in results:
        close(result["state"], expected["state"])
        for found, wanted, first in zip(result["matrices"], expected["matrices"], results[0]["matrices"], strict=True):
            assert (found - wanted).abs().max() < 1e-12
            assert torch.equal(found, first)


def test_sums_by_way_of_another_device(two):
    for direct, elsewhere in two["by_way_of_another_device"]:
        assert 0 < direct[0, 1] < 1
        assert torch.equal(direct, elsewhere)


@pytest.mark.parametrize(
    ("config", "wanted", "found"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda", "cuda"),
        ("cuda:nccl", "cuda", "cuda"),
        ("cuda:nccl", "cpu", "cuda"),
        ("cpu:gloo", "cuda", "cpu"),
        ("mpi", "cuda", "cuda"),
    ],
)
def test_where_sums_travel(config, wanted, found):
    assert _reachable(config, wanted) == found


def test_infers_tasks(two):
    model = build("superposed")
    tasks = [ff.infer_task(model, batch(0)[0], method=method) for method in ("oneshot", "binary")]
    expected, _ = workers.trained_alone("superposed")
    for found, state in two["infers_tasks"]:
        assert found == tasks
        close(state, expected)


# ---- DTensors ------------------------------------------------------------------------------------------------------------


def test_tensor_parallel_layers(two):
    for messages in two["tensor_parallel"]:
        assert len(messages) == 4
        for message, op in zip(messages, ["masked_linear"] * 2 + ["supermask_linear"] * 2, strict=True):
            assert message.startswith(f"{op}: x must be a plain tensor, got a DTensor; ")
            assert "leave the layer out of the parallelize plan" in message


def calls() -> dict[str, list[dict[str, Any]]]:
    """Arguments for every public function over tensors, each tensor that it takes in one of them at least."""
    x, weight, coord_weight, bias = torch.randn(2, 3, 16, 16), torch.randn(4, 3, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(4)
    rows, matrix, mask, own = torch.randn(6, 8), torch.randn(5, 8), torch.rand(5, 8) < 0.5, torch.randn(5)
    conv = {"x": x, "weight": weight, "bias": bias}
    linear = {"x": rows, "weight": matrix, "bias": own}
    masks, freqs, blocks = torch.stack([mask, ~mask]), torch.arange(8), torch.randn(2, 4, 4, 64)
    layers = {"x": torch.randn(60, 3), "y": torch.randn(60, 4)}
    superposed = nn.Sequential(nn.Linear(8, 8), ff.nn.SuperposedLinear(8, 5, masks=masks))
    return {
        "add_coords": [{"x": x}],
        "bernoulli_mask": [{"scores": matrix, "seed": torch.tensor(3)}],
        "block_dct": [{"x": x, "freqs": freqs, "scale": torch.ones(8)}, {"x": x, "out": torch.empty(2, 192, 2, 2)}],
        "block_idct": [
            {"y": torch.randn(2, 24, 2, 2), "freqs": freqs, "scale": torch.ones(8)},
            {"y": torch.randn(2, 192, 2, 2), "out": torch.empty_like(x)},
        ],
        "cca": [layers],
        "cka": [layers, {**layers, "kernel": "rbf"}, {**layers, "unbiased": True}],
        "cka_matrix": [{"layers": {"a": layers["x"]}, "other": {"b": layers["y"]}}],
        "compress": [{"weight": matrix, "mask": mask}],
        "coord_conv1d": [{"x": x[:, :, 0], "weight": weight[..., 0], "coord_weight": coord_weight[:, :1, :, 0], "bias": bias}],
        "coord_conv2d": [{**conv, "coord_weight": coord_weight}],
        "coord_conv3d": [
            {"x": x[None], "weight": weight[:, :2, None], "coord_weight": torch.randn(4, 3, 1, 3, 3), "bias": bias}
        ],
        "coord_conv_transpose2d": [
            {"x": x, "weight": torch.randn(3, 4, 2, 2), "coord_weight": torch.randn(2, 4, 2, 2), "bias": bias}
        ],
        "dct_crop": [{"coefs": blocks, "box": (0, 0, 2, 2)}],
        "dct_downscale2": [{"coefs": blocks}],
        "dct_flip": [{"coefs": blocks, "dim": 1}],
        "dct_normalize": [
            {
                "coefs": torch.ones(4, 4, 64, dtype=torch.int16),
                "qtable": torch.ones(64, dtype=torch.int32),
                "mean": torch.ones(8),
                "std": torch.ones(8),
                "freqs": freqs,
            }
        ],
        "dct_rot90": [{"coefs": blocks}],
        "dct_to_rgb": [{"y": torch.randn(2, 64, 2, 2), "cbcr": torch.randn(2, 128, 1, 1)}],
        "dft_cca": [{"x": torch.randn(60, 3, 2, 2), "y": torch.randn(60, 2, 2, 2)}],
        "infer_task": [{"model": superposed, "x": rows}],
        "mask_from_criterion": [{"w_init": matrix, "w_final": matrix + 1, "criterion": "movement", "density": 0.5}],
        "masked_conv2d": [{**conv, "mask": weight > 0}],
        "masked_linear": [{**linear, "mask": mask}, {**linear, "mask": ff.pack_mask(mask)}],
        "pack_mask": [{"mask": mask}],
        "procrustes": [layers],
        "pwcca": [layers],
        "rgb_to_dct": [{"rgb": x, "freqs": freqs, "scale": torch.ones(8)}],
        "rv": [layers],
        "sddmm": [{"a": rows, "b": matrix, "mask": torch.ones(6, 5, dtype=torch.bool)}],
        "sparse_linear": [{"x": rows, "sparse_weight": ff.compress(matrix, mask), "bias": own}],
        "supermask_conv2d": [{**conv, "scores": weight, "seed": torch.tensor(3)}],
        "supermask_linear": [{**linear, "scores": matrix, "seed": torch.tensor(3)}],
        "superposed_linear": [{**linear, "masks": masks, "alpha": torch.ones(2)}],
        "svcca": [layers],
        "task_linear": [{**linear, "masks": masks, "task": torch.zeros(6, dtype=torch.int64)}],
        "threshold_mask": [{"scores": matrix}],
        "topk_mask": [{"scores": matrix, "density": 0.5}],
        "unpack_mask": [{"bits": ff.pack_mask(mask), "k": 8}],
    }


def tensor_functions() -> list[str]:
    functions = [name for name in ff.__all__ if inspect.isfunction(getattr(ff, name))]
    return [name for name in functions if getattr(ff, name).__module__.startswith("fourfold.ops.") and name != "zigzag"]


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def distributed(x: Tensor, mesh: Any, *, sharded: bool) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return DTensor.from_local(x, mesh, [Shard(0) if sharded and x.dim() else Replicate()])


@pytest.mark.filterwarnings("ignore:.*chance:UserWarning")  # of cca, about few samples
@pytest.mark.parametrize("name", tensor_functions())
def test_refuses_dtensors(name, mesh):
    """Every function, in every argument that takes a tensor."""
    function = getattr(ff, name)
    taken = set()
    for arguments in calls()[name]:
        function(**arguments)
        for key, value in arguments.items():
            for sharded in (False, True) if isinstance(value, (Tensor, dict)) else ():
                if isinstance(value, dict):
                    shared: Any = {of: distributed(x, mesh, sharded=sharded) for of, x in value.items()}
                else:
                    shared = distributed(value, mesh, sharded=sharded)
                with pytest.raises(TypeError) as caught:
                    function(**{**arguments, key: shared})
                what = f"layer {next(iter(value))!r}" if isinstance(value, dict) else key
                assert str(caught.value).startswith(f"{name}: {what}")
                assert " must be a plain tensor, got a DTensor; pass its .to_local()" in str(caught.value)
                taken.add(key)
    tensors = {key for key, p in inspect.signature(function).parameters.items() if "Tensor" in str(p.annotation)}
    assert taken == tensors


def test_others_refuse_dtensors(mesh):
    """Whatever else takes a tensor or a layer, in its own words."""
    x, mask = torch.randn(6, 8), torch.rand(6, 8) < 0.5
    shared = distributed(x, mesh, sharded=True)
    linear, conv = nn.Linear(8, 6), nn.Conv2d(3, 4, 3)
    for layer in (linear, conv):
        layer.weight = nn.Parameter(distributed(layer.weight.detach(), mesh, sharded=True))
    refused = {
        "StreamingCCA.update: layer 'a'": lambda: ff.StreamingCCA().update({"a": shared}),
        "SparseWeight: values": lambda: ff.SparseWeight(distributed(x[mask], mesh, sharded=False), mask, (6, 8)),
        "SparseWeight: mask": lambda: ff.SparseWeight(x[mask], distributed(mask, mesh, sharded=False), (6, 8)),
        "BlockDCT2d: scale": lambda: ff.nn.BlockDCT2d(scale=distributed(torch.ones(64), mesh, sharded=False)),
        "MaskedLinear.from_linear: weight": lambda: ff.nn.MaskedLinear.from_linear(linear),
        "SupermaskLinear.from_linear: weight": lambda: ff.nn.SupermaskLinear.from_linear(linear),
        "MaskedConv2d.from_conv: weight": lambda: ff.nn.MaskedConv2d.from_conv(conv),
        "CoordConv2d.from_conv: weight": lambda: ff.nn.CoordConv2d.from_conv(conv),
    }
    for what, call in refused.items():
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value).startswith(f"{what} must be a plain tensor, got a DTensor; "), str(caught.value)


def test_leaf_ops_refuse_dtensors(mesh):
    """Called by their names in torch.ops, in torch's words."""
    x = distributed(torch.randn(1, 1, 8, 8), mesh, sharded=False)
    with pytest.raises(NotImplementedError, match=r"fourfold\.block_dct\.default does not have a sharding strategy"):
        torch.ops.fourfold.block_dct(x, 8, "planar", None, None, 0.0)
    with pytest.raises(RuntimeError, match=r"fourfold\.block_dct\.default got mixed torch\.Tensor and DTensor"):
        torch.ops.fourfold.block_dct(x, 8, "planar", None, torch.ones(1, 64), 0.0)


def test_compiled_functions_refuse_dtensors(mesh):
    x = torch.randn(1, 1, 8, 8)
    compiled = torch.compile(ff.block_dct, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), ff.block_dct(x))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="block_dct: x must be a plain tensor, got a DTensor"):
        compiled(distributed(x, mesh, sharded=False))


def test_what_a_part_is_for(mesh):
    """The fix that the error names."""
    x = distributed(torch.randn(2, 1, 8, 8), mesh, sharded=True)
    assert torch.equal(ff.block_dct(x.to_local()), ff.block_dct(x.full_tensor()))


def test_torch_distributed_tensor_is_not_imported():
    """By an error check that nobody needs who has none."""
    program = "import sys, torch, fourfold as ff; ff.block_dct(torch.ones(1, 1, 8, 8)); "
    program += "print('torch.distributed.tensor' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# ---- data ----------------------------------------------------------------------------------------------------------------

needs_jpeg = pytest.mark.skipif(not ff.has_jpeg(), reason="this fourfold was built without libjpeg")
#: Of Python, about fork in a process that has threads; of torch, about more workers than CPUs.
of_workers = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """16 copies of one file of 96 x 96 pixels, of which no two crops are the same."""
    image = pytest.importorskip("PIL.Image", reason="the files are written by Pillow; run: pip install pillow")
    folder = tmp_path_factory.mktemp("pictures")
    pixels = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    paths = [folder / f"{number}.jpg" for number in range(16)]
    for path in paths:
        image.fromarray(pixels.numpy()).save(path, quality=90, subsampling="4:2:0")
    return paths


def crops(
    pictures: list[Path], rank: int, context: str, seed: int, own: bool
) -> tuple[list[list[int]], list[dict[int, bytes]]]:
    """(samples in order, {sample: its crop}) of two epochs of one of two processes, with two workers that stay."""
    data = ff.jpeg.DctDataset(pictures, list(range(16)), size=16, train=True)
    sampler = DistributedSampler(data, num_replicas=2, rank=rank, seed=5)
    torch.manual_seed(seed)
    loader = DataLoader(
        data, 2, sampler=sampler, num_workers=2, persistent_workers=True, multiprocessing_context=context,
        collate_fn=ff.jpeg.collate, generator=torch.Generator().manual_seed(seed + rank) if own else None,
    )  # fmt: skip
    orders, found = [], []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order, cropped = [], {}
        for y, cbcr, targets in loader:
            order += targets.tolist()
            planes = torch.cat([y.flatten(1), cbcr.flatten(1)], 1)
            cropped |= {target: plane.numpy().tobytes() for target, plane in zip(targets.tolist(), planes, strict=True)}
        orders.append(order)
        found.append(cropped)
    return orders, found


@needs_jpeg
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings(*(mark.args[0] for mark in of_workers))
def test_dataset_of_several_processes(pictures, context):
    """Each sample once an epoch, in another order, and crops of its own in every worker, epoch and process."""
    ranks = [crops(pictures, rank, context, seed=3, own=True) for rank in range(2)]
    for epoch in range(2):
        assert sorted(ranks[0][0][epoch] + ranks[1][0][epoch]) == list(range(16))
    assert ranks[0][0][0] != ranks[0][0][1]
    everywhere = [crop for _orders, epochs in ranks for cropped in epochs for crop in cropped.values()]
    # 32 crops out of 72: two workers, epochs or processes in step would have 16 at most.
    assert len(everywhere) == 32
    assert len(set(everywhere)) > 20
    assert crops(pictures, 0, "fork", seed=3, own=True) == ranks[0]  # repeatable, and the same however workers start


@needs_jpeg
@pytest.mark.filterwarnings(*(mark.args[0] for mark in of_workers))
def test_processes_of_one_seed_crop_alike(pictures):
    """As torch's generator is the only source of randomness, and seeded alike without a generator of the loader's own."""
    alike, other = ([list(e.values()) for e in crops(pictures, rank, "fork", seed=3, own=False)[1]] for rank in range(2))
    assert alike == other
    assert alike[0] != alike[1]


# ---- examples ------------------------------------------------------------------------------------------------------------


def run_example(name: str, *arguments: str, processes: int = 1, **environment: str) -> str:
    """What it prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(EXAMPLES / name), *arguments]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings, timeout=180)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_example_trains_with_any_processes(tmp_path):
    """Two that shard do what one does, and leave a checkpoint for each epoch."""
    alone = run_example("train_ddp.py", "--quick", "--epochs", "2").splitlines()
    both = run_example("train_ddp.py", "--quick", "--fsdp", "--checkpoint", str(tmp_path), processes=2).splitlines()
    assert alone[-1] == "1 processes, DistributedDataParallel, gloo"
    assert both[-1] == "2 processes, fully_shard, gloo"
    assert len(alone) == len(both) == 3
    assert alone[:-1] == both[:-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001", "0002"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [([], ["--fsdp"]), (["--fsdp"], [])])
def test_example_goes_on(tmp_path, first, then):
    """With more processes, that do otherwise; and learns."""
    never_stopped = run_example("train_ddp.py", "--epochs", "5").splitlines()
    run_example("train_ddp.py", *first, "--epochs", "3", "--checkpoint", str(tmp_path), processes=2)
    resumed = run_example("train_ddp.py", *then, "--epochs", "5", "--checkpoint", str(tmp_path), processes=4).splitlines()
    assert resumed[:-1] == never_stopped[3:-1]
    assert float(resumed[1].split()[2].rstrip("%")) > 98


@pytest.mark.slow
@needs_jpeg
def test_example_streams_with_ray():
    pytest.importorskip("ray", reason="streams JPEG files through Ray Data; run: pip install 'ray[data]'")
    printed = run_example("stream_jpegs_with_ray.py", "--quick").splitlines()
    assert printed[0].startswith("epoch 1: 200 files in ")
    assert printed[1].startswith("epoch 2: 200 files in ")
    assert int(printed[1].split("; ")[1].split("%")[0]) > 90
    assert "64 x 64 pixels became [64, 8, 8] and [128, 4, 4], at " in printed[2]
