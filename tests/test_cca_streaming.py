"""StreamingCCA against the in-memory measures on all samples at once, in whatever batches, shards and processes they came."""

import itertools
import math
import pickle
import re
import warnings
from pathlib import Path

import fourfold as ff
import pytest
import torch
import torch.multiprocessing as mp
from fourfold.ops import _cca_state, cca_streaming
from torch import Tensor
from torch.nn import functional

METHODS = ("cca", "svcca", "pwcca", "cka", "procrustes", "rv")


def layers(n: int, seed: int = 0, mean: float = 3.0) -> dict[str, Tensor]:
    """Activations with something in common, of every kind: nested grids, channels_last, tokens, [n, d]."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(n, *size, generator=generator, dtype=torch.float64)

    common = noise(3, 8, 8)
    mix = torch.linspace(-1, 1, 15, dtype=torch.float64).sin().view(5, 3)
    large = torch.einsum("ck,nkhw->nchw", mix, common) + 0.3 * noise(5, 8, 8) + mean
    last = functional.avg_pool2d(common, 2).repeat(1, 2, 1, 1) + noise(6, 4, 4)
    return {
        "large": large,
        "same": (common.repeat(1, 2, 1, 1) + noise(6, 8, 8)).float().to(memory_format=torch.channels_last),
        "small": last.float(),
        "tokens": (common.flatten(2).transpose(1, 2).repeat(1, 1, 2) + noise(64, 6)).float(),
        "vector": torch.cat([common.mean((2, 3)), noise(1)], 1).float(),
    }


def in_memory(method: str, x: Tensor, y: Tensor, **options: object) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = getattr(ff, method)(x, y, **options)
    return float(result)


def as_samples(x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """[samples, features], written out independently of the library."""
    x = x.double()
    if x.dim() == 2:
        return x
    if x.dim() == 3:
        return x.mean(1) if grid == (1, 1) else x.reshape(-1, x.shape[2])
    if grid is not None:
        x = functional.adaptive_avg_pool2d(x, grid)
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


#: Of each pair the grid it is compared on.
GRIDS = {
    ("large", "large"): None,
    ("large", "same"): None,
    ("large", "small"): (4, 4),
    ("large", "tokens"): None,
    ("large", "vector"): (1, 1),
    ("same", "small"): (4, 4),
    ("tokens", "vector"): (1, 1),
    ("small", "small"): None,
    ("small", "vector"): (1, 1),
}
PAIRS = list(GRIDS)


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return layers(150)


@pytest.fixture(scope="module")
def stream(data: dict[str, Tensor]) -> ff.StreamingCCA:
    result = ff.StreamingCCA(pairs=PAIRS)
    for first in range(0, 150, 61):
        result.update({name: x[first : first + 61] for name, x in data.items()})
    return result


@pytest.mark.parametrize("method", [*METHODS, "unbiased"])
def test_equals_all_samples_at_once(method: str, data: dict[str, Tensor], stream: ff.StreamingCCA) -> None:
    options = {"unbiased": True} if method == "unbiased" else {}
    method = "cka" if options else method
    matrix = stream.compute(method, **options).matrix
    assert matrix.dtype == torch.float64
    names = stream.names
    assert names == tuple(data)
    seen = torch.zeros_like(matrix, dtype=torch.bool)
    for (a, b), grid in GRIDS.items():
        x, y = as_samples(data[a], grid), as_samples(data[b], grid)
        i, j = names.index(a), names.index(b)
        seen[i, j] = seen[j, i] = True
        assert matrix[i, j] == pytest.approx(in_memory(method, x, y, **options), rel=1e-10, abs=1e-12)
        assert matrix[j, i] == pytest.approx(in_memory(method, y, x, **options), rel=1e-10, abs=1e-12)
    assert matrix[~seen].isnan().all()


def test_options(data: dict[str, Tensor], stream: ff.StreamingCCA) -> None:
    names = list(data)
    i, j = names.index("large"), names.index("same")
    x, y = as_samples(data["large"], None), as_samples(data["same"], None)
    for method, options in (("cca", {"rtol": 0.05}), ("svcca", {"variance": 0.6}), ("pwcca", {"weights": "y"})):
        found = stream.compute(method, **options).matrix[i, j]
        assert found == pytest.approx(in_memory(method, x, y, **options), rel=1e-10)
        assert found != stream.compute(method).matrix[i, j]


@pytest.mark.parametrize("conv", ["flatten", "avgpool"])
def test_other_samples(conv: str) -> None:
    small = {name: x[:, :2, :2, :2] if x.dim() == 4 else x[:, :2] for name, x in layers(200).items()}
    stream = ff.StreamingCCA(conv=conv)
    for part in (slice(0, 90), slice(90, 200)):
        stream.update({name: x[part] for name, x in small.items()})

    def flat(x: Tensor) -> Tensor:
        if conv == "flatten" or x.dim() == 2:
            return x.double().flatten(1)
        return x.double().mean(1) if x.dim() == 3 else x.double().mean((2, 3))

    matrix = stream.compute("cka", unbiased=True).matrix
    for i, x in enumerate(small.values()):
        for j, y in enumerate(small.values()):
            assert matrix[i, j] == pytest.approx(in_memory("cka", flat(x), flat(y), unbiased=True), rel=1e-10, abs=1e-12)


def test_dft(data: dict[str, Tensor]) -> None:
    images = {name: data[name] for name in ("large", "same")}
    stream = ff.StreamingCCA(conv="dft")
    for part in (slice(0, 64), slice(64, 150)):
        stream.update({name: x[part] for name, x in images.items()})
    with pytest.warns(UserWarning, match="chance") if 150 < 60 else warnings.catch_warnings():
        matrix = stream.compute("dft_cca").matrix
        assert matrix[0, 1] == pytest.approx(float(ff.dft_cca(images["large"], images["same"])), rel=1e-10)
        assert matrix[0, 0] == pytest.approx(1.0, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["high", "fast"])
def test_every_dtype(dtype: torch.dtype, precision: str) -> None:
    data = {name: x.to(dtype) for name, x in layers(120, mean=0.5).items()}
    stream = ff.StreamingCCA(precision=precision, pairs=PAIRS).update(data)
    matrix = stream.compute("cca").matrix
    tolerance = 1e-10 if precision == "high" else 2e-6
    for (a, b), grid in GRIDS.items():
        x, y = as_samples(data[a], grid), as_samples(data[b], grid)
        expected = in_memory("cca", x, y)
        assert matrix[stream.names.index(a), stream.names.index(b)] == pytest.approx(expected, abs=tolerance)


def test_many_blocks_and_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels that end inside an image, several row blocks in a layer, and layers that are not partners."""
    monkeypatch.setattr(_cca_state, "_ROWS", 4)
    monkeypatch.setattr(_cca_state, "_SAMPLES", 50)
    generator = torch.Generator().manual_seed(1)
    data = {name: torch.randn(130, c, 3, 3, generator=generator) for name, c in (("a", 9), ("b", 4), ("c", 11), ("d", 5))}
    data["c"] = data["c"] + data["a"][:, :1]
    for pairs in ("all", [("a", "c"), ("d", "b"), ("c", "c")]):
        stream = ff.StreamingCCA(pairs=pairs)  # type: ignore[arg-type]
        stream.update({name: x[:77] for name, x in data.items()}).update({name: x[77:] for name, x in data.items()})
        matrix = stream.compute("procrustes").matrix
        for i, a in enumerate(data):
            for j, b in enumerate(data):
                if pairs != "all" and (a, b) not in pairs and (b, a) not in pairs:
                    assert matrix[i, j].isnan()
                    continue
                expected = in_memory("procrustes", as_samples(data[a], None), as_samples(data[b], None))
                assert matrix[i, j] == pytest.approx(expected, rel=1e-12)


