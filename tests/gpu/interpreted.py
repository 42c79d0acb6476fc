"""Cases of tests/test_triton_interpreter.py: run with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from fourfold.triton_kernels import dct_normalize
from gpu import cases_blockdct as blockdct
from gpu.harness import DTYPES

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_interpreter.py"


@pytest.mark.parametrize("dtype", DTYPES, ids=blockdct.name_of)
@pytest.mark.parametrize("layout", ["planar", "blocks"])
def test_dct_normalize(layout, dtype):
    rtol = 2**-7 if dtype == torch.bfloat16 else 0.0  # the interpreter truncates to bfloat16; GPUs round
    blockdct.normalize_matches(dct_normalize, layout, dtype, torch.device("cpu"), rtol)


def test_nothing_to_do():
    table = torch.ones(1, 64)
    for shape, freqs in (
        ((0, 3, 4, 64), None),
        ((2, 0, 4, 64), None),
        ((2, 3, 4, 64), []),
    ):
        y = dct_normalize(
            torch.zeros(shape, dtype=torch.int16),
            table,
            None,
            None,
            freqs,
            "planar",
            torch.float32,
        )
        assert y.numel() == 0
        assert y.shape == (shape[0], 64 if freqs is None else 0, *shape[1:3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coefs": torch.zeros(3, 4, 64)}, "coefs must be int16"),
        ({"qtable": torch.ones(2, 64)}, "G a divisor of 3"),
        (
            {"qtable": torch.ones(1, 64, dtype=torch.float64)},
            "qtable must be torch.float32",
        ),
        ({"mean": torch.ones(64)}, r"mean must be \[2\]"),
        ({"freqs": [0, 64]}, "freqs must lie in 0..63"),
        ({"freqs": [3, 3]}, "not repeat"),
        ({"layout": "interleaved"}, "layout must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, words):
    coefs = torch.zeros(3, 2, 4, 64, dtype=torch.int16)
    given = {
        "coefs": coefs,
        "qtable": torch.ones(1, 64),
        "mean": None,
        "std": None,
        "freqs": [0, 1],
        "layout": "planar",
    }
    with pytest.raises(ValueError, match=words):
        dct_normalize(**{**given, **change}, dtype=torch.float32)
