"""DctDataset, collate, frequency_stats and compat.jpeg2dct, on small files that Pillow writes."""

from __future__ import annotations

import io
import math
import pickle
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import battery
import fourfold as ff
import numpy as np
import pytest
import scipy.fft
import torch
from battery import Refusal, assert_close, assert_same
from fourfold.compat import jpeg2dct
from fourfold.jpeg import dataset as dataset_module
from fourfold.jpeg.dataset import DctDataset, collate, frequency_stats
from fourfold.jpeg.files import JpegCoefficients, JpegError, read, write
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset

pytestmark = [
    pytest.mark.skipif(not ff.has_jpeg(), reason="this fourfold was built without libjpeg"),
    # Of torch and Python, about the machine and about fork.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]
Image = pytest.importorskip("PIL.Image", reason="the files are written by Pillow; run: pip install pillow")

ZIGZAG = ff.zigzag()[:24].tolist()
F64 = torch.float64


# ---- files ---------------------------------------------------------------------------------------------------------------


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Any:
    """Slopes and noise: every frequency, and no symmetry."""
    rng = np.random.default_rng(seed)
    planes = len(mode) if mode != "L" else 1
    slopes = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 80, width)[:, None] * rng.uniform(0.2, 1, planes)
    noisy = (slopes + rng.uniform(0, 55, (height, width, planes))).astype(np.uint8)
    return Image.fromarray(noisy[..., 0] if mode == "L" else noisy, mode)


