"""Sphinx configuration. Building needs no network."""

from importlib.metadata import version as installed_version

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

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Other arguments", "params_style")]

html_theme = "pydata_sphinx_theme"
html_title = f"ParaSolver {release}"
html_theme_options = {"show_prev_next": False, "secondary_sidebar_items": ["page-toc"]}
