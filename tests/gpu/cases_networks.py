"""Whole paths on a GPU, from JPEG files to scores and from batches to similarities: what check.py checks and measures."""

import functools
import importlib
import io
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import fourfold as ff
import torch
from gpu.harness import Check, Contest, Speed, Unavailable, assert_close

SIDE = 224
# Of ImageNet, in levels from 0 to 255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def needed(module):
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
        raise Unavailable(f"{module} does not import: {error}") from None


# ---- JPEG files ----


@functools.cache
def files(count, side):
    """JPEG files of smooth noise, of about the size that photographs have at quality 90."""
    if not ff.has_jpeg():
        raise Unavailable("fourfold was built without libjpeg")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    pixels = (pixels * 255 + 6 * torch.randn(pixels.shape, generator=generator)).clamp(0, 255).round().to(torch.uint8)
    step = torch.arange(8)
    table = (4 + 2 * (step[:, None] + step)).flatten()
    y, cbcr = ff.rgb_to_dct(pixels, layout="blocks")
    made = []
    for planes in zip(y[:, 0], *cbcr.unbind(1), strict=True):
        blocks = tuple((plane / table).round().to(torch.int16) for plane in planes)
        coefs = ff.jpeg.JpegCoefficients(blocks, (table.int(),) * 3, (side, side), ((2, 2), (1, 1), (1, 1)), "ycbcr")
        made.append(ff.jpeg.write(coefs))
    return made


