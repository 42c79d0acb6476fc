"""What test_distributed.py runs in every process of a group: models of each family, training, checkpoints.

A case is a function of a `Process`; all processes of a world run all its cases in one order and save what they return. The
test process imports this file too, trains the same models alone, and compares.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fourfold as ff
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from fourfold.ops import cca_streaming as streaming
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

BATCH, STEPS = 8, 3
F64 = torch.float64


# ---- models --------------------------------------------------------------------------------------------------------------


class Gathered(torch.autograd.Function):
    """The rows of all processes, in order of rank; backward adds up what each process's loss says of this one's rows."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.rows = len(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad[dist.get_rank() * ctx.rows :][: ctx.rows]


def gathered(x: Tensor) -> Tensor:
    """x where there is one process."""
    return Gathered.apply(x) if dist.is_initialized() else x


class Twins(nn.Module):
    """Two branches that are to agree: the loss is 1 - CKA over the whole batch, which is no mean over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(10, 6, bias=False)
        self.two = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.two(x)
        return 1 - ff.cka(gathered(a), gathered(b), unbiased=True)


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


class OneOf(nn.Module):
    """Two layers, of which a step uses one: the other's parameters get no gradient."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.uses_second = False

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) if self.uses_second else self.first(x)


def coordconv() -> nn.Module:
    return nn.Sequential(
        ff.nn.CoordConv2d(3, 6, 3, padding=1, with_r=True, activation="relu"),
        ff.nn.CoordConvTranspose2d(6, 4, 2, stride=2, activation="silu"),  # coord_weight has 2 rows
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def blockdct() -> nn.Module:
    scale = nn.Parameter(torch.rand(3, 10) + 0.5)
    dct = ff.nn.BlockDCT2d(8, freqs=ff.zigzag()[:10].tolist(), scale=scale, shift=-0.5)
    return nn.Sequential(dct, nn.Conv2d(30, 8, 1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 4, 5))


def masked() -> nn.Module:
    conv, linear = (torch.rand(shape) < 0.4 for shape in ((6, 3, 3, 3), (5, 6)))
    return nn.Sequential(
        ff.nn.MaskedConv2d(3, 6, 3, padding=1, mask=conv),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.SiLU(),
        ff.nn.MaskedLinear(6, 5, mask=linear),
    )


def supermask(sampler: str, wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> nn.Module:
    options: dict[str, Any] = {"topk": {"density": 0.5, "signed": True}}.get(sampler, {"rescale": "dwr"})
    return nn.Sequential(
        wrap(ff.nn.SupermaskConv2d(3, 6, 3, padding=1, sampler=sampler, **options)),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        wrap(ff.nn.SupermaskLinear(24, 5, sampler=sampler, **options)),
    )


def exactly(count: int, *shape: int) -> Tensor:
    """A mask that keeps so many."""
    places = torch.randperm(math.prod(shape))
    return (places < count).view(shape)


def sparse() -> nn.Module:
    first, second = ff.compress(torch.randn(9, 12), exactly(33, 9, 12), format="csr16"), torch.randn(5, 9)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        ff.nn.SparseLinear(first, torch.zeros(9)),  # neither 2 nor 4 processes share its values evenly
        nn.Tanh(),
        ff.nn.SparseLinear(ff.compress(second, exactly(31, 5, 9), format="dense"), torch.zeros(5)),
    )


def superposed() -> nn.Module:
    masks = [torch.rand(9, 12) < 0.5 for _ in range(3)]
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 12),
        ff.nn.SuperposedLinear(12, 9, masks=masks),  # its weight is frozen, its bias is not
        nn.Tanh(),
        nn.Linear(9, 5),
    )


def one_of_two() -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        OneOf(ff.nn.SupermaskLinear(12, 5, sampler="topk", density=0.5), ff.nn.MaskedLinear(12, 5)),
    )


