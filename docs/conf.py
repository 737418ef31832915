"""How Sphinx builds these pages: ``make docs``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import lightning_sym

project = "lightning_sym"
author = "The lightning_sym authors"
copyright = "The lightning_sym authors"
version = release = lightning_sym.__version__

extensions = [
    "logs",
    "results",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_parser",
]
exclude_patterns = ["_build", "_ext", "results", "papers/_verdicts"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature and the docstring say it; types of tensors say little
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False  # of Lightning hooks that are overridden
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"lightning_sym {release}"
html_static_path: list[str] = []
