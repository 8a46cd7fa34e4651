"""Sphinx's configuration of the documentation site.

pip install -e '.[docs]'
python -m sphinx -W docs site    # then read site/index.html
"""

project = "tokenformer_jax"
author = "the tokenformer_jax authors"
html_title = "tokenformer_jax"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = [".md"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"
default_role = "code"  # Docstrings have single backticks around code.
