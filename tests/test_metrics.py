"""CCAMetric in everything that torchmetrics does with a metric. Skipped without torchmetrics, except for what happens then."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from battery import run_script
from fourfold import metrics
from fourfold.ops.cca import cca, cka, procrustes, pwcca, rv, svcca
from fourfold.ops.cca_dft import dft_cca
from fourfold.ops.cca_streaming import StreamingCCA
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:.*chance level:UserWarning")

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cca": cca,
    "svcca": svcca,
    "pwcca": pwcca,
    "cka": cka,
    "procrustes": procrustes,
    "rv": rv,
}
EXACT = 1e-13


@pytest.fixture(autouse=True)
def _torchmetrics(request: pytest.FixtureRequest) -> None:
    if importlib.util.find_spec("torchmetrics") is None and "optional" not in request.node.name:
        pytest.skip("needs torchmetrics; run: pip install torchmetrics")


def metric(method: str = "svcca", **options: Any) -> Any:
    return metrics.CCAMetric(method, **options)


def updated(method: str = "svcca", data: Any = None, **options: Any) -> Any:
    made = metric(method, **options)
    for x, y in pairs() if data is None else data:
        made.update(x, y)
    return made


def pairs(*sizes: int, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of two layers that have something in common, with means far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(7, 5, generator=generator)
    batches = []
    for n in sizes or (40, 25, 60):
        x = torch.randn(n, 7, generator=generator) + 3
        batches.append((x, x @ mix + 2 * torch.randn(n, 5, generator=generator)))
    return batches


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


def close(a: Any, b: Any) -> bool:
    return abs(float(a) - float(b)) < EXACT


# ---- values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FUNCTIONS)
def test_is_the_similarity_of_all_samples(method):
    """Added by update or by forward, which returns that of the batch."""
    batches, function = pairs(), FUNCTIONS[method]
    by_update, by_forward = metric(method), metric(method)
    for x, y in batches:
        assert by_update.update(x, y) is None
        assert close(by_forward(x, y), function(x, y))
    for made in (by_update, by_forward):
        value = made.compute()
        assert close(value, function(*joined(batches)))
        assert value.dtype == torch.float64
        assert value.shape == ()
        assert made.update_count == 3


def test_options_of_the_method():
    x, y = joined(pairs())
    assert close(updated("svcca", variance=0.8).compute(), svcca(x, y, variance=0.8))
    assert close(updated("cka", unbiased=True).compute(), cka(x, y, unbiased=True))
    assert close(updated("pwcca", weights="y").compute(), pwcca(x, y, weights="y"))
    assert not close(updated("cca", rtol=0.6).compute(), cca(x, y))
    assert close(updated("cca", rtol=0.6).compute(), cca(x, y, rtol=0.6))


def test_convolutions():
    batches = [(torch.randn(30, 4, 6, 6), torch.randn(30, 3, 3, 3)) for _ in range(3)]
    x, y = joined(batches)
    pooled = nn.functional.adaptive_avg_pool2d(x.double(), 3).movedim(1, 3).flatten(0, 2)
    assert close(updated("cka", batches).compute(), cka(pooled, y.movedim(1, 3).flatten(0, 2)))
    assert close(updated("cka", batches, conv="avgpool").compute(), cka(x.double().mean((2, 3)), y.double().mean((2, 3))))
    assert close(updated("cka", batches, conv="flatten").compute(), cka(x.flatten(1), y.flatten(1)))
    same = [(a, b[:, :, :, :].repeat(1, 1, 2, 2)) for a, b in batches]
    made = updated("dft_cca", same, conv="dft")
    expected = dft_cca(*joined(same))
    assert close(made.compute(), expected)
    assert close(pickle.loads(pickle.dumps(made)).compute(), expected)  # complex sums
    assert made(*same[0]).isfinite()


def test_precision():
    fast = updated("cka", precision="fast")
    assert 0 < abs(fast.compute() - updated("cka").compute()) < 1e-5


# ---- state -----------------------------------------------------------------------------------------------------------------


def test_reset():
    made = updated()
    made.compute()
    made.reset()
    assert made.update_count == 0
    assert made.statistics == []
    made.update(torch.randn(50, 3), torch.randn(50, 2))  # other widths
    assert made.compute() < 1


def test_copies_are_independent():
    made = updated()
    value = made.compute()
    for other in (made.clone(), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert close(other.compute(), value)
        other.update(*pairs(30, seed=9)[0])
        assert not close(other.compute(), value)
    assert close(made.compute(), value)
    assert type(pickle.loads(pickle.dumps(made))) is metrics.CCAMetric
    fresh = pickle.loads(pickle.dumps(metric("cka", unbiased=True)))
    fresh.update(*joined(pairs()))
    assert close(fresh.compute(), cka(*joined(pairs()), unbiased=True))


def test_state_dict():
    """Empty unless it is asked for; then a tensor that weights_only=True reads, from which a new metric goes on."""
    first, second = pairs()[:1], pairs()[1:]
    made = updated("cka", first)
    assert not made.state_dict()
    assert not nn.ModuleList([made]).state_dict()
    made.persistent(True)
    module = nn.ModuleDict({"similarity": made})
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == ["similarity.statistics"]
    again = nn.ModuleDict({"similarity": metric("cka")})
    again.similarity.persistent(True)
    again.load_state_dict(state)
    for x, y in second:
        again.similarity.update(x, y)
    assert close(again.similarity.compute(), cka(*joined(pairs())))
    assert close(made.compute(), cka(*first[0]))


def test_states_of_another_kind_are_refused():
    other = metric("cka", conv="flatten")
    other.statistics = updated("cka").statistics
    with pytest.raises(ValueError, match="made with conv='channels', this has conv='flatten'"):
        other.update(*pairs()[0])


def test_merge_state():
    first, second = pairs()[:2], pairs()[2:]
    expected = svcca(*joined(pairs()))
    by_metric, by_state = updated("svcca", first), updated("svcca", first)
    other = updated("svcca", second)
    by_metric.merge_state(other)
    by_state.merge_state(other.metric_state)
    for made in (by_metric, by_state):
        assert close(made.compute(), expected)
        assert len(made.statistics) == 1
    assert close(other.compute(), svcca(*second[0]))
    empty = metric()
    empty.merge_state(other)
    assert len(empty.statistics) == 1


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.set_dtype(torch.float16),
        lambda m: m.to("cpu"),
        lambda m: nn.ModuleList([m]).bfloat16()[0],
    ],
    ids=["to", "half", "float", "set_dtype", "device", "in a module"],
)
def test_casts_leave_the_sums_alone(cast):
    made = updated("cka")
    value = updated("cka").compute()
    assert cast(made) is made
    assert made.statistics[0].dtype == torch.float64
    assert close(made.compute(), value)
    made.update(*pairs(20)[0])


def test_moves_with_its_module():
    """To a device without values, as far as can be shown without another."""
    made = updated("cka")
    made.to("meta")
    assert made.device.type == "meta"
    assert [part.device.type for part in made.statistics] == ["meta"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        made.update(*pairs()[0])
    assert str(caught.value) == "CCAMetric: x must be on the metric's device meta, got cpu; move the metric with .to('cpu')"


def test_sums_kept_on_the_cpu():
    made = updated("cka", compute_on_cpu=True)
    assert close(made(*pairs()[0]), cka(*pairs()[0]))
    assert close(made.compute(), cka(*joined([*pairs(), pairs()[0]])))


# ---- errors leave it as it was ---------------------------------------------------------------------------------------------


def test_a_batch_too_small_for_cca():
    """forward refuses it, as there is nothing to return; update takes it."""
    batches = pairs(40, 5, 30)
    made = updated("cca", batches[:1])
    for _ in range(2):
        with pytest.raises(ValueError, match="n=5 samples for 7 dimensions"):
            made(*batches[1])
        assert made.update_count == 1
        assert close(made.compute(), cca(*batches[0]))
    made.update(*batches[1])
    made(*batches[2])
    assert close(made.compute(), cca(*joined(batches)))


@pytest.mark.parametrize("on_step", [False, True])
@pytest.mark.parametrize("call", ["update", "forward"])
def test_refused_batches(call, on_step):
    made = updated("cka", dist_sync_on_step=on_step)
    value = made.compute()
    x, y = pairs()[0]
    broken = x.clone()
    broken[3, 2] = float("nan")
    alone = (call, on_step) == ("forward", False)  # the batch is seen before it meets the others
    for bad, error, message in (
        ((broken, y), ValueError, f"layer 'x' holds 1 NaN or infinite values in batch {0 if alone else 3} of shape"),
        ((x, y[:-1]), ValueError, "layers must share the batch"),
        ((x[:, :3], y), ValueError, "both must have the same" if alone else "layer 'x' must have 7 features"),
        ((x.long(), y), TypeError, "layer 'x' must be float16, bfloat16, float32 or float64, got int64"),
        (("x", y), TypeError, "layer 'x' must be a Tensor, got str"),
    ):
        with pytest.raises(error) as caught:
            getattr(made, call)(*bad)
        assert message in str(caught.value)
        made._computed = None
        assert close(made.compute(), value)
    made.update(x, y)
    assert close(made.compute(), cka(*joined([*pairs(), (x, y)])))


def test_interrupted_forward(monkeypatch):
    made = updated("cka")
    value = made.compute()

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamingCCA, "compute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made(*pairs()[0])
    assert made.update_count == 3
    assert close(made.compute(), value)
    assert close(made(*pairs()[0]), cka(*pairs()[0]))


def test_nothing_was_added():
    made = metric()
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(ValueError, match="nothing was updated yet"),
    ):
        made.compute()
    assert made.statistics == []
    made.update(torch.randn(0, 3), torch.randn(0, 2))
    with pytest.raises(ValueError, match="nothing was updated yet"):
        made.compute()
    assert close(updated("cka", [(torch.randn(0, 7), torch.randn(0, 5)), *pairs()]).compute(), cka(*joined(pairs())))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "method": (
        lambda: metric("ccka"),
        ValueError,
        "CCAMetric: method must be one of ('cca', 'svcca', 'pwcca', 'cka', 'procrustes', 'rv', 'dft_cca'), got 'ccka'",
    ),
    "conv": (
        lambda: metric(conv="pool"),
        ValueError,
        "CCAMetric: conv must be one of ('channels', 'flatten', 'avgpool', 'dft'), got 'pool'",
    ),
    "precision": (
        lambda: metric(precision="low"),
        ValueError,
        "CCAMetric: precision must be one of ('high', 'fast'), got 'low'",
    ),
    "dft": (
        lambda: metric("cka", conv="dft"),
        ValueError,
        "CCAMetric: conv='dft' cannot give 'cka'; method='dft_cca' and conv='dft' go together",
    ),
    "rbf": (
        lambda: metric("cka", kernel="rbf"),
        ValueError,
        "CCAMetric: kernel must be 'linear', got 'rbf': RBF CKA takes all samples; use fourfold.cka",
    ),
    "option": (lambda: metric("cka", variance=0.9), ValueError, "Unexpected keyword arguments: `variance`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# ---- collections -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each StreamingCCA.update."""
    calls: list[int] = []
    original = StreamingCCA.update

    def counted(self: StreamingCCA, activations: Any) -> StreamingCCA:
        calls.append(1)
        return original(self, activations)

    monkeypatch.setattr(StreamingCCA, "update", counted)
    return calls


