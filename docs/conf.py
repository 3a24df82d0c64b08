"""Sphinx configuration."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import structkd

project = "structkd"
author = copyright = "the structkd authors"
version = release = structkd.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the test suite runs the notebook
autodoc_typehints = "signature"  # and not once more in the list of parameters
autodoc_member_order = "bysource"
autosummary_generate = False
python_maximum_signature_line_length = 84
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_custom_sections = ["Shape"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "structkd"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"


def _mathml(translator, node):
    """Writes a formula as MathML, which browsers draw without script or network."""
    block = isinstance(node, nodes.math_block)
    try:
        formula = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
        formula = f"<code>{translator.encode(node.astext())}</code>"
    translator.body.append(
        f'<div class="math">{formula}</div>' if block else formula
    )
    raise nodes.SkipNode


def _without_last_line(app, doctree):
    """Takes off the empty line that a doctest needs before the fence."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext().rstrip()
        block.rawsource, block[:] = text, [nodes.Text(text)]


def setup(app: Sphinx) -> None:
    """Names the renderer of formulas."""
    app.connect("doctree-read", _without_last_line)
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
