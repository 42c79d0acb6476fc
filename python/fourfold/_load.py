"""Finds the libraries and picks the implementation of each op per device; nothing else.

CPU kernels are in ``fourfold_ops.so``. On a machine with a GPU each op has one CUDA implementation: CUDA C++ from
``fourfold_cuda.so``, or a Triton launcher from ``fourfold.triton_kernels``. Where that is missing, CUDA tensors run the
reference and one warning says what to install.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import _C
from ._pages import see

try:
    _C.cpu_capability()  # raises, and names the words there are, when FOURFOLD_CPU_CAPABILITY holds none of them
except ValueError as error:
    raise ValueError(f"{error}{see('performance.md#instruction-sets')}") from None

# In editable installs the Python files stay in the source tree; the libraries always lie beside _C.
_LIBRARIES = Path(_C.__file__).parent

#: Ops whose CUDA implementation is a Triton launcher of the same name; every other op's is CUDA C++.
TRITON_OPS = (
    "dct_normalize",
    "_normalize_grids",
    "_coord_tables",
    "_coord_tables_backward",
    "_add_map_",
    "_batch_sum",
    "pack_mask",
    "unpack_mask",
    "bernoulli_mask",
    "threshold_mask",
    "_apply_mask",
    "_mask_gradients",
    "_masked_linear",
    "_masked_linear_backward",
    "sddmm",
    "_superpose",
    "_masked_dots",
    "task_linear",
    "_task_linear_transposed",
    "_task_outer",
    "_pack_samples",
    "_add_wide_",
    "_count_nonfinite",
    "_gram_",
    "_image_spectra",
    "_spectra_gram_",
)

#: What is missing here: {"jpeg", or where there is a GPU "cuda" or "triton" implementations of ops: reason and remedy}.
missing: dict[str, str] = {}

_registrations = torch.library.Library("fourfold", "IMPL")


def _load_cpu() -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise ImportError(f"fourfold needs torch >= 2.10, found {torch.__version__}; run: pip install -U torch")
    torch.ops.load_library(_LIBRARIES / "fourfold_ops.so")


def _load_jpeg() -> Any:
    """fourfold._jpeg, or None."""
    try:
        return import_module("._jpeg", __package__)
    except ModuleNotFoundError:
        packages = "Debian: libjpeg62-turbo-dev, Ubuntu: libjpeg-turbo8-dev, Fedora: libjpeg-turbo-devel, conda: libjpeg-turbo"
        missing["jpeg"] = f"this fourfold was built without libjpeg; install its headers ({packages}) and build fourfold again"
    except ImportError as error:
        missing["jpeg"] = f"the libjpeg that this fourfold was built with does not load ({error}); install it again"
    return None


def _load_cuda() -> None:
    library = _LIBRARIES / "fourfold_cuda.so"
    if not library.exists():
        missing["cuda"] = "this build has no CUDA library; rebuild fourfold with nvcc on the PATH (FOURFOLD_CUDA=ON)"
        return
    try:
        torch.ops.load_library(library)
    except OSError as error:
        missing["cuda"] = f"its CUDA library does not load with this torch ({error}); rebuild fourfold with FOURFOLD_CUDA=ON"


def _load_triton() -> None:
    try:
        # By name: the wheel maps it in from beside this package, so only an installed fourfold has it for a type checker.
        triton_kernels = import_module(".triton_kernels", __package__)
    except ImportError as error:
        missing["triton"] = f"Triton is not usable ({error}); run: pip install triton"
        return
    for name in TRITON_OPS:
        _registrations.impl(name, getattr(triton_kernels, name.strip("_")), "CUDA")


def _fall_back() -> None:
    """Registers the reference for CUDA tensors wherever the real implementation is missing."""
    from .reference import REFERENCES

    for name, reference in REFERENCES.items():
        tool = "triton" if name in TRITON_OPS else "cuda"
        if tool in missing:
            _registrations.impl(name, _warning_once(name, reference, missing[tool]), "CUDA")


def _warning_once(name: str, reference: Callable[..., Any], reason: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # The default warning filter shows a message once per place.
        warnings.warn(f"fourfold: {name} runs its slow reference on CUDA: {reason}", stacklevel=2)
        return reference(*args)

    return run


_load_cpu()
jpeg = _load_jpeg()
if torch.cuda.is_available():
    _load_cuda()
    _load_triton()
    _fall_back()
