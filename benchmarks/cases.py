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

RANDOM_RANGE = "B odd in 1..15, C in 1..4, H and W in 97..640"


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