def similarity() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10), nn.Tanh(), Twins())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "coordconv": coordconv,
    "blockdct": blockdct,
    "masked": masked,
    "topk": functools.partial(supermask, "topk"),
    "threshold": functools.partial(supermask, "threshold"),
    "bernoulli": functools.partial(supermask, "bernoulli"),
    "sparse": sparse,
    "superposed": superposed,
    "one_of_two": one_of_two,
    "cka": similarity,
    "topk, checkpointed": functools.partial(supermask, "topk", Checkpointed),
    "bernoulli, checkpointed": functools.partial(supermask, "bernoulli", Checkpointed),
}
#: What the layers of these names are: one group of parameters each under FSDP2, which is how a network is sharded.
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, ff.nn.SparseLinear, ff.nn.BlockDCT2d)


def build(name: str, dtype: torch.dtype = F64) -> nn.Module:
    """The same model in every process."""
    torch.manual_seed(sorted(MODELS).index(name.partition(",")[0]))
    return MODELS[name]().to(dtype)


def batch(step: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: images [BATCH, 3, 16, 16] and classes."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=F64)
    return x.to(dtype), torch.randint(5, (BATCH,), generator=generator)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """A mean over samples, or what the model itself says."""
    return output if output.dim() == 0 else F.cross_entropy(output, target)


# ---- training ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Process:
    """One of a world."""

    rank: int
    world: int
    folder: Path  # the same for all worlds

    @functools.cached_property
    def mesh(self) -> Any:
        return init_device_mesh("cpu", (self.world,))

    def part(self, x: Tensor) -> Tensor:
        """This process's rows of a whole batch."""
        rows = len(x) // self.world
        return x[self.rank * rows :][:rows]

    def ddp(self, model: nn.Module, **options: Any) -> nn.Module:
        return DistributedDataParallel(model, **options)

    def fsdp(self, model: nn.Module, **options: Any) -> nn.Module:
        for layer in list(model.modules()):
            if isinstance(layer, LAYERS):
                fully_shard(layer, mesh=self.mesh, **options)
        return fully_shard(model, mesh=self.mesh, **options)


ALONE = Process(0, 1, Path())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Scores take steps large enough to change a small mask at each."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scores = [p for name, p in trained.items() if name.endswith("scores")]
    others = [p for name, p in trained.items() if not name.endswith("scores")]
    groups = [{"params": others}, {"params": scores, "lr": 20.0}]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.5, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, process: Process, steps: range = range(STEPS)) -> list[float]:
    """This process's losses. Random masks are those of the step, in every process."""
    losses = []
    for step in steps:
        for layer in model.modules():
            if isinstance(layer, OneOf):
                layer.uses_second = step % 2 == 1
        x, target = batch(step)
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = loss_of(model(process.part(x)), process.part(target))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Names and tensors as of the model that is not distributed."""
    options = StateDictOptions(full_state_dict=True)
    return {name: value.detach().clone() for name, value in get_model_state_dict(model, options=options).items()}


def trained_alone(name: str) -> tuple[dict[str, Tensor], list[float]]:
    model = build(name)
    losses = train(model, optimizer_of(model), ALONE)
    return whole_state(model), losses


# ---- cases ---------------------------------------------------------------------------------------------------------------

#: {name: (worlds that run it, the function)}
CASES: dict[str, tuple[tuple[int, ...], Callable[[Process], Any]]] = {}


def case(*worlds: int, name: str | None = None) -> Callable[[Callable[[Process], Any]], Callable[[Process], Any]]:
    def add(function: Callable[[Process], Any]) -> Callable[[Process], Any]:
        CASES[name or function.__name__] = worlds, function
        return function

    return add


def _train_with(how: str, name: str, process: Process) -> dict[str, Any]:
    model = build(name)
    if how == "ddp":
        if process.rank:  # overwritten by the first process's before training begins
            with torch.no_grad():
                for value in model.state_dict().values():
                    value.zero_()
        model = process.ddp(model, find_unused_parameters=name == "one_of_two")
    else:
        model = process.fsdp(model)
    losses = train(model, optimizer_of(model), process)
    shards = {n: list(p.to_local().shape) for n, p in model.named_parameters() if how == "fsdp"}
    return {"state": whole_state(model), "losses": losses, "shards": shards}


for _how in ("ddp", "fsdp"):
    for _name in MODELS:
        case(2, 4, name=f"{_how}: {_name}")(functools.partial(_train_with, _how, _name))


@case(2, 4)
def ddp_masks_of_their_own(process: Process) -> dict[str, Tensor]:
    """Gradients where every process has a seed of its own."""
    return _gradients(process, process.ddp(build("bernoulli")))


@case(2)
def fsdp_masks_of_their_own(process: Process) -> dict[str, Tensor]:
    return _gradients(process, process.fsdp(build("bernoulli")))


def _gradients(process: Process, model: nn.Module) -> dict[str, Tensor]:
    x, target = batch(0)
    torch.manual_seed(process.rank)
    loss_of(model(process.part(x)), process.part(target)).backward()
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# ---- precision

BF16 = torch.bfloat16
HALVED = ("coordconv", "blockdct", "masked", "topk", "bernoulli", "sparse", "superposed")


def near_ties(model: nn.Module) -> nn.Module:
    """Scores that differ less than bfloat16 tells apart."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("scores"):
                p.mul_(0.01).add_(1)
    return model