def test_memory_does_not_grow(stream: ff.StreamingCCA) -> None:
    def held(s: ff.StreamingCCA) -> int:
        return sum(t.numel() for state in s.state_dict()["states"] for t in state["tensors"])

    more = pickle.loads(pickle.dumps(stream)).update(layers(50, seed=3))
    assert held(more) == held(stream)


# --- shards --------------------------------------------------------------------------------------------------------------


def matrices(stream: ff.StreamingCCA) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = [stream.compute(method).matrix for method in METHODS] + [stream.compute("cka", unbiased=True).matrix]
    return torch.stack(found).nan_to_num(-1.0)


def drifting(mean: float) -> dict[str, Tensor]:
    """Two layers the first samples of which have another mean."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(300, width, generator=generator, dtype=torch.float64) for width in (5, 7))
    y = torch.cat([x[:, :3], torch.zeros(300, 4, dtype=torch.float64)], 1) + noise
    x[:40] += 5
    return {"x": x + mean, "y": y}


def correlations(stream: ff.StreamingCCA) -> Tensor:
    """Of the features of all layers, from the sums alone."""
    (state,) = stream._states
    scatter = torch.cat([torch.cat([state.cross(i, j) for j in range(2)], 1) for i in range(2)])
    norms = scatter.diagonal().sqrt()
    return scatter / torch.outer(norms, norms)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_merge_is_exact(mean: float) -> None:
    """Whatever the sharding, and although the shards have pivots far from each other's."""
    data = drifting(mean)
    whole = ff.StreamingCCA().update(data)
    for cuts in ([0, 1, 300], [0, 40, 80, 300], [0, 3, 150, 150, 300]):
        shards = []
        for first, last in itertools.pairwise(cuts):
            shards.append(ff.StreamingCCA().update({name: x[first:last] for name, x in data.items()}))
        for order in (shards, shards[::-1]):
            total = ff.StreamingCCA()
            for shard in order:
                before = shard.state_dict()
                total.merge(shard)
                assert str(shard.state_dict()) == str(before)
            assert (correlations(total) - correlations(whole)).abs().max() < 5e-15
            # Whitening multiplies rounding by the square of the condition number, about 3.
            assert (matrices(total) - matrices(whole)).abs().max() < 2e-14


