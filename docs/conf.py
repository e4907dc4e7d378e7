"""The site: Markdown pages, pictures drawn by code, and a reference made of the docstrings.

Build it with the command in the README, "Working on it". Nothing is fetched: links to other sites
are not followed, links between pages and to files of the repository must lead somewhere.
"""

import pathlib
import re
import sys
import xml.sax.saxutils

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import draw_figures  # noqa: E402

import jaxaccum  # noqa: E402

project = "jaxaccum"
author = "the jaxaccum authors"
release = version = jaxaccum.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "jaxaccum"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "github-dark"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]

# Docstrings are Google's, names of ours in single backticks.
default_role = "py:obj"
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand in the signature's place among Args
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "params_style")]
add_module_names = False
python_display_short_literal_types = True


def inline_pictures(app, exception):
    """Puts drawings into the pages themselves, so that they follow the site's light and dark."""
    if exception or app.builder.format != "html":
        return
    for page in pathlib.Path(app.outdir).rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        drawn = re.sub(r'<img alt="([^"]*)" src="[^"]*?_images/(\w+)\.svg" ?/>', _inline, text)
        if drawn != text:
            page.write_text(drawn, encoding="utf-8")


def _inline(match):
    alt, name = match.groups()
    picture = HERE / "figures" / f"{name}.svg"
    if not picture.exists():  # a plot, which has colours of its own
        return match.group()
    label = xml.sax.saxutils.quoteattr(alt)
    svg = picture.read_text(encoding="utf-8")
    return svg.replace("<svg ", f'<svg role="img" aria-label={label} ', 1)


def setup(app):
    """Draws the pictures before the pages are read."""
    draw_figures.main()
    app.connect("build-finished", inline_pictures)