def collection(**options: Any) -> Any:
    from torchmetrics import MetricCollection

    members = {
        "svcca": metric("svcca"),
        "cka": metric("cka"),
        "flat": metric("cka", conv="flatten"),
        "fast": metric("cka", precision="fast"),
    }
    return MetricCollection(members, prefix="val/", **options)


def test_collection(updates):
    """Metrics of one conv and precision become a group that adds up once, and gives what each one alone would."""
    together = collection()
    batches = pairs()
    for i, (x, y) in enumerate(batches):
        together.update(x, y)
        assert len(updates) == 4 + 3 * i
    assert sorted(map(sorted, together.compute_groups.values())) == [["cka", "svcca"], ["fast"], ["flat"]]
    x, y = joined(batches)
    values = together.compute()
    assert set(values) == {"val/svcca", "val/cka", "val/flat", "val/fast"}
    assert close(values["val/svcca"], svcca(x, y))
    assert close(values["val/cka"], cka(x, y))
    assert close(values["val/flat"], cka(x, y))
    assert abs(values["val/fast"] - cka(x, y)) < 1e-5
    copied = together.clone(prefix="test/")
    together.reset()
    together.update(*batches[0])
    assert close(together.compute()["val/svcca"], svcca(*batches[0]))
    assert close(copied.compute()["test/svcca"], svcca(x, y))
    assert close(pickle.loads(pickle.dumps(copied)).compute()["test/cka"], cka(x, y))