def _in_bfloat16(name: str, process: Process) -> dict[str, Any]:
    """Output and gradients where fully_shard hands bfloat16 parameters to the layers, and the masks they make of them."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    model = process.fsdp(near_ties(build(name, torch.float32)), mp_policy=policy)
    masks = []
    for layer in model.modules():
        if name == "topk" and hasattr(layer, "make_mask"):
            layer.unshard()
            masks.append(layer.make_mask())
            layer.reshard()
    x, target = batch(0, torch.float32)
    torch.manual_seed(0)
    output = model(process.part(x))
    loss_of(output.float(), process.part(target)).backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    return {"output": output.detach(), "gradients": gradients, "masks": masks}


for _name in HALVED:
    case(2, name=f"bfloat16: {_name}")(functools.partial(_in_bfloat16, _name))


def _autocast(how: str, name: str, process: Process) -> Tensor:
    """Output under autocast, which leaves scores in float32."""
    model = build(name, torch.float32)
    model = process.ddp(model) if how == "ddp" else process.fsdp(model)
    x, _target = batch(0, torch.float32)
    torch.manual_seed(0)
    with torch.autocast("cpu", BF16):
        return model(process.part(x)).detach()


for _how in ("ddp", "fsdp"):
    for _name in HALVED:
        case(2, name=f"autocast, {_how}: {_name}")(functools.partial(_autocast, _how, _name))

SCALED = ("coordconv", "topk", "masked")
OVERFLOW = 1  # the step


def scaled(model: nn.Module, process: Process) -> dict[str, Any]:
    """float16 and a GradScaler; in one step the gradient of the last row overflows, which only the last process has."""
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    changed, scales = [], []
    for step in range(4):
        x, target = batch(step, torch.float32)
        weights = torch.ones(BATCH)
        weights[-1] = torch.inf if step == OVERFLOW else 1.0
        before = {name: whole(p).detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            output = model(process.part(x))
        loss = (F.cross_entropy(output.float(), process.part(target), reduction="none") * process.part(weights)).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = dict(model.named_parameters())
        changed.append([not torch.equal(whole(after[name]), value) for name, value in before.items()])
        scales.append(scaler.get_scale())
    return {"state": whole_state(model), "changed": changed, "scales": scales}


def _scaled_with(how: str, name: str, process: Process) -> dict[str, Any]:
    model = build(name, torch.float32)
    return scaled(process.ddp(model) if how == "ddp" else process.fsdp(model), process)


for _how in ("ddp", "fsdp"):
    for _name in SCALED:
        case(2, name=f"float16, {_how}: {_name}")(functools.partial(_scaled_with, _how, _name))


# ---- checkpoints

HALFWAY = 2


def all_masks() -> nn.Module:
    """A layer of each kind that has bits."""
    return nn.Sequential(
        ff.nn.MaskedConv2d(3, 6, 3, padding=1, mask=torch.rand(6, 3, 3, 3) < 0.4),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        ff.nn.SupermaskLinear(24, 9, sampler="bernoulli"),
        ff.nn.SuperposedLinear(9, 9, masks=torch.rand(3, 9, 9) < 0.5),
        nn.Tanh(),
        ff.nn.SparseLinear(ff.compress(torch.randn(7, 9), exactly(31, 7, 9), format="csr16"), torch.zeros(7)),
        nn.Tanh(),
        ff.nn.MaskedLinear(7, 5, mask=torch.rand(5, 7) < 0.5),
    )


MODELS["all masks"] = all_masks


def forgetful(name: str) -> nn.Module:
    """The model with other contents everywhere."""
    model = build(name)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    return model


def save_halfway(process: Process, model: nn.Module, folder: str) -> None:
    optimizer = optimizer_of(model)
    train(model, optimizer, process, range(HALFWAY))
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=process.folder / folder)


def go_on(process: Process, model: nn.Module, folder: str) -> dict[str, Any]:
    """Loads, and trains to the end."""
    optimizer = optimizer_of(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=process.folder / folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    loaded = whole_state(model)
    train(model, optimizer, process, range(HALFWAY, 2 * HALFWAY))
    return {"loaded": loaded, "state": whole_state(model)}


@case(2)
def saves(process: Process) -> None:
    """For the other worlds, too."""
    save_halfway(process, process.fsdp(build("all masks")), "of_fsdp")
    save_halfway(process, process.ddp(build("all masks")), "of_ddp")


@case(2, 4)
def fsdp_goes_on(process: Process) -> dict[str, Any]:
    return go_on(process, process.fsdp(forgetful("all masks")), "of_fsdp")


@case(2, 4)
def fsdp_goes_on_from_ddp(process: Process) -> dict[str, Any]:
    return go_on(process, process.fsdp(forgetful("all masks")), "of_ddp")


@case(2)
def ddp_goes_on_from_fsdp(process: Process) -> dict[str, Any]:
    return go_on(process, process.ddp(forgetful("all masks")), "of_fsdp")


ON_META = ("coordconv", "masked", "topk", "superposed")


def _from_meta(name: str, process: Process) -> dict[str, Tensor]:
    """A model made without memory, sharded, and filled from the first process's state_dict."""
    with torch.device("meta"):
        model = process.fsdp(MODELS[name]().to(F64))
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, build(name).state_dict() if process.rank == 0 else {}, options=options)
    train(model, optimizer_of(model), process)
    return whole_state(model)


