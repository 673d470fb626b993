"""Sphinx configuration: what is built, and what counts as an error."""

import doctest
import sys
from pathlib import Path

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "_ext")]  # snippets, and our own extensions

project = "Half the Bits"
author = "The Half the Bits authors"
copyright = "2026, the Half the Bits authors"
version = release = "2026.11"

extensions = [
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "choose",
    "explorer",
    "failures",
    "figures",
    "look",
    "tables",
    "verified",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
highlight_language = "none"  # a block says what it is
nitpicky = True
default_role = "any"  # `one backtick` where RST wants two is an unknown reference

# Sphinx's own default adds IGNORE_EXCEPTION_DETAIL, which accepts any error message.
doctest_default_flags = doctest.ELLIPSIS | doctest.DONT_ACCEPT_TRUE_FOR_1
doctest_test_doctest_blocks = ""
verified_preload = ["torch", "lightning"]

html_theme = "sphinx_book_theme"
html_use_index = False  # the notation page and the search serve for it
html_static_path = ["_static"]
templates_path = ["_templates"]