@pytest.mark.parametrize("groups", [True, False])
def test_collection_by_forward_and_update(groups):
    """In turns."""
    together = collection(compute_groups=groups)
    batches = pairs(30, 31, 32, 33, 34)
    for i, (x, y) in enumerate(batches):
        if i in (1, 4):
            together.update(x, y)
        else:
            values = together(x, y)
            assert close(values["val/svcca"], svcca(x, y))
            assert close(values["val/cka"], cka(x, y))
        so_far = joined(batches[: i + 1])
        values = together.compute()
        assert close(values["val/svcca"], svcca(*so_far)), i
        assert close(values["val/cka"], cka(*so_far)), i


def test_members_of_a_group_do_not_write_to_each_other():
    together = collection()
    batches = pairs()
    together.update(*batches[0])
    together.update(*batches[1])
    together["cka"].update(*batches[2])
    assert close(together["svcca"].compute(), svcca(*joined(batches[:2])))


def test_wrappers_and_arithmetic():
    from torchmetrics import MetricTracker

    distance = 1 - metric("cka")
    tracker = MetricTracker(metric("cka"))
    for x, y in pairs():
        distance.update(x, y)
        tracker.increment()
        tracker.update(x, y)
    assert close(distance.compute(), 1 - cka(*joined(pairs())))
    expected = [float(cka(x, y)) for x, y in pairs()]
    torch.testing.assert_close(tracker.compute_all(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=EXACT)


def test_plot():
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    made = updated("cka")
    figure, axes = made.plot()
    assert axes.lines
    _, again = made.plot([made.compute(), made(*pairs()[0])], axes)
    assert again is axes
    pyplot.close(figure)


# ---- processes -------------------------------------------------------------------------------------------------------------


def shard(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """Uneven."""
    return pairs(40, 25, 60, 10, 33)[rank::world]


def process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    try:
        mine = shard(rank, world)
        made = {"svcca": updated("svcca", mine), "cka": updated("cka", mine, unbiased=True)}
        found = {name: m.compute() for name, m in made.items()}
        for name, m in made.items():  # which has its own sums again
            assert not m._is_synced
            m.sync_on_compute = m._to_sync = False
            m._computed = None
            found[f"local {name}"] = m.compute()
        found["without rank 1"] = updated("cka", [] if rank == 1 else mine).compute()
        step = metric("cka", dist_sync_on_step=True)
        found["step"] = step(*pairs(20, 21, 22, 23)[rank])
        found["steps"] = step.compute()
        group = torch.distributed.new_group([0, world - 1])
        if rank in (0, world - 1):
            found["group"] = updated("cka", mine, process_group=group).compute()
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.filterwarnings("ignore:.*before the ``update`` method", "ignore:.*multi-threaded, use of fork")
def test_processes(world: int, tmp_path: Path) -> None:
    """gloo on this machine: what one process would give; also where one of them has no data."""
    # Forked, as a DataLoader's workers are: importing torchmetrics anew in each would take most of the time.
    running = mp.start_processes(process, (world, str(tmp_path)), nprocs=world, join=False, start_method="fork")
    until = time.monotonic() + 120
    try:
        while not running.join(5):
            assert time.monotonic() < until, "the processes wait for each other"
    finally:
        for child in running.processes:
            child.kill()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    shards = [shard(rank, world) for rank in range(world)]

    def of(*ranks: int) -> tuple[Tensor, Tensor]:
        return joined([batch for rank in ranks for batch in shards[rank]])

    x, y = of(*range(world))
    for rank, values in enumerate(found):
        assert abs(values["svcca"] - svcca(x, y).mean) < 5e-15
        assert abs(values["cka"] - cka(x, y, unbiased=True)) < 5e-15
        assert close(values["local svcca"], svcca(*of(rank)))
        assert close(values["local cka"], cka(*of(rank), unbiased=True))
        assert close(values["without rank 1"], cka(*of(*(r for r in range(world) if r != 1))))
        batches = pairs(20, 21, 22, 23)[:world]
        assert close(values["step"], cka(*joined(batches)))
        assert close(values["steps"], cka(*joined(batches)))
    for rank in (0, world - 1):
        assert close(found[rank]["group"], cka(*of(0, world - 1)))


def pretended(method: str, others: list[Any], **options: Any) -> Any:
    """A metric that believes it is one of several processes."""

    def gather(mine: Tensor, group: Any = None) -> list[Tensor]:
        return [mine, *(part for other in others for part in other.statistics)]

    return metric(method, distributed_available_fn=lambda: True, dist_sync_fn=gather, **options)


def test_sync_and_unsync():
    mine, theirs = pairs()[:2], pairs()[2:]
    made = pretended("cka", [updated("cka", theirs)])
    for x, y in mine:
        made.update(x, y)
    assert close(made.compute(), cka(*joined(pairs())))
    with made.sync_context(dist_sync_fn=made.dist_sync_fn):
        assert made._is_synced
    assert not made._is_synced
    assert close(made(*theirs[0]), cka(*theirs[0]))  # a step is this process's own
    made.sync_on_compute = made._to_sync = False
    assert close(made.compute(), cka(*joined([*mine, *theirs])))


def test_an_error_in_a_synced_compute():
    """Does not leave the others' sums here."""
    few = pairs(3, 3)
    made = pretended("cca", [updated("cca", few[1:])])
    made.update(*few[0])
    for _ in range(2):
        with pytest.raises(ValueError, match="n=6 samples for 7 dimensions"):
            made.compute()
        assert not made._is_synced
    made.update(*pairs()[0])
    assert close(made.compute(), cca(*joined([*few, pairs()[0]])))


# ---- the package that it needs ---------------------------------------------------------------------------------------------


def test_optional_package():
    """fourfold does not import torchmetrics, and says what to do where there is none."""
    run_script(
        "import sys; from fourfold import metrics; assert 'torchmetrics' not in sys.modules\n"
        "sys.modules['torchmetrics'] = None; assert metrics.__all__ == dir(metrics) == ['CCAMetric']\n"
        "try: metrics.CCAMetric\n"
        "except ImportError as error: assert str(error) == 'fourfold.metrics.CCAMetric needs torchmetrics; run: pip install "
        "torchmetrics', error\n"
        "else: raise AssertionError\n"
        "try: metrics.Nothing\n"
        "except AttributeError as error: assert 'Nothing' in str(error)\n"
    )
