"""Shapes and where they come from. A bench_<family> file turns them into cases."""

from __future__ import annotations

import random
from typing import NamedTuple


class Shape(NamedTuple):
    size: tuple[int, ...]
    source: str

    def __str__(self) -> str:
        return "x".join(map(str, self.size))


CLASSIFIER = Shape((8, 3, 224, 224), "ImageNet crop; 28 blocks of 8 a row, which no vector length divides")
POWER_OF_TWO = Shape((8, 3, 256, 256), "the crop of segmentation and autoencoder papers")
LARGE = Shape((32, 3, 512, 512), "100 MB in, 100 MB out: nothing stays in a cache")
RAGGED = Shape((8, 3, 225, 301), "neither side is whole blocks: the last ones are edge-replicated")
JPEG_LUMA = Shape((32, 64, 64, 64), "luma blocks [B, h, w, 64] of 32 JPEG files of 512 x 512")
JPEG_SMALL = Shape((8, 28, 28, 64), "luma blocks [B, h, w, 64] of 8 JPEG files of 224 x 224")
RETEST = Shape((8, 3, 320, 320), "the larger crop at which ImageNet networks are tested")
PIXELS = (CLASSIFIER, POWER_OF_TWO, RETEST)  # of 8 RGB images; time per pixel should not depend on which


class Photos(NamedTuple):
    """JPEG files, made in memory from scikit-learn's two sample photos."""

    height: int
    width: int
    quality: int
    sampling: str = "4:2:0"
    progressive: bool = False
    count: int = 6
    source: str = "crops of two photos, encoded by Pillow; width x height"

    def __str__(self) -> str:
        kind = f"{self.sampling}{' progressive' * self.progressive}"
        return f"{self.count} files of {self.width}x{self.height}, q{self.quality} {kind}"


BATCH = 36  # files that are read together

# 500 x 375 is the usual size of ImageNet's files, 224 x 224 the network's.
PHOTOS = tuple(
    Photos(height, width, quality, sampling, progressive)
    for height, width in ((375, 500), (224, 224))
    for quality, sampling, progressive in (
        (90, "4:2:0", False),
        (75, "4:2:0", False),
        (96, "4:2:0", False),
        (90, "4:4:4", False),
        (90, "4:2:0", True),
    )
)


class Layer(NamedTuple):
    """A convolution, as wide and as deep along every axis, that keeps the image's size or divides it by its stride."""

    input: tuple[int, ...]  # B, C, then the image
    channels: int
    kernel: int
    stride: int
    source: str
    first: bool = False  # of its network: its input needs no gradient
    transposed: bool = False  # multiplies the size by its stride

    @property
    def rank(self) -> int:
        return len(self.input) - 2

    @property
    def padding(self) -> int:
        return (self.kernel - self.stride) // 2 if self.transposed else self.kernel // 2

    def __str__(self) -> str:
        kernel = "x".join([str(self.kernel)] * self.rank) if self.rank > 1 else f"kernel {self.kernel}"
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{kernel}{stride}, {'x'.join(map(str, self.input))} to {self.channels} channels"


PAPER = Layer((32, 2, 64, 64), 32, 1, 1, "the CoordConv paper's classifier: position tiled over 64 x 64", first=True)
STEM = Layer((32, 3, 64, 64), 64, 3, 1, "an image network's first layer", first=True)
WIDE_3X3 = Layer((16, 64, 64, 64), 64, 3, 1, "a residual block's 3 x 3")
SQUARE_1X1 = Layer((32, 64, 64, 64), 64, 1, 1, "a residual block's 1 x 1 of equal widths")
REDUCING_1X1 = Layer((16, 256, 64, 64), 64, 1, 1, "a bottleneck's reducing 1 x 1")
STRIDED = Layer((16, 16, 128, 128), 32, 3, 2, "a 3 x 3 that halves the image")
SOLO_HEAD = Layer((1, 256, 50, 76), 256, 3, 1, "SOLO's head on an 800 x 1216 image: one image, wide")
CONDINST_MASK = Layer((16, 8, 100, 136), 8, 1, 1, "CondInst's mask branch: large maps, few channels")
PPYOLO_NECK = Layer((8, 512, 19, 19), 256, 1, 1, "PP-YOLO's neck on 608 x 608: small maps, many channels")
LAYERS = (PAPER, STEM, WIDE_3X3, SQUARE_1X1, REDUCING_1X1, STRIDED, SOLO_HEAD, CONDINST_MASK, PPYOLO_NECK)

SERIES = Layer((16, 64, 2048), 64, 3, 1, "a sensor series of 2048 steps")
VOLUME = Layer((2, 16, 16, 48, 48), 32, 3, 1, "a crop of a medical volume")
DECODER = Layer((16, 64, 32, 32), 32, 4, 2, "an image decoder's doubling layer", transposed=True)