for _name in ON_META:
    case(2, name=f"meta: {_name}")(functools.partial(_from_meta, _name))


@case(2)
def other_number_of_values(process: Process) -> str:
    """Loading a SparseLinear of another mask into a sharded one: the error."""
    layers = [nn.Sequential(ff.nn.SparseLinear(ff.compress(torch.ones(6, 8), exactly(count, 6, 8)))) for count in (20, 30)]
    model, state = process.fsdp(layers[0]), layers[1].state_dict()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        return str(error)
    return ""


@case(2)
def frozen_values(process: Process) -> list[Tensor]:
    """Outputs of a frozen SparseLinear that keeps its dense weight, while its shards are averaged with others."""
    torch.manual_seed(0)
    layer = ff.nn.SparseLinear(ff.compress(torch.randn(6, 8), exactly(31, 6, 8), format="dense")).requires_grad_(False)
    model = process.fsdp(nn.Sequential(layer))
    results = []
    with torch.no_grad():
        for _ in range(4):
            results.append(model(torch.eye(8)))
            model.reshard()
            layer.reshard()
            for shard in model.parameters():
                shard.to_local().mul_(2)
    return results


# ---- similarity of layers in a running job


def watched(model: nn.Module, layers: dict[str, nn.Module], process: Process) -> dict[str, Any]:
    """Training, and in the middle and at the end the similarity of layers over all that every process has seen."""
    stream, seen = ff.StreamingCCA(pairs=[("conv", "transposed")]), {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _layer, _args, result, name=name: seen.update({name: result.detach()}))
    optimizer = optimizer_of(model)
    matrices = []
    for step in range(STEPS):
        train(model, optimizer, process, range(step, step + 1))
        stream.update(seen)
        total = copy.deepcopy(stream)  # this process's samples stay apart, to be added up again later
        if process.world > 1:
            total.all_reduce()
        matrices.append(torch.stack([total.compute(method).matrix[0, 1] for method in ("cka", "svcca", "pwcca")]))
    return {"matrices": matrices, "state": whole_state(model)}