def on_its_way(batch, device):
    """A batch to the device, through pinned memory; the copy runs while the CPU reads the next one."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def as_a_dataset(sources, dtype, device):
    """(y, cbcr) normalised on the CPU, as DctDataset gives them."""
    data = ff.jpeg.DctDataset(sources, mean=torch.zeros(64), std=torch.full((64,), 30.0), dtype=dtype)
    indices = range(len(sources))

    def call():
        return tuple(on_its_way(planes, device) for planes in ff.jpeg.collate(data.__getitems__(indices)))

    return call


def as_integers(sources, dtype, device):
    """(y, cbcr) normalised on the device, which gets what the files hold."""
    std = torch.full((64,), 30.0, device=device)

    def call():
        images = ff.jpeg.read_batch(sources)
        planes = []
        for part in (slice(0, 1), slice(1, 3)):
            coefs = torch.stack([torch.stack(image.components[part]) for image in images])
            tables = torch.stack([torch.stack(image.qtables[part]) for image in images])
            coefs, tables = on_its_way(coefs, device), on_its_way(tables.float(), device)
            planes.append(ff.dct_normalize(coefs, tables, std=std, dtype=dtype).flatten(1, 2))
        return tuple(planes)

    return call


def to_rgb(decode, dtype, device):
    """Levels uint8 [B, H, W, 3], wherever decode leaves them, normalised on the device as channels_last."""
    mean, std = (torch.tensor(levels, device=device).view(3, 1, 1) for levels in (MEAN, STD))

    def call():
        levels = decode()
        levels = levels if levels.device == device else on_its_way(levels, device)
        return (((levels.permute(0, 3, 1, 2).float() - mean) / std).to(dtype, memory_format=torch.channels_last),)

    return call


def decoders(sources, device):
    """Those that are installed: {name: () -> uint8 [B, H, W, 3]}, on as many threads as torch has."""
    pool = ThreadPoolExecutor(torch.get_num_threads())
    found = {}
    try:
        image, numpy = needed("PIL.Image"), needed("numpy")

        def by_pillow(file):
            return torch.from_numpy(numpy.array(image.open(io.BytesIO(file))))

        found["Pillow"] = lambda: torch.stack(list(pool.map(by_pillow, sources)))
    except Unavailable:
        pass
    try:
        decode = needed("simplejpeg").decode_jpeg
        found["simplejpeg"] = lambda: torch.stack([torch.from_numpy(rows) for rows in pool.map(decode, sources)])
    except Unavailable:
        pass
    try:
        io_ = needed("torchvision.io")
        encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in sources]

        def stacked(images):
            return torch.stack(list(images)).permute(0, 2, 3, 1)

        found["torchvision"] = lambda: stacked(pool.map(io_.decode_jpeg, encoded))
        if device.type == "cuda":
            found["nvJPEG"] = lambda: stacked(io_.decode_jpeg(encoded, device=device))
    except Unavailable:
        pass
    return found


def batches_match(device):
    """A dataset's batch on the device is the CPU's; normalising there gives the same up to rounding."""
    sources = files(3, 48)
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        expected = as_a_dataset(sources, dtype, torch.device("cpu"))()
        exact = as_a_dataset(sources, torch.float64, torch.device("cpu"))()
        for mine, same, right in zip(as_a_dataset(sources, dtype, device)(), expected, exact, strict=True):
            assert torch.equal(mine.cpu(), same), f"{dtype} with {threads} threads"
            assert_close(mine.cpu(), right, f"{dtype}, a dataset's")
        for mine, right in zip(as_integers(sources, dtype, device)(), exact, strict=True):
            assert_close(mine.cpu(), right, f"{dtype}, normalised on the device")


def network_matches(device):
    """Scores and the gradient of the weight of the last layer, in float64, as on the CPU."""
    torch.manual_seed(0)
    network = ff.models.dct_resnet50("late_concat_rfa_thinner", num_classes=5, dtype=torch.float64).eval()
    planes = torch.randn(1, 64, 8, 8, dtype=torch.float64), torch.randn(1, 128, 4, 4, dtype=torch.float64)
    results = []
    for where in (torch.device("cpu"), device):
        network.to(where)
        scores = network(*(plane.to(where) for plane in planes))
        (gradient,) = torch.autograd.grad(scores.square().sum(), [next(reversed(list(network.parameters())))])
        results.append((scores.detach().cpu(), gradient.cpu()))
    for mine, right in zip(*reversed(results), strict=True):
        # Fifty layers of other summation orders: more than what one op is allowed.
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def decode_contest(way, count, dtype, device, small):
    """From files to a batch on the device. Each way gives another batch, so that nothing is asked of it but its sum."""
    sources = files(4, 32) if small else files(count, SIDE)

    def summed(load):
        return lambda x: sum(planes.sum(dtype=torch.float32) for planes in load())

    ours = (as_a_dataset if way == "dataset" else as_integers)(sources, dtype, device)
    rivals = {name: summed(to_rgb(call, dtype, device)) for name, call in decoders(sources, device).items()}
    inputs = [torch.zeros(1, device=device)] * 4
    return Contest(inputs, None, summed(ours), rivals, math.inf, graph=False, items=len(sources))


def scores_contest(count, dtype, compiled, given, device, small):
    """From files, or from what lies on the device already, to scores of a network on coefficients and of ResNet-50 on RGB."""
    count, side = (2, 64) if small else (count, SIDE)

    def ready(network):
        network = network.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        return torch.compile(network, mode="max-autotune-no-cudagraphs") if compiled and not small else network

    on_dct, on_rgb = ready(ff.models.dct_resnet50("late_concat_rfa_thinner")), ready(ff.models.resnet50())
    inputs = [torch.zeros(1, device=device)] * 4

    def scored(network, load):
        return lambda x: network(*load())

    if given == "batch":
        planes = [torch.randn(count, c, side // s, side // s, device=device).to(dtype) for c, s in ((64, 8), (128, 16))]
        rgb = torch.randn(count, 3, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        rivals = {"resnet50": scored(on_rgb, lambda: (rgb,))}
        return Contest(inputs, None, scored(on_dct, lambda: planes), rivals, math.inf, items=count)
    sources = files(count, side)
    loads = {name: to_rgb(call, dtype, device) for name, call in decoders(sources, device).items()}
    rivals = {f"resnet50 by {name}": scored(on_rgb, load) for name, load in loads.items()}
    ours = scored(on_dct, as_integers(sources, dtype, device))
    return Contest(inputs, None, ours, rivals, math.inf, graph=False, items=count)


# ---- similarities ----


def two_networks(device, small):
    """ResNets with random weights, and the names of their layers to compare."""
    torch.manual_seed(0)
    try:
        transformers = needed("transformers")
        small_sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        config = transformers.ResNetConfig(**small_sizes if small else {})
        pair = [transformers.ResNetModel(config) for _ in range(2)]
        layers = "encoder.stages.*"
    except Unavailable:
        pair, layers = [ff.models.resnet50(num_classes=10) for _ in range(2)], "layer?"
    return [network.to(device).eval().requires_grad_(False) for network in pair], layers


def comparisons_match(device):
    pair, layers = two_networks(device, small=True)
    batches = [torch.randn(8, 3, 64, 64) for _ in range(3)]
    methods = ("svcca", "cka", "procrustes")
    mine = ff.compare(*pair, batches, layers=layers, method=methods, device=device, progress=False)
    pair = [network.cpu() for network in pair]
    right = ff.compare(*pair, batches, layers=layers, method=methods, progress=False)
    for method in methods:
        # The networks' own float32 differs from device to device; what is computed from it does not add to that.
        torch.testing.assert_close(mine.matrix[method].cpu(), right.matrix[method], rtol=0, atol=2e-3, equal_nan=True)


def compare_contest(device, small):
    """CKA of two ResNets, batches streamed, against keeping all activations for products in float64."""
    (one, two), layers = two_networks(device, small)
    n, batch, side = (8, 4, 64) if small else (256, 32, SIDE)
    images = torch.randn(n, 3, side, side, device=device)

    def ours(images):
        return ff.compare(one, two, images.split(batch), layers=layers, method="cka", progress=False).matrix["cka"].to(device)

    chosen = ff.compare(one, two, [images[:4]], layers=layers, method="cka", progress=False)
    names = chosen.layers_a, chosen.layers_b

    def samples(x, grid):
        rows = torch.nn.functional.adaptive_avg_pool2d(x.double(), grid).movedim(1, -1).flatten(0, -2)
        return rows - rows.mean(0)

    def collected(images):
        kept = [[], []]
        for side, network in enumerate((one, two)):
            rows, handles = {name: [] for name in names[side]}, []
            for name, layer in network.named_modules():
                if name in rows:

                    def keep(layer, given, y, rows=rows, name=name):
                        rows[name].append(y)

                    handles.append(layer.register_forward_hook(keep))
            for some in images.split(batch):
                network(some)
            for handle in handles:
                handle.remove()
            kept[side] = [torch.cat(rows[name]) for name in names[side]]
        matrix = torch.empty(len(names[0]), len(names[1]), dtype=torch.float64, device=device)
        for (i, x), (j, y) in itertools.product(*map(enumerate, kept)):
            a, b = (samples(t, min(x.shape[2], y.shape[2])) for t in (x, y))
            matrix[i, j] = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
        return matrix

    return Contest([images], None, ours, {"all activations kept": collected}, 1e-6, graph=False, memory=True)


def speed(op, name, make, *options, hot=False):
    return Speed(op, name, functools.partial(make, *options), hot)


BF16 = torch.bfloat16
CHECKS = [
    Check("jpeg.DctDataset", "batches", batches_match, hot=True),
    Check("models.dct_resnet50", "scores and a gradient", network_matches, hot=True),
    Check("compare", "two ResNets", comparisons_match, hot=True),
]
SPEEDS = [
    speed("models.dct_resnet50", "256 files to scores, bfloat16", scores_contest, 256, BF16, False, "files", hot=True),
    speed("compare", "cka of two ResNets, 256 images", compare_contest, hot=True),
    speed("jpeg.DctDataset", "256 files, integers normalised on the device", decode_contest, "integers", 256, BF16, hot=True),
    speed("jpeg.DctDataset", "256 files, bfloat16", decode_contest, "dataset", 256, BF16),
    speed("models.dct_resnet50", "256 batches, bfloat16", scores_contest, 256, BF16, False, "batch"),
    speed("models.dct_resnet50", "256 files to scores, bfloat16, compiled", scores_contest, 256, BF16, True, "files"),
    speed("models.dct_resnet50", "256 batches, bfloat16, compiled", scores_contest, 256, BF16, True, "batch"),
]