class Linear(NamedTuple):
    """A linear layer and how many rows of x it meets at once."""

    rows: int  # N of its weight [N, K]
    columns: int  # K
    batch: int  # M
    source: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}, M={self.batch}"


SQUARE = Linear(1024, 1024, 64, "an attention projection of a transformer of width 1024, such as BERT-large or ViT-L")
FEED_FORWARD = Linear(4096, 1024, 64, "the first feed-forward layer of a transformer of width 1024")
PROJECTION = Linear(4096, 4096, 64, "an attention projection of a language model of width 4096, such as Llama 7B")
LENET = (
    Linear(300, 784, 60, "LeNet-300-100's first layer, MNIST in batches of 60: the lottery-ticket papers' network"),
    Linear(100, 300, 60, "LeNet-300-100's second layer"),
)
SUPSUP = Linear(1024, 1024, 16, "SupSup's fully connected network on permuted MNIST: hidden layers of 1024")
CONV6 = (
    Layer((60, 64, 32, 32), 64, 3, 1, "Conv-6's second layer, CIFAR-10 in batches of 60: the lottery-ticket papers' network"),
    Layer((60, 128, 16, 16), 128, 3, 1, "Conv-6's fourth layer"),
    Layer((60, 256, 8, 8), 256, 3, 1, "Conv-6's sixth layer"),
)


class Pair(NamedTuple):
    """Two layers of equally many neurons, seen on the same samples."""

    features: int
    samples: int
    source: str

    def __str__(self) -> str:
        return f"{self.features}x{self.samples}"


NARROW_PAIR = Pair(64, 2000, "neurons x datapoints: two narrow layers on a small data set")
PAIR = Pair(256, 10000, "neurons x datapoints: two layers of a CIFAR network on its test set")
MEDIUM_PAIR = Pair(512, 10000, "neurons x datapoints: two wider layers on that test set")
WIDE_PAIR = Pair(1024, 20000, "neurons x datapoints: two layers of a transformer of width 1024 on 20 000 tokens")
PAIRS = (NARROW_PAIR, PAIR, MEDIUM_PAIR, WIDE_PAIR)


class Maps(NamedTuple):
    """A layer's activations on a batch of images."""

    images: int
    channels: int
    height: int
    width: int
    source: str

    def __str__(self) -> str:
        return "x".join(map(str, self[:4]))


RESIDUAL_MAPS = (
    Maps(64, 64, 56, 56, "a ResNet-50's first stage, 224 x 224"),
    Maps(128, 256, 28, 28, "a ResNet-50's second stage"),
    Maps(256, 512, 14, 14, "a ResNet-50's third stage"),
    Maps(256, 2048, 7, 7, "a ResNet-50's last stage: 49 pixels an image"),
)

RANDOM_RANGE = "B odd in 1..15, C in 1..4, H and W in 97..640"
RANDOM_LAYERS = "B odd in 1..15, 1..96 channels in and out, H and W in 17..160, 1 x 1 or 3 x 3, stride 1 or 2"
RANDOM_LINEARS = "N and K in 33..2000, M in 1..200"
RANDOM_PAIRS = "16..300 neurons, 12 to 40 times as many datapoints"


def random_images(seed: int, count: int = 6) -> list[Shape]:
    """`count` image shapes [B, C, H, W] drawn from RANDOM_RANGE."""
    draw = random.Random(seed)
    return [
        Shape(
            (draw.randrange(1, 16, 2), draw.randint(1, 4), draw.randint(97, 640), draw.randint(97, 640)),
            f"seed {seed}: {RANDOM_RANGE}",
        )
        for _ in range(count)
    ]


def random_layers(seed: int, count: int = 6) -> list[Layer]:
    """`count` layers drawn from RANDOM_LAYERS."""
    draw = random.Random(seed)
    return [
        Layer(
            (draw.randrange(1, 16, 2), draw.randint(1, 96), draw.randint(17, 160), draw.randint(17, 160)),
            draw.randint(1, 96),
            draw.choice((1, 3)),
            draw.choice((1, 2)),
            f"seed {seed}: {RANDOM_LAYERS}",
        )
        for _ in range(count)
    ]


def random_linears(seed: int, count: int = 6) -> list[Linear]:
    """`count` linear layers drawn from RANDOM_LINEARS."""
    draw = random.Random(seed)
    return [
        Linear(draw.randint(33, 2000), draw.randint(33, 2000), draw.randint(1, 200), f"seed {seed}: {RANDOM_LINEARS}")
        for _ in range(count)
    ]


def random_pairs(seed: int, count: int = 6) -> list[Pair]:
    """`count` pairs of layers drawn from RANDOM_PAIRS."""
    draw = random.Random(seed)
    drawn = []
    for _ in range(count):
        features = draw.randint(16, 300)
        drawn.append(Pair(features, draw.randint(12 * features, 40 * features), f"seed {seed}: {RANDOM_PAIRS}"))
    return drawn
