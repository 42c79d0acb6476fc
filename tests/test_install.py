"""What is installed, and what an import needs and does without. Each case is a process of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import fourfold as ff
import pytest
from battery import run_script
from fourfold import _C

ORDER = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
X86 = ff.cpu_capability() != "neon"


def located(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin)


def test_the_parts_are_there():
    for part in ("triton_kernels", "benchmarks", "examples", "reproduce", "reference", "ops", "nn", "models", "jpeg", "compat"):
        assert importlib.util.find_spec(f"fourfold.{part}") is not None, part
    assert located("fourfold").with_name("py.typed").exists()
    binaries = located("fourfold._C").parent
    assert (binaries / "fourfold_ops.so").exists()
    assert (binaries / "fourfold_cuda.so").exists() == bool(ff.build_info()["cuda_archs"])
    assert (importlib.util.find_spec("fourfold._jpeg") is not None) == ff.has_jpeg()


def test_only_torch_and_numpy_are_needed():
    needed = [line for line in importlib.metadata.requires("fourfold") if "extra ==" not in line]
    assert sorted(line.split(">")[0].strip() for line in needed) == ["numpy", "torch"]


def test_version():
    assert ff.__version__ == importlib.metadata.version("fourfold")


def test_import_takes_nothing_optional():
    """Neither what the extras bring, nor the CUDA runtime, nor Triton's compiler."""
    run_script(
        "import sys, torch; before = set(sys.modules); import fourfold;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "optional = {'pytest', 'tqdm', 'matplotlib', 'scipy', 'sklearn', 'PIL', 'triton', 'torchvision', 'pybind11'};"
        "assert not new & optional, new & optional; assert 'fourfold.benchmarks' not in sys.modules"
    )


def test_works_without_triton():
    run_script(
        "import sys; sys.modules['triton'] = None;"  # import triton is an ImportError now
        "import torch, fourfold as ff; assert not ff.has_triton();"
        "y = ff.block_dct(torch.ones(1, 1, 8, 8)); assert abs(y[0, 0].item() - 8) < 1e-5;"
        "coefs = torch.ones(1, 1, 64, dtype=torch.int16); assert ff.dct_normalize(coefs, torch.ones(64)).sum() == 64"
    )


# A machine where torch.cuda is there, as far as the loader can see, and nothing else is.
PRETEND = """
import sys, warnings, pathlib, torch
torch.cuda.is_available = lambda: True
{setup}
warnings.simplefilter("error")
import fourfold as ff
from fourfold import _load
assert ff.block_dct(torch.ones(1, 1, 8, 8)).shape == (1, 64, 1, 1)
{then}
"""


def test_works_without_the_cuda_library():
    """It says what to do, the CPU works, and CUDA tensors would run the reference."""
    no_library = (
        "exists = pathlib.Path.exists; pathlib.Path.exists = lambda self: 'fourfold_cuda' not in self.name and exists(self)"
    )
    registered = (
        "assert 'rebuild fourfold with nvcc' in _load.missing['cuda'], _load.missing; assert not ff.has_cuda(); "
        "assert all(torch._C._dispatch_has_kernel_for_dispatch_key('fourfold::' + name, 'CUDA') "
        "for name in ff.reference.REFERENCES)"
    )
    run_script(PRETEND.format(setup=no_library, then=registered))


def test_works_where_the_cuda_library_does_not_load(tmp_path):
    """An OSError while loading, as with a torch built without CUDA, is no obstacle."""
    broken = (
        "load = torch.ops.load_library\n"
        "exists = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda self: 'fourfold_cuda' in self.name or exists(self)\n"
        "def load_library(path):\n"
        "    if 'fourfold_cuda' in str(path):\n"
        "        raise OSError('undefined symbol: aoti_torch_get_current_cuda_stream')\n"
        "    load(path)\n"
        "torch.ops.load_library = load_library"
    )
    then = "assert 'undefined symbol' in _load.missing['cuda']; assert not ff.has_cuda()"
    run_script(PRETEND.format(setup=broken, then=then))


def test_a_reference_in_place_of_a_kernel_warns():
    run_script(
        "import warnings; from fourfold import _load\n"
        "run = _load._warning_once('block_dct', lambda x: x + 1, 'no CUDA library; do this')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('default')\n"
        "    results = [run(k) for k in range(3)]\n"
        "assert results == [1, 2, 3]\n"
        "assert [str(w.message) for w in caught] == "
        "['fourfold: block_dct runs its slow reference on CUDA: no CUDA library; do this'], caught"
    )


def test_refuses_an_old_torch():
    done = run_script("import torch; torch.__version__ = '2.9.1'; import fourfold", ok=False)
    assert "ImportError: fourfold needs torch >= 2.10, found 2.9.1; run: pip install -U torch" in done.stderr


