"""Triton kernels compile for every supported GPU architecture without one at hand, and keep everything in registers."""

import re
import subprocess
from pathlib import Path

import pytest

WHY = "Triton is not installed; run: pip install triton"
triton_kernels = pytest.importorskip("fourfold.triton_kernels", reason=WHY)


def told(kernel, signature, constants, _):
    """The kernel, the types that it meets, its constants."""
    types = dict.fromkeys(kind for kind in signature.values() if kind.startswith("*"))
    return f"{kernel.__name__}-{','.join(types)}-{','.join(f'{k}={v}' for k, v in constants.items())}"


CASES = [pytest.param(*case, id=told(*case)) for cases in triton_kernels.COMPILED.values() for case in cases]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "signature", "constants", "options"), CASES)
def test_no_local_memory(kernel, signature, constants, options, capability, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget

    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(\w+):(\d+)", report))
    assert int(usage["REG"]) > 0
    assert (usage["LOCAL"], usage["STACK"]) == ("0", "0"), report
