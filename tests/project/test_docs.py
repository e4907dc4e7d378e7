"""What the README and the docs show: each page is one program, run from its top to its end.

A block reads what blocks above it on the same page have made, and nothing of another page. What a
block prints stands below it as a block of its own, marked ``output``, and is what came out.
"""

import contextlib
import doctest
import importlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted([*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md")])]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n?^```output\n(.*?)^```\n)?", re.M | re.S)
PROGRAMS = [page for page in PAGES if BLOCK.search(page.read_text())]
# Pages that compile for many seconds.
LONG = {
    "data_parallel.md",
    "distributed.md",
    "knowledge_graph.md",
    "lazy_optimizers.md",
    "quick_start.md",
    "recommender.md",
    "sharded_tables.md",
}
# Pages that start processes.
NEEDS_RAY = {"machines.md"}


def name_of(page):
    return str(page.relative_to(ROOT))


def marks(page):
    return [pytest.mark.full] * (page.name in LONG) + [pytest.mark.slow] * (page.name in NEEDS_RAY)


@pytest.mark.usefixtures("as_it_comes")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name_of(page), marks=marks(page)) for page in PROGRAMS],
)
def test_page_is_a_program_that_prints_what_it_shows(page, tmp_path, monkeypatch, request):
    if page.name in NEEDS_RAY:
        request.getfixturevalue("cluster")
    text = page.read_text()
    assert text.count("```output") == sum(bool(shown) for _, shown in BLOCK.findall(text))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        code, shown = block.groups()
        above = text.count("\n", 0, block.start()) + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines above, so that a traceback names the line of the page.
            exec(compile("\n" * above + code, page.name, "exec"), namespace)
        agree = doctest.OutputChecker().check_output(
            shown or "", printed.getvalue(), doctest.ELLIPSIS
        )
        assert agree, f"{name_of(page)}:{above} printed\n{printed.getvalue()}"


def slug(heading):
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        to = page.parent / target if target else page
        assert to.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", to.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name_of(page)} links to {target}#{anchor}"


def test_every_page_is_in_the_table_of_contents():
    """And nothing else: what the strict build of the site asks for, without building it."""
    index = (DOCS / "index.md").read_text()
    listed = [
        line
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.MULTILINE | re.DOTALL)
        for line in tree.splitlines()
        if line and not line.startswith(":")
    ]
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES[1:]} - {"index"}
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("module", ["jaxaccum", "jaxaccum.raw_ops", "jaxaccum.ray"])
def test_every_public_name_has_a_page_of_the_reference(module):
    parts = re.findall(
        r"currentmodule:: (\S+)\n.*?:nosignatures:\n\n(.*?)```",
        (DOCS / "api.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    listed = [
        name for of, text in parts if of == module
        for name in re.findall(r"^(?:   |\.\. py:data:: )(\w+)$", text, re.MULTILINE)
    ]  # fmt: skip
    public = importlib.import_module(module)
    assert sorted(listed) == sorted(set(public.__all__) - {"raw_ops"})
