"""The configuration of every project in this folder; tests copy it beside ``source``."""

import doctest
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), os.environ["VERIFIED_EXTENSION"]]

project = "Traps"
extensions = ["myst_parser", "verified"]
exclude_patterns = ["**/part.*"]  # pages include them
highlight_language = "none"
html_theme = "basic"
doctest_default_flags = doctest.ELLIPSIS | doctest.DONT_ACCEPT_TRUE_FOR_1
doctest_test_doctest_blocks = ""
verified_registry = "pretend:CAPABILITIES"
verified_time_limit = 2.0