def test_merge_of_every_kind_of_layer() -> None:
    data = layers(160)
    data["large"][:40] += 5
    whole = ff.StreamingCCA(pairs=PAIRS).update(data)
    total = ff.StreamingCCA(pairs=PAIRS)
    for part in (slice(0, 40), slice(40, 41), slice(41, 160)):
        total.merge(ff.StreamingCCA(pairs=PAIRS).update({name: x[part] for name, x in data.items()}))
    assert (matrices(total) - matrices(whole)).abs().max() < 1e-11


def test_merge_into_and_of_nothing(stream: ff.StreamingCCA) -> None:
    empty = ff.StreamingCCA(pairs=PAIRS)
    assert torch.equal(matrices(pickle.loads(pickle.dumps(stream)).merge(empty)), matrices(stream))
    assert torch.equal(matrices(empty.merge(stream)), matrices(stream))
    empty.update(layers(40, seed=9))  # memory of its own
    assert not torch.equal(matrices(empty), matrices(stream))


def test_state_dict(tmp_path: Path, stream: ff.StreamingCCA) -> None:
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = ff.StreamingCCA(pairs=PAIRS).load_state_dict(state)
    assert torch.equal(matrices(again), matrices(stream))
    extra = layers(30, seed=5)
    stream = pickle.loads(pickle.dumps(stream))
    assert torch.equal(matrices(again.update(extra)), matrices(stream.update(extra)))


BROKEN = [
    *(("widths", []), ("widths", None), ("batches", "x"), ("batches", None), ("states", None), ("states", [{}])),
    *(("version", torch.ones(2)), ("pairs", 3), ("spaces", None), ("spaces", {})),
]


@pytest.mark.parametrize(
    ("conv", "key", "value"), [*(("channels", *change) for change in BROKEN), *(("dft", *change) for change in BROKEN[:8])]
)
def test_a_broken_state_is_told_and_changes_nothing(conv: str, key: str, value: object) -> None:
    stream = ff.StreamingCCA(conv=conv).update({"x": torch.randn(30, 2, 3, 4), "y": torch.randn(30, 2, 3, 4)})
    before = stream.state_dict()["states"][0]["tensors"][0].clone()
    with pytest.raises(ValueError, match="load_state_dict: state must be what StreamingCCA"):
        stream.load_state_dict({**stream.state_dict(), key: value})
    assert torch.equal(stream.state_dict()["states"][0]["tensors"][0], before)


