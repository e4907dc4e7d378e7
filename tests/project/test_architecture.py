"""The house rules, read off the sources: rooms, imports, names, documentation."""

import ast
import doctest
import graphlib
import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

import jaxaccum

PACKAGE = pathlib.Path(jaxaccum.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# The rooms and what each stands on, by folder; CONTRIBUTING shows the same list.
ROOMS = {
    "_rows": set(),
    "_accumulator": {"_rows"},
    "_sparse_grad": {"_rows"},
    "_sparse_ops": {"_rows"},
    "_distributed": {"_accumulator", "_rows"},
    "_optimizers": {"_distributed", "_accumulator", "_rows"},
    "_coordinator": {"_accumulator", "_rows"},
    "_tensorflow": {"_coordinator", "_rows"},
    "_ray": {"_optimizers", "_coordinator", "_accumulator", "_rows"},
    "ray": {"_ray"},
    "raw_ops": {"_tensorflow", "_coordinator", "_sparse_ops"},
}


def imports(tree):
    """Each (module, name or None) imported anywhere in a source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def module_of(path):
    """The dotted name of a source below the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def own_imports(tree):
    """Each module of this package, below it, that a source imports from."""
    for module, name in imports(tree):
        if module == "jaxaccum":
            yield name
        elif module.startswith("jaxaccum."):
            inner = module.removeprefix("jaxaccum.")
            is_module = (PACKAGE / inner.replace(".", "/") / f"{name}.py").exists()
            yield f"{inner}.{name}" if is_module else inner


@pytest.fixture(params=SOURCES, ids=module_of)
def source(request):
    return request.param, ast.parse(request.param.read_text())


def test_imports_run_downhill(source):
    path, tree = source
    if path == PACKAGE / "__init__.py":
        return  # the contents page stands on everything
    room = module_of(path).split(".")[0]
    used = {module.split(".")[0] for module in own_imports(tree)} - {room}
    assert used <= ROOMS[room], f"{module_of(path)} uses {used - ROOMS[room]}"


def test_rooms_stand_in_order():
    """Each stands on rooms listed before it, so that there is no circle; and none is left out."""
    before = set()
    for room, below in ROOMS.items():
        assert below <= before
        before.add(room)
    assert before == {module_of(path).split(".")[0] for path in SOURCES} - {""}
    assert sum(map(len, ROOMS.values())) <= 25


def test_files_of_a_room_use_each_other_in_no_circle():
    uses = {
        module_of(path): {*own_imports(ast.parse(path.read_text()))}
        for path in SOURCES
        if path.name != "__init__.py"
    }
    tuple(graphlib.TopologicalSorter(uses).static_order())  # raises CycleError


def test_tests_look_into_rooms_through_one_file():
    """What tests name of the package's inside stands in ``helpers/internals.py``, in these folders.

    Those of the coordinator and of TensorFlow's class still name it themselves.
    """
    tests = pathlib.Path(__file__).parents[1]
    for path in tests.rglob("*.py"):
        if path.parent.name in {"coordinator", "tensorflow_api"} or path.name == "internals.py":
            continue
        names = {f"{module}.{name}" for module, name in imports(ast.parse(path.read_text()))}
        assert not [name for name in names if name.startswith("jaxaccum._")], path


def test_contributing_shows_the_rooms():
    page = (pathlib.Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    for room, below in ROOMS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{room}")]
        cell = line.strip("| ").rsplit("|", 1)[-1]
        assert set(re.findall(r"`(\w+)`", cell)) == below, line


def test_nothing_private_of_jax_is_used(source):
    _, tree = source
    names = {f"{module}.{name}" for module, name in imports(tree)}
    names |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in names if "jax._src" in name or "jaxlib." in name]


def test_files_and_functions_are_short(source):
    path, tree = source
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            start = doc.end_lineno if doc else node.lineno
            assert node.end_lineno - start <= 40, f"{module_of(path)}.{node.name}"


def test_types_say_something():
    """Fewer than 20 `Any` in 1,000 lines; trees and their leaves have aliases (`_rows/tree.py`)."""
    texts = [path.read_text() for path in SOURCES]
    num_any = sum(len(re.findall(r"\bAny\b", text)) for text in texts)
    assert 50 * num_any < sum(len(text.splitlines()) for text in texts)


def test_init_is_the_contents_page():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}
    public = {name for name, value in vars(jaxaccum).items()
              if not name.startswith("_") and not inspect.ismodule(value)}  # fmt: skip
    assert public == {name for name in jaxaccum.__all__ if name != "raw_ops"}


def test_public_classes_are_found_where_they_say_they_are():
    """Else what holds one, the state of an optimizer perhaps, could not be pickled."""
    for path in SOURCES:
        module = importlib.import_module(".".join(filter(None, ["jaxaccum", module_of(path)])))
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == "jaxaccum":
                assert getattr(jaxaccum, name, None) is value, name


@pytest.mark.parametrize("name", sorted(jaxaccum.__all__))
def test_public_names_are_documented_with_an_example(name):
    if name in {"raw_ops", "Reduction"}:  # a module; an alias, to which Python gives no docstring
        return
    value = getattr(jaxaccum, name)
    text = inspect.getdoc(value)
    assert doctest.DocTestParser().get_examples(value.__doc__), f"{name} has no example"
    sections = ["Example:", "Source:"]
    if inspect.isfunction(value):
        sections += ["Args:", "Returns:", "Raises:"]
    assert not [section for section in sections if f"\n{section}" not in text]
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        assert re.search(r"``\[.*?\]``|scalar|shape|int32", text), f"{name} tells no shapes"


@pytest.mark.usefixtures("as_it_comes")
@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_docstring_examples_run(path):
    module = ".".join(filter(None, ["jaxaccum", module_of(path)]))
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_importing_needs_jax_alone_and_touches_nothing():
    """A fresh interpreter: no optional package imported, no flag moved, no device asked for."""
    program = """
import sys, jax
flags = dict(jax.config.values)
import jaxaccum
extra = {"optax", "ray", "flax", "equinox", "orbax", "rich", "matplotlib"} & set(sys.modules)
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