def watched_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {"conv": model[0], "transposed": model[1]}


@case(2, 4)
def ddp_watched(process: Process) -> dict[str, Any]:
    model = build("coordconv")
    return watched(process.ddp(model), watched_layers(model), process)


@case(2)
def fsdp_watched(process: Process) -> dict[str, Any]:
    model = process.fsdp(build("coordconv"))
    return watched(model, watched_layers(model), process)


@case(2)
def by_way_of_another_device(process: Process) -> list[Tensor]:
    """all_reduce where the group's backend does not reach the sums' device: here it is told so, and given the CPU again."""
    results = []
    for elsewhere in (False, True):
        stream = ff.StreamingCCA()
        if process.rank:  # the first has no data
            x, _ = batch(0)
            stream.update({"a": x[:, 0].flatten(1)[:, :5], "b": x[:, 1].flatten(1)[:, :4]})
        if elsewhere:
            with (
                mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"),
                mock.patch.object(streaming, "_current", {"cuda": torch.device("cpu")}.__getitem__),
            ):
                stream.all_reduce()
        else:
            stream.all_reduce()
        results.append(stream.compute("cka").matrix)
    return results


# ---- task inference


@case(2)
def infers_tasks(process: Process) -> tuple[list[int], dict[str, Tensor]]:
    """By a sharded model, in every process; training afterwards is as if nothing had happened."""
    model = process.fsdp(build("superposed"))
    found = [ff.infer_task(model, batch(0)[0], method=method) for method in ("oneshot", "binary")]
    train(model, optimizer_of(model), process)
    return found, whole_state(model)


# ---- tensor parallel


@case(2)
def tensor_parallel(process: Process) -> list[str]:
    """What layers say that a parallelize plan has taken in."""
    messages = []
    for layer in (ff.nn.MaskedLinear(8, 6), ff.nn.SupermaskLinear(8, 6, sampler="topk", density=0.5)):
        for style in (ColwiseParallel(), RowwiseParallel()):
            model = parallelize_module(nn.Sequential(copy.deepcopy(layer)), process.mesh, {"0": style})
            x = torch.ones(3, 8 if isinstance(style, ColwiseParallel) else 8 // process.world)
            try:
                model(x)
            except TypeError as error:
                messages.append(str(error))
    return messages


# ---- a process -----------------------------------------------------------------------------------------------------------


def cases_of(world: int) -> Iterator[tuple[str, Callable[[Process], Any]]]:
    for name, (worlds, function) in CASES.items():
        if world in worlds:
            yield name, function


def run(rank: int, world: int, folder: str) -> None:
    """Runs the cases of a world and saves {case: result}, and what "failed"."""
    torch.set_num_threads(1)
    # What one process throws leaves the others waiting; then they throw, too.
    dist.init_process_group(
        "gloo", f"file://{folder}/store{world}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=20)
    )
    process = Process(rank, world, Path(folder))
    results: dict[str, Any] = {}
    name = ""
    try:
        for name, function in cases_of(world):
            results[name] = function(process)
    except Exception:  # the tests of this case and of those that follow, where processes may stand apart, fail with it
        results["failed"] = f"{name}, process {rank}: {traceback.format_exc()}"
    torch.save(results, f"{folder}/{world}.{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # destructors of process groups may wait for one another