def jpeg(height: int, width: int, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    settings = {"quality": 85, **({"subsampling": "4:2:0"} if mode == "RGB" else {}), **options}
    picture(height, width, seed, mode).save(stream, "JPEG", **settings)
    return stream.getvalue()


@pytest.fixture
def save(tmp_path):
    def save(name: str, *args: Any, **options: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(*args, **options))
        return str(path)

    return save


@pytest.fixture
def files(save):
    """Six of one size, their qualities and so their tables different; one is gray."""
    return [
        *(save(f"{i}.jpg", 40, 56, seed=i, quality=50 + 9 * i) for i in range(5)),
        save("gray.jpg", 40, 56, seed=5, mode="L"),
    ]


# ---- what an item should be, by way of pixels ------------------------------------------------------------------------------


def planes_of(coefs: JpegCoefficients) -> list[np.ndarray]:
    """Y, Cb, Cr as pixels of each plane's own resolution, the filling of its last blocks cut off; 128 is 0."""
    planes = []
    for component, table, step in zip(coefs.components, coefs.qtables, (1, 2, 2), strict=False):
        h, w, _ = component.shape
        blocks = (component.double() * table).numpy().reshape(h, w, 8, 8)
        pixels = scipy.fft.idctn(blocks, axes=(-2, -1), norm="ortho").swapaxes(1, 2).reshape(8 * h, 8 * w)
        planes.append(pixels[: -(-coefs.size[0] // step), : -(-coefs.size[1] // step)])
    while len(planes) < 3:
        planes.append(np.zeros([-(-side // 2) for side in coefs.size]))
    return planes


def framed(plane: np.ndarray, step: int, offsets: tuple[int, int], size: tuple[int, int], height_width: Any) -> np.ndarray:
    """Cropped (where the image is larger) or edge-padded to size / step, at an offset of so many MCUs."""
    for axis, (offset, wanted, length) in enumerate(zip(offsets, size, height_width, strict=True)):
        start, count = 16 // step * offset, wanted // step
        if length >= wanted:
            plane = plane.take(range(start, start + count), axis)
        else:
            widths = [(0, 0), (0, 0)]
            widths[axis] = (start, count - start - plane.shape[axis])
            plane = np.pad(plane, widths, mode="edge")
    return plane


def transformed(plane: np.ndarray) -> Tensor:
    return ff.block_dct(torch.from_numpy(np.ascontiguousarray(plane))[None, None])[0]


def expected_item(coefs: JpegCoefficients, size: tuple[int, int], offsets: tuple[int, int], flip: bool = False) -> Any:
    """(y, cbcr) in float64."""
    planes = [framed(p, s, offsets, size, coefs.size) for p, s in zip(planes_of(coefs), (1, 2, 2), strict=True)]
    y, cb, cr = (transformed(p[:, ::-1] if flip else p) for p in planes)
    return y, torch.cat([cb, cr])


def centre(length: int, wanted: int) -> int:
    """The offset in MCUs that leaves as many before as after, or one more after."""
    return (length // 16 - wanted // 16) // 2 if length >= wanted else (wanted // 16 - math.ceil(length / 16)) // 2


def normalized(coefs: JpegCoefficients, c: int, **options: Any) -> Tensor:
    return ff.dct_normalize(coefs.components[c], coefs.qtables[c], **options)


# ---- items ---------------------------------------------------------------------------------------------------------------


def test_an_item_is_the_file_dequantised(files):
    data = DctDataset(files)
    assert len(data) == 6
    for path, item in zip(files, data, strict=True):
        coefs = read(path)
        y, cbcr = item
        assert_same(y, normalized(coefs, 0), "y")
        if coefs.color_space == "gray":
            assert_same(cbcr, torch.zeros(128, 3, 4), "chroma of a gray file")
        else:
            assert_same(cbcr, torch.cat([normalized(coefs, 1), normalized(coefs, 2)]), "cbcr")


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("freqs", [None, ZIGZAG, torch.tensor([3, 0, 63])])
@pytest.mark.parametrize("dtype", battery.FLOATING)
def test_normalisation(files, shape, freqs, dtype):
    f = 64 if freqs is None else len(freqs)
    mean, std = torch.randn(*shape, f), torch.rand(*shape, f) + 0.5
    data = DctDataset(files[:1], freqs=freqs, mean=mean, std=std, dtype=dtype)
    coefs = read(files[0])
    want = [
        normalized(coefs, c, freqs=freqs, dtype=dtype, mean=mean[c] if shape else mean, std=std[c] if shape else std)
        for c in range(3)
    ]
    y, cbcr = data[0]
    assert y.dtype == cbcr.dtype == dtype
    assert_same(y, want[0], "y")
    assert_same(cbcr, torch.cat(want[1:]), "cbcr")


def test_a_gray_file_is_what_it_is_in_a_colour_file(save):
    """Its chroma is zero before normalisation, as that of the same picture in colour."""
    gray = picture(24, 40, mode="L")
    paths = [save("x.jpg", 8, 8), save("y.jpg", 8, 8)]
    gray.save(paths[0], quality=90)
    gray.convert("RGB").save(paths[1], quality=90, subsampling="4:2:0")
    mean, std = torch.randn(3, 64), torch.rand(3, 64) + 1
    items = list(DctDataset(paths, mean=mean, std=std))
    for plain, colour in zip(*items, strict=True):
        assert_same(plain, colour, "gray and colour")
    assert_close(items[0][1], (-mean / std)[1:].double().reshape(128, 1, 1).expand(128, 2, 3), "chroma")
    padded = DctDataset(paths, mean=mean, std=std, size=64)
    for plain, colour in zip(*padded, strict=True):
        assert_same(plain, colour, "gray and colour, padded")


@pytest.mark.parametrize("targets", [[3, 1, 2, 0, 1, 5], torch.arange(6), list("abcdef")])
def test_targets(files, targets):
    data = DctDataset(files, targets)
    assert [data[i][2] for i in range(6)] == list(targets)
    y, cbcr, given = collate(data.__getitems__([4, 0]))
    assert y.shape == (2, 64, 5, 7)
    assert cbcr.shape == (2, 128, 3, 4)
    assert list(given) == [targets[4], targets[0]]


def test_sources_need_not_be_paths():
    sources = [jpeg(16, 16), np.frombuffer(jpeg(16, 16), np.uint8), b"no"]
    data = DctDataset(sources)
    assert_same(data[0][0], data[1][0], "bytes and array")
    with pytest.raises(JpegError, match=r"^DctDataset: paths\[2\]: jpeg.read: "):
        data[2]
    with pytest.raises(JpegError, match=r"^DctDataset: paths\[2\]: jpeg.read: "):
        data.__getitems__([0, 2])
    with pytest.raises(JpegError, match=r"^frequency_stats: paths\[2\]: jpeg.read: "):
        frequency_stats(sources)


# ---- size ----------------------------------------------------------------------------------------------------------------

SIZES = [(48, 64), (47, 49), (33, 79), (80, 81), (16, 16), (15, 17), (1, 1), (9, 100), (32, 32)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("height_width", SIZES)
def test_size_crops_and_pads_in_the_middle(save, height_width, mode):
    path = save("x.jpg", *height_width, mode=mode)
    size = (32, 48)
    y, cbcr = DctDataset([path], size=size, dtype=F64)[0]
    assert y.shape == (64, 4, 6)
    assert cbcr.shape == (128, 2, 3)
    offsets = tuple(centre(length, wanted) for length, wanted in zip(height_width, size, strict=True))
    wanted_y, wanted_cbcr = expected_item(read(path), size, offsets)
    assert_close(y, wanted_y, "y")
    assert_close(cbcr, wanted_cbcr, "cbcr")


def test_a_crop_is_the_files_own_integers(save):
    path = save("x.jpg", 70, 90)
    coefs = read(path)
    y, cbcr = DctDataset([path], size=32)[0]
    assert_same(y, normalized(coefs, 0)[:, 2:6, 2:6], "y")  # 4 and 5 whole MCUs; one is left out above, one to the left
    assert_same(cbcr, torch.cat([normalized(coefs, 1), normalized(coefs, 2)])[:, 1:3, 1:3], "cbcr")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_padding_in_other_dtypes_with_everything(save, dtype):
    """Padded before normalising, and rounded once."""
    path = save("x.jpg", 23, 90)
    mean, std = torch.randn(3, 3, dtype=F64), torch.rand(3, 3, dtype=F64) + 1
    freqs = [0, 9, 2]
    options = {"size": (48, 48), "freqs": freqs, "mean": mean, "std": std}
    wide = DctDataset([path], dtype=F64, **options)[0]
    y, cbcr = expected_item(read(path), (48, 48), (centre(23, 48), centre(90, 48)))
    for c, (ours, plane) in enumerate(zip((wide[0], *wide[1].split(3)), (y, *cbcr.split(64)), strict=True)):
        assert_close(ours, (plane[freqs] - mean[c, :, None, None]) / std[c, :, None, None], f"plane {c}")
    for narrow, exact in zip(DctDataset([path], dtype=dtype, **options)[0], wide, strict=True):
        assert narrow.dtype == dtype
        assert_close(narrow, exact, "narrow", slack=2)


def test_train_draws_position_and_mirror_from_torch(save):
    """Three numbers for each image, and the item that they say."""
    paths = [save("large.jpg", 70, 90), save("small.jpg", 20, 90, seed=1), save("smaller.jpg", 5, 3, seed=2)]
    data = DctDataset(paths, size=(32, 48), train=True, dtype=F64)
    steps = {0: (2, 2), 1: (0, 2), 2: (1, 2)}  # MCUs to spare: 4 - 2 and 5 - 3; 2 - 2 and 5 - 3; 2 - 1 and 3 - 1
    seen = set()
    for seed in range(12):
        for i, path in enumerate(paths):
            torch.manual_seed(seed)
            rows, columns, mirror = torch.rand(3, dtype=F64).tolist()
            offsets = (int(rows * (steps[i][0] + 1)), int(columns * (steps[i][1] + 1)))
            torch.manual_seed(seed)
            y, cbcr = data[i]
            wanted_y, wanted_cbcr = expected_item(read(path), (32, 48), offsets, flip=mirror < 0.5)
            assert_close(y, wanted_y, f"y of {path}, seed {seed}")
            assert_close(cbcr, wanted_cbcr, f"cbcr of {path}, seed {seed}")
            seen.add((i, offsets, mirror < 0.5))
    assert len(seen) > 12


def test_under_another_default_device(files):
    """Random numbers are drawn, and coefficients lie, on the CPU all the same."""
    data = DctDataset(files, size=16, train=True)
    torch.manual_seed(1)
    wanted = data[0]
    torch.manual_seed(1)
    with torch.device("meta"):
        item = data[0]
        listed = DctDataset(files, mean=[0.0] * 64)[0]
    assert_items_equal([item], [wanted])
    assert_items_equal([listed], [DctDataset(files)[0]])


@pytest.mark.parametrize("fetch", [lambda data: data[0], lambda data: data.__getitems__([0, 0])], ids=["item", "batch"])
def test_the_most_negative_coefficient_is_mirrored(files, fetch, monkeypatch):
    """-32768, which only a broken file can hold, has no opposite in int16; dequantised it has."""
    coefs = read(files[0])
    coefs.components[0].view(-1, 64)[:, 1] = -32768
    monkeypatch.setattr(dataset_module, "read", lambda *_args, **_options: coefs)
    monkeypatch.setattr(dataset_module, "read_batch", lambda sources, **_options: [coefs] * len(sources))
    torch.manual_seed(0)
    items = [fetch(DctDataset(files[:1], size=16, train=True)) for _ in range(50)]  # half of them are mirrored
    y = torch.stack([item[0] if isinstance(item, tuple) else item[0][0] for item in items])
    wanted = 32768.0 * coefs.qtables[0][1].item()
    assert set(y[:, 1].flatten().tolist()) == {-wanted, wanted}


def test_train_reaches_every_position(save):
    data = DctDataset([save("x.jpg", 48, 33)], size=16, train=True)
    positions = Counter(tuple(data[0][0].flatten()[:5].tolist()) for _ in range(240))
    assert len(positions) == 3 * 2 * 2
    assert min(positions.values()) > 5


def test_train_of_whole_files_only_mirrors(save):
    """size equal to the file's: flips are the only thing left to chance."""
    path = save("x.jpg", 32, 48)
    coefs = read(path)
    plain = DctDataset([path], size=(32, 48))[0]
    assert_same(plain[0], normalized(coefs, 0), "not trained")
    y = ff.dct_normalize(ff.ops.blockdct_domain.dct_flip(coefs.components[0], -2), coefs.qtables[0])
    data = DctDataset([path], size=(32, 48), train=True)
    results = [torch.equal(item, y) or (torch.equal(item, plain[0]) and None) for item, _ in (data[0] for _ in range(40))]
    assert set(results) == {True, None}


# ---- batches -------------------------------------------------------------------------------------------------------------


def assert_items_equal(first: Any, second: Any) -> None:
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for left, right in zip(a, b, strict=True):
            assert_same(torch.as_tensor(left), torch.as_tensor(right), "item")


@pytest.mark.parametrize("statistics", [(), (3,)])
@pytest.mark.parametrize("options", [{}, {"size": 32}, {"size": 32, "train": True}, {"size": (32, 96), "train": True}])
def test_a_fetched_batch_is_its_items(files, options, statistics):
    """With the same random numbers, padded or not."""
    mean, std = torch.randn(*statistics, 64), torch.rand(*statistics, 64) + 1
    data = DctDataset(files, torch.arange(6), mean=mean, std=std, threads=2, **options)
    indices = [5, 0, 3, 3, 1]
    torch.manual_seed(7)
    batch = data.__getitems__(indices)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert_items_equal(batch, [data[i] for i in indices])
    assert torch.equal(torch.rand(1), after)
    assert_items_equal(zip(*collate(batch), strict=True), batch)


def test_collate_hands_a_fetched_batch_on(files):
    data = DctDataset(files)
    batch = data.__getitems__([0, 1, 2])
    y, cbcr = collate(batch)
    assert y.data_ptr() == batch[0][0].data_ptr()
    assert cbcr.data_ptr() == batch[0][1].data_ptr()
    for changed in (batch[1:], list(batch), [*batch, data[3]]):
        assert_items_equal(zip(*collate(changed), strict=True), changed)
    batch[1] = data[4]
    assert_items_equal(zip(*collate(batch), strict=True), batch)
    del batch[0]
    assert_items_equal(zip(*collate(batch), strict=True), batch)


def test_files_of_several_grids(save):
    paths = [save("a.jpg", 33, 40), save("b.jpg", 47, 48), save("c.jpg", 33, 56), save("d.jpg", 32, 40)]
    data = DctDataset(paths)
    items = data.__getitems__([0, 1, 2, 3])
    assert_items_equal(items, [data[i] for i in range(4)])
    with pytest.raises(ValueError, match=r"^jpeg\.collate: images must have one grid of luma blocks, got 4 x 5, 5 x 5"):
        collate(items)
    y, cbcr = collate(DctDataset(paths, size=48).__getitems__([0, 1, 2, 3]))
    assert (y.shape, cbcr.shape) == ((4, 64, 6, 6), (4, 128, 3, 3))


def with_workers(data: Any, context: str | None, **options: Any) -> list[Any]:
    workers = {"num_workers": 2, "multiprocessing_context": context} if context else {}
    return list(DataLoader(data, 4, collate_fn=collate, **workers, **options))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_what_the_process_gives(files, context):
    data = DctDataset(files * 2, list(range(12)), size=32)
    assert_items_equal(with_workers(data, context), with_workers(data, None))


def test_workers_draw_numbers_of_their_own(files):
    """Repeatable by torch.manual_seed, different in each worker and each epoch."""
    data = DctDataset(files[:1] * 16, size=16, train=True)

    def epochs() -> list[Tensor]:
        torch.manual_seed(3)
        return [torch.cat([y for y, _ in with_workers(data, "fork")]) for _ in range(2)]

    first, second = epochs()
    again = epochs()
    assert_same(again[0], first, "first epoch")
    assert_same(again[1], second, "second epoch")
    assert not torch.equal(first, second)
    assert not torch.equal(first[:4], first[4:8])  # batches of different workers


def test_shuffle_subset_and_persistent_workers(files):
    data = Subset(DctDataset(files, list(range(6)), size=32), [5, 3, 1, 0])
    loader = DataLoader(
        data, 2, shuffle=True, num_workers=1, persistent_workers=True, multiprocessing_context="fork", collate_fn=collate
    )
    for _ in range(2):
        assert sorted(torch.cat([targets for *_, targets in loader]).tolist()) == [0, 1, 3, 5]


@pytest.mark.parametrize("shuffle", [False, True])
def test_distributed_sampler_covers_all(files, shuffle):
    data = DctDataset(files, list(range(6)), size=32)
    seen = []
    for rank in range(3):
        sampler = DistributedSampler(data, num_replicas=3, rank=rank, shuffle=shuffle)
        for *_, targets in DataLoader(data, 1, sampler=sampler, collate_fn=collate):
            seen += targets.tolist()
    assert sorted(seen) == list(range(6))


def test_the_default_collate_works_too(files):
    y, cbcr, targets = next(iter(DataLoader(DctDataset(files, [1] * 6), 6)))
    assert (y.shape, cbcr.shape, targets.tolist()) == ((6, 64, 5, 7), (6, 128, 3, 4), [1] * 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a machine with a GPU pins memory")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_memory(files, workers):
    loader = DataLoader(DctDataset(files, [1] * 6), 3, num_workers=workers, collate_fn=collate, pin_memory=True)
    for batch in loader:
        assert isinstance(batch, tuple)
        assert all(part.is_pinned() for part in batch)


def test_pickles(files):
    data = DctDataset(files, [1] * 6, freqs=ZIGZAG, mean=torch.ones(24), std=torch.ones(24), size=32)
    assert_items_equal(list(pickle.loads(pickle.dumps(data))), list(data))


# ---- folders -------------------------------------------------------------------------------------------------------------


def test_from_folder(save, tmp_path):
    for name in ("dog/b.JPG", "dog/a.jpeg", "dog/deep/er/c.jpe", "cat/z.JFIF", "cat/a.jpg"):
        save(f"train/{name}", 16, 16)
    (tmp_path / "train/dog/notes.txt").write_text("no picture")
    (tmp_path / "train/readme.jpg").write_text("in no class")
    data = DctDataset.from_folder(tmp_path / "train", freqs=[0], size=16)
    assert data.classes == ["cat", "dog"]
    assert data.class_to_idx == {"cat": 0, "dog": 1}
    names = [str(Path(path).relative_to(tmp_path / "train")) for path in data.paths]
    assert names == ["cat/a.jpg", "cat/z.JFIF", "dog/a.jpeg", "dog/b.JPG", "dog/deep/er/c.jpe"]
    assert data.targets == [0, 0, 1, 1, 1]
    y, _, target = data[4]
    assert (y.shape, target) == ((1, 2, 2), 1)


def test_from_folder_refusals(save, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught:
        DctDataset.from_folder(missing)
    assert str(caught.value) == f"DctDataset.from_folder: no folder {str(missing)!r}"
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="must hold one folder for each class, and holds none"):
        DctDataset.from_folder(tmp_path / "root")
    save("root/full/a.jpg", 8, 8)
    (tmp_path / "root/empty/below").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"class 'empty' must have files ending in \.jpg, \.jpeg, \.jpe, \.jfif"):
        DctDataset.from_folder(tmp_path / "root")


# ---- files that won't do -------------------------------------------------------------------------------------------------

REMEDY = "re-encode it, or decode it and use rgb_to_dct"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"subsampling": "4:4:4"}, f"must have 4:2:0 chroma, got 4:4:4; {REMEDY}(..., subsampling='4:2:0')"),
        ({"subsampling": "4:2:2"}, f"must have 4:2:0 chroma, got 4:2:2; {REMEDY}(..., subsampling='4:2:0')"),
        ({"mode": "CMYK"}, f"must be ycbcr or gray, got cmyk; {REMEDY}"),
    ],
)
def test_other_samplings_and_colour_spaces(save, options, what):
    """Named in a batch, and with size too."""
    paths = [save("good.jpg", 32, 32), save("bad.jpg", 32, 32, **options)]
    for data in (DctDataset(paths), DctDataset(paths, size=16)):
        for get in (lambda data=data: data[1], lambda data=data: data.__getitems__([0, 1])):
            with pytest.raises(JpegError) as caught:
                get()
            assert str(caught.value) == f"DctDataset: {paths[1]} {what} (see docs/jpeg.md#batches)"


def test_sampling_names():
    """By the steps of both chroma planes, however the factors are written."""
    for factors, name in (
        (((2, 2), (1, 1), (1, 1)), "4:2:0"),
        (((4, 2), (2, 1), (2, 1)), "4:2:0"),
        (((1, 2), (1, 1), (1, 1)), "4:4:0"),
        (((4, 1), (1, 1), (1, 1)), "4:1:1"),
        (((2, 2), (1, 1), (2, 1)), "2x2 1x1 2x1"),
        (((1, 1), (2, 2), (2, 2)), "1x1 2x2 2x2"),
        (((3, 1), (2, 1), (2, 1)), "3x1 2x1 2x1"),
    ):
        coefs = JpegCoefficients((), (), (8, 8), factors, "ycbcr", False)
        assert dataset_module._sampling_name(coefs) == name


def test_unreadable_files(save, tmp_path):
    good, missing, broken = save("good.jpg", 16, 16), str(tmp_path / "missing.jpg"), str(tmp_path / "broken.jpg")
    Path(broken).write_bytes(Path(good).read_bytes()[:300])
    data = DctDataset([good, missing, broken])
    for error, index in ((FileNotFoundError, 1), (JpegError, 2)):
        for get in (data.__getitem__, lambda i: data.__getitems__([0, i]), lambda i: frequency_stats([good, data.paths[i]])):
            with pytest.raises(error) as caught:
                get(index)
            assert data.paths[index] in str(caught.value)
    with pytest.raises(JpegError, match=r"broken\.jpg"):  # out of a worker
        list(DataLoader(data, 3, sampler=[0, 2], num_workers=1, multiprocessing_context="fork", collate_fn=collate))


def refusals() -> list[Refusal]:
    def build(**options: Any) -> Any:
        return lambda: DctDataset(["a.jpg", "b.jpg"], **options)

    a_list = "paths must be a list of files, got"
    item = (torch.zeros(64, 2, 2), torch.zeros(128, 1, 1))
    dtypes = "dtype must be float16, bfloat16, float32 or float64"
    odd = "size must be multiples of 16 pixels (a block of 4:2:0 chroma), got"
    return [
        Refusal(
            TypeError,
            f"DctDataset: {a_list} str; a folder is read by DctDataset.from_folder",
            lambda: DctDataset("train"),
        ),
        Refusal(TypeError, f"frequency_stats: {a_list} bytes", lambda: frequency_stats(b"")),
        Refusal(ValueError, "frequency_stats: paths must name at least one file, got none", lambda: frequency_stats([])),
        Refusal(
            ValueError, "frequency_stats: max_images must be at least 1, got 0", lambda: frequency_stats([b""], max_images=0)
        ),
        Refusal(
            TypeError,
            "frequency_stats: max_images must be an int, got 0.5",
            lambda: frequency_stats([b""], max_images=0.5),
        ),
        Refusal(ValueError, "frequency_stats: threads must be at least 1, got 0", lambda: frequency_stats([b""], threads=0)),
        Refusal(ValueError, "DctDataset: targets must be one for each of 2 paths, got 1", build(targets=[1])),
        Refusal(TypeError, f"DctDataset: {dtypes}, got int16", build(dtype=torch.int16)),
        Refusal(ValueError, "DctDataset: freqs must lie in 0..63 for block_size 8, got 64", build(freqs=[64])),
        Refusal(ValueError, "DctDataset: mean must be [64] or [3, 64], got [3]", build(mean=[1, 2, 3])),
        Refusal(
            ValueError,
            "DctDataset: std must be [2] or [3, 2], got [3, 64]; take those of freqs with std[..., freqs]",
            build(std=torch.ones(3, 64), freqs=[0, 1]),
        ),
        Refusal(TypeError, "DctDataset: mean must be a tensor or numbers, got 'x'", build(mean="x")),
        Refusal(ValueError, "DctDataset: mean must be finite, got nan", build(mean=[math.nan] * 64)),
        Refusal(ValueError, "DctDataset: std must be finite, got inf", build(std=[1.0] * 63 + [math.inf])),
        Refusal(
            ValueError,
            "DctDataset: std must be positive, got 0; take 1 for frequencies that never vary, as frequency_stats does, or "
            "leave them out of freqs",
            build(std=[1.0] * 63 + [0.0]),
        ),
        Refusal(ValueError, f"DctDataset: {odd} (100, 100); the nearest is (96, 96)", build(size=100)),
        Refusal(ValueError, f"DctDataset: {odd} (32, 0); the nearest is (32, 16)", build(size=(32, 0))),
        Refusal(ValueError, "DctDataset: size must be an int or (H, W), got (16,)", build(size=(16,))),
        Refusal(TypeError, "DctDataset: size must be an int, got 16.0", build(size=16.0)),
        Refusal(ValueError, "DctDataset: train=True crops at random, which needs size=", build(train=True)),
        Refusal(ValueError, "DctDataset: threads must be at least 1, got 0", build(threads=0)),
        Refusal(ValueError, "jpeg.collate: items must be those of a batch, got none", lambda: collate([])),
        Refusal(
            TypeError,
            "jpeg.collate: items must be (y, cbcr) or (y, cbcr, target) of a DctDataset, got Tensor",
            lambda: collate([item[0]]),
        ),
        Refusal(
            ValueError,
            "jpeg.collate: items must all have a target or none, got tuples of 2 and 3",
            lambda: collate([item, (*item, 1)]),
        ),
        Refusal(
            ValueError,
            "jpeg.collate: images must have one grid of luma blocks, got 2 x 2, 3 x 2; pass size= to the DctDataset",
            lambda: collate([item, (torch.zeros(64, 3, 2), item[1])]),
        ),
        Refusal(ValueError, "jpeg2dct.loads: channels must be one of (3, 1), got 2", lambda: jpeg2dct.loads(b"", channels=2)),
    ]


@pytest.mark.parametrize("refusal", refusals(), ids=lambda refusal: refusal.message[:60])
def test_refuses(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert f"{caught.type.__name__}: {caught.value}" == f"{refusal.error.__name__}: {refusal.message}"


# ---- statistics ----------------------------------------------------------------------------------------------------------


def over_all(paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """By numpy, over every block at once."""
    blocks: list[list[np.ndarray]] = [[], [], []]
    for path in paths:
        coefs = read(path)
        for c, (component, table) in enumerate(zip(coefs.components, coefs.qtables, strict=True)):
            blocks[c].append((component.double() * table).numpy().reshape(-1, 64))
    stacked = [np.concatenate(parts) for parts in blocks]
    return np.stack([b.mean(0) for b in stacked]), np.stack([b.std(0) for b in stacked])


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_statistics(files, save, threads):
    paths = [*files, *(save(f"more{i}.jpg", 30 + i, 20, seed=i, quality=40 + i) for i in range(20))]
    mean, std = frequency_stats(paths, threads=threads, progress=False)
    assert mean.dtype == std.dtype == torch.float32
    wanted_mean, wanted_std = over_all(paths)
    assert (wanted_std == 0).any()
    wanted_std[wanted_std == 0] = 1
    assert_close(mean, torch.from_numpy(wanted_mean), "mean")
    assert_close(std, torch.from_numpy(wanted_std), "std")
    backwards = frequency_stats(paths[::-1], threads=threads)
    assert torch.equal(backwards[0], mean)
    assert torch.equal(backwards[1], std)


def test_statistics_normalise(files):
    """Their dataset has mean 0 and standard deviation 1."""
    mean, std = frequency_stats(files[:5])
    y, cbcr = collate(DctDataset(files[:5], mean=mean, std=std, dtype=F64).__getitems__(range(5)))
    for planes in (y, *cbcr.split(64, 1)):
        assert planes.mean((0, 2, 3)).abs().max() < 1e-5
        deviation = planes.std((0, 2, 3), correction=0)
        varies = planes.amax((0, 2, 3)) != planes.amin((0, 2, 3))
        assert (deviation - varies.double()).abs().max() < 1e-5
        assert varies.sum() > 10


def test_statistics_of_chosen_images(files):
    for count, chosen in ((1, files[:1]), (3, files[::2]), (4, [files[i] for i in (0, 1, 3, 4)]), (99, files)):
        mean, std = over_all(chosen)
        for ours, wanted in zip(frequency_stats(files, max_images=count), (mean, np.where(std, std, 1)), strict=True):
            assert_close(ours, torch.from_numpy(wanted), f"of {count}")


def test_statistics_of_gray_and_of_mixed_files(save):
    gray = [save("a.jpg", 16, 16, mode="L"), save("b.jpg", 24, 9, mode="L", seed=3)]
    mean, std = frequency_stats(gray)
    assert mean[0].abs().max() > 1
    assert_same(mean[1:], torch.zeros(2, 64), "mean")
    assert_same(std[1:], torch.ones(2, 64), "std")
    colour = save("c.jpg", 16, 16, subsampling="4:4:4")
    both = frequency_stats([*gray, colour])
    assert_same(torch.stack(frequency_stats([colour]))[:, 1:], torch.stack(both)[:, 1:], "gray files count for Y only")
    other = save("d.jpg", 16, 16)
    with pytest.raises(JpegError) as caught:
        frequency_stats([*gray, colour, other])
    assert str(caught.value) == (f"frequency_stats: files must have one chroma sampling, {colour} has 4:4:4, {other} 4:2:0")
    cmyk = save("e.jpg", 16, 16, mode="CMYK")
    with pytest.raises(JpegError, match=r"^frequency_stats: .*e\.jpg must be ycbcr or gray, got cmyk"):
        frequency_stats([cmyk])


def extreme(values: list[int], table: list[int]) -> bytes:
    """A gray file of one block per value: all its coefficients, all its steps."""
    component = torch.tensor(values, dtype=torch.int16).reshape(1, -1, 1).expand(1, len(values), 64).clone()
    qtable = torch.tensor(table, dtype=torch.int32)
    return write(JpegCoefficients((component,), (qtable,), (8, 8 * len(values)), ((1, 1),), "gray", False))


def test_statistics_are_exact_far_from_zero():
    """A mean of 5 * 10^7 and a deviation of half a step, which sums in floating point would lose."""
    mean, std = frequency_stats([extreme([1000, 999] * 8, [50000] * 64)] * 3)
    assert_same(mean[0], torch.full((64,), 999.5 * 50000), "mean")
    assert_same(std[0], torch.full((64,), 25000.0), "std")
    mean, std = frequency_stats([extreme([7] * 5, [3] * 64)])
    assert_same(mean[0], torch.full((64,), 21.0), "mean")
    assert_same(std[0], torch.ones(64), "no variation")


class Bar:
    """What tqdm shows."""

    made: list[Bar]

    def __init__(self, **options: Any) -> None:
        self.options, self.count, self.closed = options, 0, False
        Bar.made.append(self)

    def update(self, count: int) -> None:
        self.count += count

    def close(self) -> None:
        self.closed = True


def test_progress(files, monkeypatch):
    """A bar on a terminal where tqdm is; none, and no complaint, without either, or on request."""
    Bar.made = []
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    frequency_stats(files)
    assert not Bar.made  # standard error is no terminal
    monkeypatch.setattr("sys.stderr", types.SimpleNamespace(isatty=lambda: True))
    plain = frequency_stats(files * 4)
    (bar,) = Bar.made
    assert (bar.options["total"], bar.count, bar.closed) == (24, 24, True)
    frequency_stats(files, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert_same(frequency_stats(files * 4)[0], plain[0], "without tqdm")
    assert len(Bar.made) == 1


# ---- jpeg2dct ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height_width", [(40, 56), (33, 50), (1, 1), (16, 17)])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4", "4:2:2", None])
def test_jpeg2dct(tmp_path, height_width, subsampling):
    """Shapes and products; each file on the grid it has."""
    gray = subsampling is None
    data = jpeg(*height_width, mode="L") if gray else jpeg(*height_width, subsampling=subsampling)
    coefs = read(data)
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    height, width = height_width
    down, across = {"4:2:0": (16, 16), "4:4:4": (8, 8), "4:2:2": (8, 16), None: (16, 16)}[subsampling]
    for normalized in (True, False):
        planes = jpeg2dct.loads(data, normalized)
        assert [p.dtype for p in planes] == [np.int16] * 3
        assert planes[0].shape == (-(-height // 8), -(-width // 8), 64)
        assert planes[1].shape == planes[2].shape == (-(-height // down), -(-width // across), 64)
        for c, plane in enumerate(planes[: len(coefs.components)]):
            wanted = coefs.components[c].int() * (coefs.qtables[c] if normalized else 1)
            np.testing.assert_array_equal(plane, wanted.numpy())
        assert not gray or not (planes[1].any() or planes[2].any())
        (alone,) = jpeg2dct.load(path, normalized, channels=1)
        np.testing.assert_array_equal(alone, planes[0])
        for plane, same in zip(planes, jpeg2dct.load(str(path), normalized), strict=True):
            np.testing.assert_array_equal(plane, same)


def test_jpeg2dct_arrays_are_the_callers_own():
    first, second = (jpeg2dct.loads(jpeg(16, 16), False) for _ in range(2))
    first[0][:] = 1
    assert not np.array_equal(first[0], second[0])


def test_jpeg2dct_refuses():
    """What that library clips, transcodes or gets wrong."""
    assert jpeg2dct.loads(extreme([546, -546], [60] * 64))[0].min() == -32760
    assert jpeg2dct.loads(extreme([547], [60] * 64), normalized=False)[0].max() == 547
    for value, step in ((547, 60), (-547, 60)):
        with pytest.raises(JpegError) as caught:
            jpeg2dct.loads(extreme([value, 1], [step] * 64))
        assert str(caught.value) == (
            f"jpeg2dct.loads: dequantised coefficients must fit int16, got {value * step}; pass normalized=False and multiply "
            "by the tables of fourfold.jpeg.read in a wider type"
        )
    with pytest.raises(JpegError, match=r"^jpeg2dct\.loads: the file must be ycbcr or gray, got cmyk"):
        jpeg2dct.loads(jpeg(16, 16, mode="CMYK"))
    with pytest.raises(JpegError):
        jpeg2dct.loads(jpeg(16, 16)[:200])
    with pytest.raises(FileNotFoundError):
        jpeg2dct.load("nowhere.jpg")
