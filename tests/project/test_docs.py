"""What the README and the docs show is run as it stands, one namespace a page."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _marks(name):
    return [pytest.mark.full] * (name in LONG) + [pytest.mark.slow] * (name in NEEDS_RAY)


# Pages that compile for many seconds: each shows whole training loops.
LONG = {"distributed.md", "lazy_optimizers.md", "training_loops.md"}

# Pages that start processes.
NEEDS_RAY = {"machines.md"}


@pytest.mark.usefixtures("as_it_comes")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=_marks(page.name)) for page in PAGES],
)
def test_python_of_the_page_runs(page, tmp_path, monkeypatch, request):
    if page.name in NEEDS_RAY:
        request.getfixturevalue("cluster")
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
