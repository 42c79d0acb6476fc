"""The map can't go stale: every registered op has all that an op must have, and every public function its documentation."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import battery
import fourfold as ff
import pytest
import torch
from fourfold.benchmarks import Settings, every_case
from fourfold.ops import _register
from fourfold.reference import REFERENCES

ROOT = Path(__file__).parents[1]
OPS = {op.name: op for ops in battery.families().values() for op in ops}
#: Ops that write into an argument, tested through the out= of the op they belong to.
OUT_OPS = {op.out: op for op in OPS.values() if op.out}
REGISTERED = sorted(
    schema.name.removeprefix("fourfold::") for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fourfold::")
)
LEAVES = [name for name in REGISTERED if not name.startswith("_")]
#: Public functions over the ops that have no schema of their own: {name: family}, as the test files declare them.
COMPOSITES = {name: family for family in battery.families() for name in battery.composites(family)}
FUNCTIONS = [name for name in ff.__all__ if inspect.isfunction(getattr(ff, name))]
#: Functions over tensors, as opposed to facts about the build.
TENSOR_FUNCTIONS = [name for name in FUNCTIONS if getattr(ff, name).__module__.startswith("fourfold.ops.")]


def schema_of(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.fourfold, name).default._schema


def test_there_are_ops():
    assert {"block_dct", "block_idct", "dct_normalize"} <= set(LEAVES) < set(REGISTERED)


@pytest.mark.parametrize("name", REGISTERED)
def test_has_a_reference(name):
    """Of the same arguments."""
    arguments = [argument.name for argument in schema_of(name).arguments]
    assert list(inspect.signature(REFERENCES[name]).parameters) == arguments


def test_references_are_of_ops():
    assert sorted(REFERENCES) == REGISTERED


@pytest.mark.parametrize("name", REGISTERED)
def test_has_a_fake_and_a_cpu_kernel(name):
    assert "fake" in _register.registered[name]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fourfold::{name}", "Meta")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fourfold::{name}", "CPU")


@pytest.mark.parametrize("name", REGISTERED)
def test_has_samples(name):
    """And reaches the op with them: what the declared function calls is really this op."""
    op = OPS.get(name) or OUT_OPS[name]
    reached = {overload.name() for sample in op.small() for overload, _ in battery.op_calls(op, sample)}
    assert f"fourfold::{name}" in reached
    assert {sample.label for sample in op.samples(op.dtypes[0])}


@pytest.mark.parametrize("name", REGISTERED)
def test_has_error_cases(name):
    """In the words of C++ too: what it says names the op."""
    op = OPS.get(name) or OUT_OPS[name]
    refusals = op.refusals()
    assert len(refusals) >= 5
    assert all(refusal.message.startswith(f"{op.name}: ") for refusal in refusals)


@pytest.mark.parametrize("name", REGISTERED)
def test_mutates_nothing_it_returns(name):
    """An op that writes into an argument is internal and returns nothing; every other one writes into none."""
    schema = schema_of(name)
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments):
        assert name.startswith("_")
        assert not schema.returns
    else:
        assert schema.returns
        assert all(result.alias_info is None for result in schema.returns)


@pytest.mark.parametrize("name", [*LEAVES, *COMPOSITES])
def test_has_a_row_in_the_readme(name):
    ops = (ROOT / "README.md").read_text().partition("<!-- benchmarks:begin -->")[0]
    rows = [line for line in ops.splitlines() if line.startswith("|")]
    assert any(re.search(rf"\b{name}\b", row) for row in rows), f"README.md has no table row for {name}"


@pytest.mark.parametrize("name", [*LEAVES, *COMPOSITES])
def test_has_a_line_in_the_changelog(name):
    assert re.search(rf"\b{name}\b", (ROOT / "CHANGELOG.md").read_text()), f"CHANGELOG.md doesn't name {name}"


@pytest.mark.parametrize("name", LEAVES)
def test_has_a_benchmark(name):
    """With a rival, bytes, and the cost of a call."""
    cases = [case for case in every_case(Settings()) if case.op == name]
    assert any(case.rivals and case.bytes for case in cases), f"no benchmark of {name} against a rival"
    assert any(case.overhead for case in cases), f"no benchmark of the overhead of {name}"
    assert any(case.op == name for case in every_case(Settings(quick=True))), f"no quick benchmark of {name}"


@pytest.mark.parametrize("family", sorted(set(COMPOSITES.values())))
def test_composites_have_benchmarks(family):
    """Of one of them at least; with a rival, bytes or arithmetic, and the cost of a call."""
    cases = [case for case in every_case(Settings()) if COMPOSITES.get(case.op) == family]
    assert any(case.rivals and (case.bytes or case.flops) for case in cases)
    assert any(case.overhead for case in cases)
    assert any(COMPOSITES.get(case.op) == family for case in every_case(Settings(quick=True)))


@pytest.mark.parametrize("name", [*LEAVES, *COMPOSITES])
def test_is_public(name):
    assert name in TENSOR_FUNCTIONS


def test_every_public_function_is_known():
    """As a leaf op, as a composite, or as one that needs no tensor."""
    of_numbers = {"zigzag"}
    assert set(TENSOR_FUNCTIONS) == {*LEAVES, *COMPOSITES} | of_numbers


@pytest.mark.parametrize("name", sorted(OPS))
def test_only_internal_ops_are_excused(name):
    """From checks that there are, and not from all that look at a kernel."""
    op = OPS[name]
    assert op.internal or (op.differentiable and not op.excused)
    checks = {function.__name__ for function, _ in battery.CHECKS}
    assert {*op.excused, *battery.OF_GRADIENTS} <= checks
    assert not op.excused.keys() & {"matches_reference", "matches_reference_when_large", "writes_every_element"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_documented(name):
    doc = inspect.getdoc(getattr(ff, name))
    assert doc
    assert doc.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize("name", TENSOR_FUNCTIONS)
def test_tensor_function_is_documented(name):
    """Every argument, shapes in brackets, and the errors."""
    function = getattr(ff, name)
    doc = inspect.getdoc(function)
    assert "Raises:" in doc
    assert re.search(r"\[.+\]", doc), "no shape"
    if name in LEAVES:
        arguments = doc.split("Args:")[1]
        missing = [p for p in inspect.signature(function).parameters if not re.search(rf"^\s*{p}\b.*:", arguments, re.M)]
        assert not missing, f"the docstring of {name} doesn't explain {missing}"


def test_public_names_exist():
    assert sorted(ff.__all__) == sorted(set(ff.__all__))
    assert all(hasattr(ff, name) for name in ff.__all__)


@pytest.mark.parametrize("name", ff.nn.__all__)
def test_module_is_documented(name):
    assert inspect.getdoc(getattr(ff.nn, name))
    assert inspect.getdoc(getattr(ff.nn, name).forward)


def test_layers_know_downward_only():
    """nn imports ops, ops imports neither nn nor another family; nothing imports the test or benchmark side."""
    package = Path(inspect.getsourcefile(ff)).parent
    families = {name.partition("_")[0] for name in battery.families()}  # blockdct_rgb is a part of blockdct
    for file in package.glob("*/*.py"):
        imported = " ".join(re.findall(r"^\s*(?:from|import) (?:\.|fourfold).*", file.read_text(), re.M))
        layer = file.parent.name
        if layer in {"ops", "reference"}:
            assert not re.search(r"\bnn\b|\bmodels\b|\bbenchmarks\b", imported), file
        if layer == "reference":
            assert not re.search(r"\bops\b", imported), file
        family = file.stem.partition("_")[0]
        if layer in {"ops", "reference"} and family in families:
            others = families - {family}
            assert not any(re.search(rf"\b{other}\b", imported) for other in others), file
