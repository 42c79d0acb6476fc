"""``python -m fourfold``: what works on this machine, and what to do about what doesn't."""

import platform

import torch

import fourfold as ff
from fourfold import _C, _load


def main() -> None:
    """Prints the facts."""
    info = ff.build_info()
    tier = ff.cpu_capability()
    lowered = "" if tier == _C.machine_capability() else f" (this machine has {_C.machine_capability()})"
    archs = ", ".join(info["cuda_archs"])
    no_gpu = "no GPU that torch can use; CPU kernels serve CPU tensors"
    rows = [
        ("fourfold", f"{ff.__version__}, built by {info['compiler']} against torch {info['torch']}"),
        ("python, torch", f"{platform.python_version()}, {torch.__version__}, {torch.get_num_threads()} threads"),
        ("CPU kernels", f"{tier}{lowered}; built for {', '.join(info['isa_tiers'])}"),
        (
            "CUDA library",
            f"built for {archs}"
            if archs
            else "not built; for GPUs: a CUDA build of torch, nvcc, and a reinstall with FOURFOLD_CUDA=ON",
        ),
        ("JPEG", info["libjpeg"] or _load.missing["jpeg"]),
    ]
    if torch.cuda.is_available():
        rows.append(("GPU", torch.cuda.get_device_name()))
        rows += [(f"GPU ops in {tool}", _load.missing.get(tool, "native")) for tool in ("cuda", "triton")]
    else:
        rows.append(("GPU", no_gpu))
    for name, fact in rows:
        print(f"{name:<16}{fact}")


if __name__ == "__main__":
    main()