def run_main(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fourfold"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_main_prints_the_facts():
    done = run_main()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for fact in (ff.__version__, ff.cpu_capability(), ff.build_info()["compiler"], *ff.build_info()["isa_tiers"]):
        assert fact in done.stdout


def test_main_advises(monkeypatch, tmp_path, capsys):
    """On a machine where nothing is as it might be; and where all is, it is silent."""
    main = importlib.import_module("fourfold.__main__")
    pages, quota = tmp_path / "enabled", tmp_path / "cpu.max"
    monkeypatch.setattr(main, "HUGE_PAGES", pages)
    monkeypatch.setattr(main, "QUOTA", quota)
    monkeypatch.setattr(main.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    pages.write_text("always [madvise] never\n")
    quota.write_text("150000 100000\n")
    cores = min(2, len(os.sched_getaffinity(0)))
    monkeypatch.setattr(main.torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(main, "find_spec", lambda name: None if name in {"pandas", "tqdm"} else name)
    monkeypatch.setattr(main._load, "missing", {"jpeg": "no libjpeg; install it"})
    main.main()
    said = " ".join(capsys.readouterr().out.split())
    assert f"64 for {cores} cores" in said
    assert "- no libjpeg; install it (see docs/jpeg.md#without-libjpeg)" in said
    assert f"more threads than there are cores; OMP_NUM_THREADS={cores} (see docs/performance.md#threads)" in said
    assert "THP_MEM_ALLOC_ENABLE=1 in the environment, or out= (see docs/performance.md#where-the-result-is-written)" in said
    assert "for progress bars, Comparison.to_pandas: pip install tqdm pandas" in said

    pages.write_text("always madvise [never]\n")
    assert [text.partition(": ")[2].partition(" ")[0] for text in main.advice() if "memory that is there" in text] == ["out="]

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    pages.write_text("[always] madvise never\n")
    quota.write_text("max 100000\n")
    monkeypatch.setattr(main.torch, "get_num_threads", main.cores)
    monkeypatch.setattr(main, "find_spec", lambda name: name)
    monkeypatch.setattr(main._load, "missing", {})
    monkeypatch.setattr(main._C, "machine_capability", ff.cpu_capability)
    assert list(main.advice()) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(main.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(main, "cores", lambda: 4)
    assert list(main.advice()) == ["OMP_NUM_THREADS=1 holds torch at 1 of 4 cores (see docs/performance.md#threads)"]


@pytest.mark.parametrize("word", ["nonsense", "AVX2", " "])
def test_a_bad_capability_is_refused(word):
    done = run_main(FOURFOLD_CPU_CAPABILITY=word)
    assert done.returncode != 0
    assert (
        "ValueError: FOURFOLD_CPU_CAPABILITY must be one of baseline, avx2, avx512, avx512_bf16, amx, neon; "
        f"got '{word}'" in done.stderr
    )


def capability(word: str) -> str:
    script = "import fourfold; print(fourfold.cpu_capability(), end='')"
    return run_script(script, FOURFOLD_CPU_CAPABILITY=word).stdout


@pytest.mark.skipif(not X86, reason="this processor has one tier")
def test_capability_is_lowered_but_never_raised():
    machine = _C.machine_capability()
    assert capability("") == machine
    for tier in ("baseline", ORDER[max(ORDER.index(machine) - 1, 0)], machine, "amx"):
        assert capability(tier) == ORDER[min(ORDER.index(tier), ORDER.index(machine))]


def test_facts():
    info = ff.build_info()
    assert set(info) == {"compiler", "torch", "isa_tiers", "cuda_archs", "libjpeg"}
    assert ff.has_jpeg() == (info["libjpeg"] is not None)
    assert _C.machine_capability() in (*ORDER, "neon")
    assert set(info["isa_tiers"]) <= {*ORDER, "neon"}
    import torch

    if not torch.cuda.is_available():
        assert not ff.has_cuda()
        assert not ff.has_triton()


PACK = """
import sys, torch, fourfold as ff

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.coord, self.masked = ff.nn.CoordConv2d(64, 8, 1, activation="relu"), ff.nn.MaskedLinear(8, 5)

    def forward(self, x):
        return self.masked(self.coord(ff.block_dct(x)).mean((2, 3)))

torch.manual_seed(0)
net, x = Net().eval().requires_grad_(False), torch.rand(2, 1, 16, 16)
torch._inductor.aoti_compile_and_package(torch.export.export(net, (x,)), package_path=sys.argv[1])
torch.save((x, net(x)), sys.argv[2])
"""

RUN_PACKED = """
import sys, torch
torch.ops.load_library(sys.argv[3])
given, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(given), expected)
assert not [name for name in sys.modules if name.startswith("fourfold")]
"""


def test_a_package_of_aotinductor_needs_the_ops_alone(tmp_path):
    """docs/recipes.md: compiled ahead of time, a model runs where fourfold_ops.so is loaded and no Python of fourfold is."""
    files = str(tmp_path / "net.pt2"), str(tmp_path / "given.pt")
    run_script(PACK, *files)
    run_script(RUN_PACKED, *files, str(located("fourfold._C").with_name("fourfold_ops.so")))
