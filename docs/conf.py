"""Sphinx configuration."""

import structkd

project = "structkd"
author = "the structkd authors"
version = release = structkd.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_custom_sections = ["Shape"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "structkd"
