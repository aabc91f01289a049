"""Sphinx configuration. Neither building nor reading needs a network."""

import re
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx

project = "ParaSolver"
author = "The ParaSolver authors"
project_copyright = "2026, The ParaSolver authors"
version = release = installed_version("parasolver")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

myst_enable_extensions = ["amsmath", "attrs_inline", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"ArrayLike": "ArrayLike", "Array": "Array"}
python_maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Other arguments", "params_style")]


def setup(app: Sphinx) -> None:
    """Names of type aliases stand in signatures as they are written, not as objects."""

    def plain(
        _app: Sphinx,
        _what: str,
        _name: str,
        _object: object,
        _options: object,
        signature: str,
        returns: str,
    ):
        both = (
            re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", text) if text else text
            for text in (signature, returns)
        )
        return tuple(both)

    app.connect("autodoc-process-signature", plain)


# MathJax is copied out of an installed package.
_mathjax = find_spec("sphinx-mathjax-offline")
if _mathjax is None or _mathjax.origin is None:
    raise ImportError("sphinx-mathjax-offline is not installed; pip install '.[docs]'")
mathjax_path = "tex-svg.js"

html_theme = "pydata_sphinx_theme"
html_title = f"ParaSolver {release}"
html_static_path = [
    "_static",
    str(Path(_mathjax.origin).parent / "static" / "mathjax" / mathjax_path),
]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_sidebars = {"**": ["all-pages.html"]}
# Pages of wide tables have the room of the right column.
_WIDE = (
    "alternatives",
    "architecture",
    "benchmarks",
    "clients",
    "devices",
    "schedulers",
    "tested_pipelines",
)
html_theme_options = {
    "show_prev_next": False,
    "navbar_center": [],
    "navbar_persistent": [],
    "navbar_end": ["search-button-field", "theme-switcher"],
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []}
    | {page: [] for page in _WIDE},
}