def process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    try:
        stream, dft = ff.StreamingCCA(), ff.StreamingCCA(conv="dft")
        if rank != 1:  # a process without data takes part
            stream.update({name: x[rank::world] for name, x in drifting(10.0).items()})
            images = layers(160)
            dft.update({name: images[name][rank::world] for name in ("large", "same")})
        stream.all_reduce()
        dft.all_reduce()
        torch.save((matrices(stream), dft.compute("dft_cca").matrix), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
@pytest.mark.filterwarnings("ignore:StreamingCCA")
def test_all_reduce(world: int, tmp_path: Path) -> None:
    mp.start_processes(process, (world, str(tmp_path)), nprocs=world, start_method="spawn")
    streamed, images = drifting(10.0), layers(160)
    kept = [[i for i in range(n) if i % world != 1] for n in (300, 160)]
    whole = ff.StreamingCCA().update({name: x[kept[0]] for name, x in streamed.items()})
    dft = ff.StreamingCCA(conv="dft").update({name: images[name][kept[1]] for name in ("large", "same")})
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for found, found_dft in results:
        assert (found - matrices(whole)).abs().max() < 2e-14
        assert (found_dft - dft.compute("dft_cca").matrix).abs().max() < 2e-14
        assert torch.equal(found, results[0][0])


def test_all_reduce_alone(stream: ff.StreamingCCA) -> None:
    with pytest.raises(ValueError, match=r"StreamingCCA\.all_reduce: needs an initialised process group"):
        pickle.loads(pickle.dumps(stream)).all_reduce()


# --- names and pairs -----------------------------------------------------------------------------------------------------


def test_cross() -> None:
    data = layers(80)
    named = {(model, name): x for model in "ab" for name, x in data.items() if name in ("large", "small")}
    matrix = ff.StreamingCCA(pairs="cross").update(named).compute("cka").matrix
    assert matrix.isnan().tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert matrix[0, 2] == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(ValueError, match=re.escape("pairs='cross' needs names (model, layer), got 'large'")):
        ff.StreamingCCA(pairs="cross").update(data)
    with pytest.raises(ValueError, match="needs the layers of two models"):
        ff.StreamingCCA(pairs="cross").update({("a", name): x for name, x in data.items()})


def test_images_of_several_sizes() -> None:
    """What counts is how the layers' sizes stand to each other."""
    stream = ff.StreamingCCA()
    generator = torch.Generator().manual_seed(0)
    total: dict[str, list[Tensor]] = {"a": [], "b": []}
    for size in (8, 12):
        x = torch.randn(30, 4, size, size, generator=generator)
        y = functional.avg_pool2d(x, 2)[:, :3] + torch.randn(30, 3, size // 2, size // 2, generator=generator)
        stream.update({"a": x, "b": y})
        total["a"].append(as_samples(x, (size // 2, size // 2)))
        total["b"].append(as_samples(y, None))
    expected = in_memory("cca", torch.cat(total["a"]), torch.cat(total["b"]))
    assert stream.compute("cca").matrix[0, 1] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="layers are pooled otherwise than in the first"):
        stream.update({"a": torch.randn(5, 4, 6, 6), "b": torch.randn(5, 3, 6, 6)})


def test_video() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, 4, 6, 6, generator=generator)
    y = functional.avg_pool3d(x, 2) + torch.randn(40, 4, 2, 3, 3, generator=generator)
    found = ff.StreamingCCA().update({"x": x, "y": y}).compute("cka").matrix[0, 1]
    pooled = functional.avg_pool3d(x.double(), 2)
    flat = [t.double().movedim(1, -1).reshape(-1, 4) for t in (pooled, y)]
    assert found == pytest.approx(in_memory("cka", *flat), rel=1e-12)


# --- refusals ------------------------------------------------------------------------------------------------------------

X = torch.randn(40, 3)
UPDATES = {
    "no mapping": ([X], TypeError, "activations must be a dict {name: tensor}, got list"),
    "empty": ({}, ValueError, "activations must hold at least one layer, got an empty dict"),
    "integers": ({"a": X.long()}, TypeError, "layer 'a' must be float16, bfloat16, float32 or float64, got int64"),
    "no tensor": ({"a": 3}, TypeError, "layer 'a' must be a Tensor, got int"),
    "one dimension": ({"a": X[:, 0]}, ValueError, "layer 'a' must be [n, d], [n, t, d] or [n, c, h, w], got (40,)"),
    "no features": ({"a": X[:, :0]}, ValueError, "layer 'a' must have features and positions, got (40, 0)"),
    "batches": (
        {"a": X, "b": X[:7]},
        ValueError,
        "layers must share the batch, got n=40 for 'a' (40, 3) and n=7 for 'b' (7, 3)",
    ),
    "NaN": (
        {"a": X, "b": torch.cat([X[1:], torch.tensor([[math.nan, math.inf, 0.0]])])},
        ValueError,
        "layer 'b' holds 2 NaN or infinite values in batch 0 of shape (40, 3)",
    ),
    "samples": (
        {"a": X.view(40, 1, 3).expand(40, 5, 3), "b": X.view(40, 3, 1, 1).expand(40, 3, 2, 2)},
        ValueError,
        "layers 'a' (40, 5, 3) and 'b' (40, 3, 2, 2) have different samples; use conv='avgpool'",
    ),
    "devices": (
        {"a": X, "b": torch.empty(40, 3, device="meta")},
        ValueError,
        "layers must be on one device, got ['cpu', 'meta']; move them with .to(device)",
    ),
    "meta": (
        {"a": X.to("meta")},
        ValueError,
        "layers are on the meta device, which holds no values; pass activations with data",
    ),
}


@pytest.mark.parametrize("case", UPDATES)
def test_update_refuses(case: str) -> None:
    activations, error, message = UPDATES[case]
    stream = ff.StreamingCCA()
    with pytest.raises(error, match="^" + re.escape(f"StreamingCCA.update: {message}")):
        stream.update(activations)  # type: ignore[arg-type]
    assert stream.names == ()


def test_a_refused_batch_changes_nothing() -> None:
    stream = ff.StreamingCCA().update({"a": X, "b": X + torch.randn(40, 3)})
    before = stream.compute("cka").matrix
    bad = X.clone()
    bad[3, 1] = math.inf
    for batch, message in (
        ({"a": X, "b": bad}, "layer 'b' holds 1 NaN or infinite values in batch 1 of shape (40, 3)"),
        ({"a": X}, "layers must be those of the first update; missing are ['b'], new are []"),
        ({"a": X, "c": X}, "missing are ['b'], new are ['c']"),
        ({"a": X, "b": X[:, :2]}, "layer 'b' must have 3 features, as in the first update, got 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            stream.update(batch)
        assert torch.equal(stream.compute("cka").matrix, before)
    assert torch.equal(stream.update({"a": X[:0], "b": X[:0]}).compute("cka").matrix, before)


def test_compute_refuses() -> None:
    with pytest.raises(ValueError, match=r"StreamingCCA\.compute: nothing was updated yet; call update first"):
        ff.StreamingCCA().compute("cka")
    with pytest.raises(ValueError, match=r"nothing was updated yet"):
        ff.StreamingCCA().update({"a": X[:0]}).compute("cka")
    stream = ff.StreamingCCA().update({"a": X, "wide": torch.randn(40, 50), "still": torch.ones(40, 2)})
    for method, options, error, message in (
        ("lda", {}, ValueError, "method must be one of"),
        ("cka", {"variance": 0.9}, TypeError, "cka has no option 'variance'"),
        ("cka", {"kernel": "rbf"}, ValueError, "cka with kernel='rbf' needs all samples at once; call fourfold.cka"),
        ("dft_cca", {}, ValueError, "conv='channels' cannot give 'dft_cca'"),
        ("cca", {}, ValueError, "cca of layer 'wide': n must be larger than the number of dimensions, got n=40 samples for 50"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            stream.compute(method, **options)
    with pytest.raises(ValueError, match="conv='dft' cannot give 'cka'"):
        ff.StreamingCCA(conv="dft").update({"a": torch.randn(9, 2, 3, 3)}).compute("cka")


def test_a_constant_layer_is_nobodys_fault() -> None:
    """Undefined measures are NaN, with a warning that names the layer; the others count no direction."""
    stream = ff.StreamingCCA().update({"a": X.double(), "still": torch.full((40, 2), 0.1)})
    for method in ("cka", "rv", "procrustes", "pwcca"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            matrix = stream.compute(method).matrix
        assert matrix.isnan().tolist() == [[False, True], [True, True]]
        (told,) = {str(w.message) for w in caught}
        assert told.startswith(f"StreamingCCA.compute: {method}: 1 layers have the same value in every sample, and are NaN")
        assert "'still'" in told
    for method in ("svcca", "cca"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert stream.compute(method).matrix.tolist() == [[pytest.approx(1.0), 0.0], [0.0, 0.0]]
        (told,) = {str(w.message) for w in caught if "chance" not in str(w.message)}
        assert told == (
            f"StreamingCCA.compute: {method}: 1 layers have the same value in every sample, and have rank 0 and a similarity "
            "of 0, the first 'still'; leave them out (see docs/cca.md#limits)"
        )


def test_chance_and_condition() -> None:
    with pytest.warns(UserWarning, match=r"cca of layer 'a': n=40 samples for 5 dimensions.*chance level of r2 = 0\.13"):
        ff.StreamingCCA().update({"a": torch.randn(40, 5)}).compute("cca")
    for noise, message in (
        (1e-4, r"layer 'bad' has a condition number above 1\.02e\+03 \(1 of its directions are left out\); precision='fast'"),
        (5e-3, r"layer 'bad' has a condition number of [2-9]\d\d; precision='fast' is meant for up to 100"),
    ):
        bad = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        bad[:, 2] = bad[:, 0] + noise * bad[:, 2]
        with pytest.warns(UserWarning, match=message):
            ff.StreamingCCA(precision="fast").update({"bad": bad}).compute("cca")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**power for power in (-110, -70, 70, 120)])
def test_fast_refuses_what_float32_cannot_square(scale: float, dtype: torch.dtype) -> None:
    """There is no second look at the samples, and what is left of them would be a wrong number."""
    x, y = (torch.randn(500, 4, 2, 2, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    message = (
        r"compute: the squares of layer 'y' must lie in the range of float32 with precision='fast', got a sum of [-\w.+]+ over"
    )
    for conv, methods in (("channels", METHODS), ("dft", ("dft_cca",))):
        fast = ff.StreamingCCA(precision="fast", conv=conv).update({"x": x, "y": y * scale})
        high = ff.StreamingCCA(conv=conv).update({"x": x, "y": y * scale})
        plain = ff.StreamingCCA(conv=conv).update({"x": x, "y": y})
        for method in methods:
            with pytest.raises(ValueError, match=message):
                fast.compute(method)
            torch.testing.assert_close(high.compute(method).matrix, plain.compute(method).matrix, rtol=0, atol=1e-9)
    still = ff.StreamingCCA(precision="fast").update({"x": x, "y": torch.full((500, 4), 1e-30)})
    with pytest.warns(UserWarning, match="same value in every sample"):
        assert still.compute("cka").matrix[0, 1].isnan()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_refuses_what_float64_cannot_square(scale: float) -> None:
    stream = ff.StreamingCCA().update({"x": torch.randn(50, 4), "y": torch.randn(50, 3, dtype=torch.float64) * scale})
    for method in ("cca", "svcca", "pwcca", "cka", "procrustes"):
        with pytest.raises(ValueError, match="the squares of layer 'y' must lie in the range of float64, got a sum of"):
            stream.compute(method)
    images = {name: torch.randn(40, 2, 3, 4, dtype=torch.float64) * size for name, size in (("x", 1.0), ("y", scale))}
    with pytest.raises(ValueError, match="the squares of layer 'y' must lie in the range of float64"):
        ff.StreamingCCA(conv="dft").update(images).compute("dft_cca")


@pytest.mark.parametrize("conv", ["channels", "dft"])
def test_inference_mode(conv: str) -> None:
    """What was summed under it is added to without it, and the other way round."""

    def batch(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return {"x": torch.randn(9, 2, 3, 4), "y": torch.randn(9, 3, 3, 4)}

    expected = ff.StreamingCCA(conv=conv)
    for seed in range(5):
        expected.update(batch(seed))
    with torch.inference_mode():
        first, second = (ff.StreamingCCA(conv=conv).update(batch(seed)) for seed in (0, 1))
    first.update(batch(2)).merge(second)
    with torch.inference_mode():
        first.update(batch(3))
        third = ff.StreamingCCA(conv=conv).update(batch(4))
        first.merge(ff.StreamingCCA(conv=conv).load_state_dict(third.state_dict()))
    method = "dft_cca" if conv == "dft" else "cca"
    torch.testing.assert_close(first.compute(method).matrix, expected.compute(method).matrix, rtol=0, atol=1e-12)
    metric = ff.metrics.CCAMetric()
    with torch.inference_mode():
        metric.update(*batch(0).values())
    metric.update(*batch(1).values())
    assert metric.compute().isfinite()


def test_dead_neurons_and_low_precision() -> None:
    """Neurons that never vary or stand twice cost no warning, and float32's rounding is no direction."""
    x, y = (torch.randn(2000, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    y[:, 0] += x[:, 1]
    expected = in_memory("cca", x, y)
    for precision in ("high", "fast"):
        dead = torch.cat([x + 2, torch.full((2000, 2), 0.1)], 1)
        found = ff.StreamingCCA(precision=precision).update({"x": dead, "y": y}).compute("cca").matrix[0, 1]
        assert found == pytest.approx(expected, abs=1e-6)
        twice = ff.StreamingCCA(precision=precision).update({"x": torch.cat([x, x], 1), "y": y})
        assert twice.compute("cca").matrix[0, 1] == pytest.approx(expected, abs=1e-6)


def test_constructor_and_merge_refuse() -> None:
    for arguments, error, message in (
        ({"conv": "pool"}, ValueError, "conv must be one of"),
        ({"precision": "low"}, ValueError, "precision must be one of"),
        ({"pairs": "some"}, ValueError, "pairs must be one of"),
        ({"pairs": 3}, TypeError, "pairs must be 'all', 'cross' or a list of (name, name), got 3"),
        ({"pairs": []}, ValueError, "pairs must name at least one pair"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            ff.StreamingCCA(**arguments)
    with pytest.raises(ValueError, match=re.escape("pairs must name layers of the update, got ['b']; there are ['a']")):
        ff.StreamingCCA(pairs=[("a", "b")]).update({"a": X})
    one = ff.StreamingCCA().update({"a": X})
    for other, message in (
        (ff.StreamingCCA(conv="flatten"), "both must have the same conv, got channels and flatten"),
        (ff.StreamingCCA(precision="fast"), "both must have the same precision"),
        (ff.StreamingCCA().update({"b": X}), "both must have the same layers and widths in one order"),
        (ff.StreamingCCA(pairs=[("a", "a")]), "both must have the same pairs"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"StreamingCCA.merge: {message}")):
            one.merge(other)
    with pytest.raises(TypeError, match="other must be a StreamingCCA, got int"):
        one.merge(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"StreamingCCA\.load_state_dict: state must be what StreamingCCA\.state_dict returns"):
        one.load_state_dict({"conv": "channels"})
    with pytest.raises(ValueError, match="the state was made with conv='flatten', this has conv='channels'"):
        one.load_state_dict(ff.StreamingCCA(conv="flatten").state_dict())


def test_values_that_nobody_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that update does not wait for, compute tells."""
    monkeypatch.setattr(cca_streaming, "contents", lambda _: False)
    stream = ff.StreamingCCA()
    for value in (1.0, math.nan, math.inf):
        stream.update({"a": X, "b": torch.cat([X[1:], torch.full((1, 3), value)])})
    with pytest.raises(ValueError, match=r"compute: layer 'b' got 6 NaN or infinite values from batch 1 on"):
        stream.compute("cka")


def test_an_interrupted_update_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ff.StreamingCCA().update({"a": X})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_cca_state.Moments, "_add_product", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.update({"a": X})
    with pytest.raises(ValueError, match=r"StreamingCCA\.compute: an earlier update was interrupted"):
        stream.compute("cka")


def test_autocast_and_matmul_precision_change_nothing() -> None:
    data = layers(60)
    plain = matrices(ff.StreamingCCA(precision="fast", pairs=PAIRS).update(data))
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = matrices(ff.StreamingCCA(precision="fast", pairs=PAIRS).update(data))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert torch.equal(found, plain)


def test_repr(stream: ff.StreamingCCA) -> None:
    assert repr(stream) == "StreamingCCA(conv='channels', precision='high', pairs=[9 pairs]): 5 layers, 3 batches"
