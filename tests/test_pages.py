"""Every block of code on every page is run, or looked up where running it would set a machine up or take hours."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import fourfold as ff
import pytest
import torch
from pages import FENCE, PAGES, ROOT, Block, blocks, name_of, python_of

NEEDS = {
    "PIL": "needs pillow; run: pip install pillow",
    "transformers": "needs transformers; run: pip install transformers",
}
BLOCKS = [block for page in PAGES for block in blocks(page)]
#: Where and what: each command once.
COMMANDS = {
    line: block
    for block in BLOCKS
    if block.kind == "sh"
    for line in (re.sub(r"\s+#.*", "", line).strip() for line in block.text.replace("\\\n", "").splitlines())
    if line and not line.startswith("#")
}


def stated_shapes(program: str) -> list[tuple[str, list[int]]]:
    """Of its lines `name = ...  # [2, 3 * 64, 13, 29]`."""
    return [(name, eval(shape)) for name, shape in re.findall(r"^ *(\w+) = .*# (\[[\d, *]+\])$", program, re.M)]


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=name_of)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of transformers
def test_python_runs(page):
    """And the shapes in its comments are the shapes."""
    program = python_of(page)
    for module in re.findall(r"^(?:import|from) (\w+)", program, re.M):
        pytest.importorskip(module, reason=NEEDS.get(module, module))
    if "ff.jpeg" in program and not ff.has_jpeg():
        pytest.skip("built without libjpeg")
    names: dict[str, torch.Tensor] = {}
    exec(compile(program, page.name, "exec"), names)
    shapes = stated_shapes(program)
    assert len(shapes) >= 3
    assert [(name, list(names[name].shape)) for name, _ in shapes] == shapes


def test_no_page_lost_its_python():
    with_python = {name_of(page) for page in PAGES if python_of(page)}
    guides = {"block_dct.md", "jpeg.md", "coordconv.md", "maskmm.md", "cca.md", "swapping.md", "models_swapped.md", "scale.md"}
    assert with_python >= guides | {"README.md", "index.md", "tour.md", "recipes.md", "performance.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_fences_are_such_as_are_found(page):
    """At the beginning of a line, and of no other kind: what is no Python, no command and no text is run by nobody."""
    text = page.read_text(encoding="utf-8")
    assert [str(block) for block in blocks(page) if block.kind not in {"python", "sh", "text"}] == []
    assert len(re.findall(r"```(?!.*`)|~~~|<pre", text)) == 2 * len(FENCE.findall(text))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind == "text"], ids=str)
def test_text_is_no_python(block):
    with pytest.raises(SyntaxError):
        compile(block.text, str(block), "exec")


@pytest.mark.parametrize("name", ["python", "docs"])
def test_other_places_hold_no_code_that_nobody_runs(name):
    """The reference shows docstrings."""
    for path in sorted((ROOT / name).rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line.lstrip().startswith((">>>", "```")) or line.endswith("::")] == [], path


# ---- commands ------------------------------------------------------------------------------------------------------------


def options_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def make(words: list[str]) -> None:
    """CI runs make; here target and variables are looked up."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".ci/setup.sh", "csrc/common/isa.h"))
    for word in words:
        variable = re.match(r"(\w+)=", word)
        assert re.search(rf"\b{variable[1]}\b" if variable else rf"^{word}:", text, re.M), word


def pip(words: list[str]) -> None:
    """What .ci/setup.sh does whenever make is called."""
    setup, project = ((ROOT / name).read_text(encoding="utf-8") for name in (".ci/setup.sh", "pyproject.toml"))
    assert words.pop(0) == "install"
    tools = re.search(r"^build_tools=\((.*)\)$", setup, re.M)[1].split()
    extras = re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2].partition("\n\n")[0], re.M)
    for word in words:
        if word.startswith("--"):
            assert word in setup
        elif word.startswith("."):
            assert word == "." or set(word[2:-1].split(",")) <= set(extras)
        else:
            assert word in {"torch", *tools}
    if len(words) > 1 and not words[0].startswith((".", "-")):
        assert words == tools


def module(words: list[str]) -> None:
    """With --list, which parses all options and stops before the work; that of `python -m fourfold` takes no time."""
    name, *arguments = words
    if name == "fourfold":
        printed = subprocess.run([sys.executable, "-m", name, *arguments], capture_output=True, text=True, check=True).stdout
        assert ff.__version__ in printed and ff.cpu_capability() in printed
        return
    assert name in {"fourfold.benchmarks", "fourfold.reproduce"}
    if "--render" in arguments:  # prints the page unless it is told to write it
        arguments = re.sub(r" ?--write \S+", "", " ".join(arguments)).split()
        assert subprocess.run([sys.executable, "-m", name, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    else:
        assert importlib.import_module(f"{name}.__main__").main([*arguments, "--list"]) == 0


def script(words: list[str]) -> None:
    """Examples have tests of their own; options are looked up."""
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    assert [option for option in options_of(words) if f'"{option}"' not in text] == []


def torchrun(words: list[str], folder: Path) -> None:
    """With gloo, two processes in all: of one agent, or of two that stand for two machines."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    agent, program, arguments = words[:at], ROOT / words[at], words[at + 1 :]
    machines = int(agent[agent.index("--nnodes") + 1]) if "--nnodes" in agent else 1
    assert machines in {1, 2}
    agent[agent.index("--nproc-per-node") + 1] = str(2 // machines)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agent = [word.replace("HOST:29500", f"localhost:{port}") for word in agent]
    agent += ["--local-addr", "localhost"] if machines > 1 else ["--standalone"]
    assert '"--quick"' in program.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", *agent, str(program), *arguments, "--quick"]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": surroundings, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, **options) for _ in range(machines)]
    try:
        ended = [one.communicate(timeout=150) for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [0] * machines, ended
    assert "2 processes" in "".join(printed for printed, _ in ended)


@pytest.mark.parametrize(("command", "block"), COMMANDS.items(), ids=COMMANDS)
def test_commands(command: str, block: Block, tmp_path):
    words = shlex.split(command)
    while re.match(r"\w+=", words[0]):
        make([words.pop(0)])  # an environment variable
    first, *words = words
    if first == "make":
        make(words)
    elif first == "pip":
        pip(words)
    elif first == "python" and words[0] == "-m":
        module(words[1:])
    elif first == "python":
        script(words)
    elif first == "torchrun":
        torchrun(words, tmp_path)
    else:
        pytest.fail(f"{block}: nobody runs {command!r}; add it here, or mark the block python or text")
