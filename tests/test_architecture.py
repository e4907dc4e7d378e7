"""The house rules, read off the sources: rooms, imports, names, documentation."""

import ast
import doctest
import importlib
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import jaxaccum

PACKAGE = pathlib.Path(jaxaccum.__file__).parent
SOURCES = sorted(PACKAGE.glob("*.py"))
# Imports run downhill: a room may only use rooms that stand before it.
ORDER = [
    "_slices",
    "_tables",
    "_counting",
    "_row_index",
    "_state",
    "_reduction",
    "_accumulator",
    "_sparse_terms",
    "_sparse_rules",
    "_sparse_calls",
    "_sparse_walk",
    "_sparse_grad",
    "_optax",
    "_unique_rows",
    "_row_layout",
    "_row_separable",
    "_catch_up",
    "_lazy_rows",
    "_transforms",
    "_rowwise_adagrad",
    "_accumulate",
    "_exchange",
    "_collectives",
    "_sharded",
    "_placement",
    "_errors",
    "_spec",
    "_staging",
    "_host_gradient",
    "_devices",
    "_programs",
    "_device_state",
    "_coordinator",
    "_registry",
    "_conditional_accumulator",
    "_sparse_keys",
    "_sparse_match",
    "_sparse_places",
    "_sparse_checks",
    "_sparse_ops",
    "_raw_checks",
    "raw_ops",
    "__init__",
]


def imports(tree):
    """Each (module, name or None) imported anywhere in a source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request):
    return request.param, ast.parse(request.param.read_text())


def test_imports_run_downhill(source):
    path, tree = source
    for module, name in imports(tree):
        if module == "jaxaccum":
            assert ORDER.index(name) < ORDER.index(path.stem), f"{path.stem} imports {name}"
        elif module.startswith("jaxaccum."):
            room = module.removeprefix("jaxaccum.")
            assert ORDER.index(room) < ORDER.index(path.stem), f"{path.stem} imports {room}"


def test_nothing_private_of_jax_is_used(source):
    _, tree = source
    names = {f"{module}.{name}" for module, name in imports(tree)}
    names |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in names if "jax._src" in name or "jaxlib." in name]


def test_files_and_functions_are_short(source):
    path, tree = source
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            start = doc.end_lineno if doc else node.lineno
            assert node.end_lineno - start <= 40, f"{path.stem}.{node.name}"


def test_init_is_the_contents_page():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}
    public = {name for name, value in vars(jaxaccum).items()
              if not name.startswith("_") and not inspect.ismodule(value)}  # fmt: skip
    assert public == {name for name in jaxaccum.__all__ if name != "raw_ops"}


@pytest.mark.parametrize("name", sorted(jaxaccum.__all__))
def test_public_names_are_documented_with_an_example(name):
    value = getattr(jaxaccum, name)
    assert inspect.getdoc(value)
    if callable(value) and name not in {"AccumulatorState", "Verdict"}:
        assert doctest.DocTestParser().get_examples(value.__doc__), f"{name} has no example"


@pytest.mark.usefixtures("as_it_comes")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_docstring_examples_run(path):
    stem = "jaxaccum" if path.stem == "__init__" else f"jaxaccum.{path.stem}"
    result = doctest.testmod(importlib.import_module(stem))
    assert result.failed == 0


def test_importing_needs_jax_alone_and_touches_nothing():
    """A fresh interpreter: no optional package imported, no flag moved, no device asked for."""
    program = """
import sys, jax
flags = dict(jax.config.values)
import jaxaccum
extra = {"optax", "flax", "equinox", "orbax", "rich", "matplotlib"} & set(sys.modules)
assert not extra, extra
assert flags == jax.config.values
"""
    # Asking for a device of this platform would raise.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=120,
        cwd=PACKAGE.parent,
        env=environment,
    )
