"""The site's look: theme options, logo, formulas without scripts, and page dates.

Everything a page needs comes from its own folder, so the site reads the same from a
server, from a disk, and with the network down:

- formulas become MathML while the site is built; browsers draw it themselves;
- fonts are the reader's own;
- the theme's icons keep their style sheet and font, and lose the 1.5 MB script that
  draws the same icons a second time (``_static/scripts/fontawesome.js``).
"""

import functools
import os
import re
import subprocess
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.math import get_node_equation_number
from sphinx.util.typing import ExtensionMetadata, OptionSpec
from sphinx.writers.html5 import HTML5Translator

__all__ = ["setup"]

_log = logging.getLogger(__name__)

_TITLE = "Half the Bits"

_OPTIONS: dict[str, Any] = {
    "max_navbar_depth": 1,  # the index of the failures lists them, not every page
    "logo": {
        "text": _TITLE,
        "image_light": "_static/logo-light.svg",
        "image_dark": "_static/logo-dark.svg",
    },
    # Both styles keep 4.5:1 on the site's own code backgrounds; see tests/test_browser.
    "pygments_light_style": "github-light-high-contrast",
    "pygments_dark_style": "github-dark-high-contrast",
    "navbar_persistent": [],  # the theme's second search box
    "search_bar_text": "Search the guide",
    "show_toc_level": 2,
    "toc_title": "On this page",
    "use_download_button": False,
    "use_fullscreen_button": False,
    "footer_content_items": "copyright.html, last-updated.html",
}

# Doctest prompts (a bare "..." closes a block) and the shell's.
_PROMPTS = r">>> |\.\.\.(?: |$)|\$ "

# What a reader copies is code: never the output under it.
_COPIED = "div:not(.highlight-none):not(.highlight-text) > div.highlight pre"

_ACCENT = re.compile(
    r"<munderover>\s*(<mi\b[^>]*>[^<]*</mi>)(.*?)"
    r'(<mo stretchy="false">[^<]</mo>)\s*</munderover>',
    re.DOTALL,
)
_BAR = '<mo stretchy="false">|</mo>'
_FENCE = re.compile("<mo>([⌊⌋⌈⌉])</mo>")

_FIELDS = ("sign", "exponent", "mantissa")


def _repository_options() -> dict[str, Any]:
    """Return the theme's repository buttons, none where no repository is known."""
    repository = os.environ.get("GITHUB_REPOSITORY", "")
    if not repository:
        return {}
    return {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": os.environ.get("GITHUB_BASE_REF") or "main",
        "path_to_docs": "source",
        "use_repository_button": True,
        "use_issues_button": True,
        "use_edit_page_button": True,
    }


def _configure(_app: Sphinx, config: Config) -> None:
    """Fill in what ``conf.py`` leaves open; what it sets stays."""
    config.html_title = _TITLE
    config.html_favicon = "_static/favicon.svg"
    config.html_theme_options = {
        **_OPTIONS,
        **_repository_options(),
        **config.html_theme_options,
    }
    config.html_context = {"default_mode": "auto", **config.html_context}
    config.html_math_renderer = "mathml"
    config.html_permalinks_icon = "#"
    config.html_baseurl = config.html_baseurl or os.environ.get(
        "READTHEDOCS_CANONICAL_URL", ""
    )
    config.html_additional_pages = {
        "404": "404.html",
        **config.html_additional_pages,
    }
    config.copybutton_selector = _COPIED
    config.copybutton_prompt_text = _PROMPTS
    config.copybutton_prompt_is_regexp = True


def _visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula in a line of text as MathML.

    Raises:
        SkipNode: Always: its text is written.
    """
    self.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed formula as MathML, with its number where it has one.

    Raises:
        SkipNode: Always: its text is written.
    """
    # Too wide for a phone it scrolls, and a keyboard must get to what scrolls.
    self.body.append(
        self.starttag(node, "div", CLASS="math notranslate nohighlight", TABINDEX="0")
    )
    if node["number"]:
        number = get_node_equation_number(self, node)
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(_mathml(node, as_block=True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def _mathml(node: nodes.Element, *, as_block: bool) -> str:
    """Translate a formula; one that cannot be translated is a located warning."""
    formula = node.astext()
    try:
        mathml = str(tex2mathml(formula, as_block=as_block))
    except MathError as error:
        _log.warning("cannot write %r as MathML: %s", formula, error, location=node)
        return f"<code>{escape(formula)}</code>"
    # docutils takes the t of \hat{v}_t for a limit under the v; it is an index.
    mathml = _ACCENT.sub(r'<msub><mover accent="true">\1\3</mover>\2</msub>', mathml)
    # Fences are as high as a letter unless the formula says otherwise.
    mathml = mathml.replace(_BAR, _BAR.replace(">", ' lspace="0" rspace="0">', 1))
    if r"\left" not in formula:
        mathml = _FENCE.sub(r'<mo stretchy="false">\1</mo>', mathml)
    return mathml


@functools.cache
def _last_changes(folder: Path) -> dict[str, str]:
    """Map the files of a folder to the day of their last commit.

    Empty without git, and in a shallow clone, whose one commit would date every page.
    """
    git = ["git", "-C", str(folder)]
    try:
        shallow = subprocess.run(
            [*git, "rev-parse", "--is-shallow-repository"],
            capture_output=True,
            text=True,
            check=True,
        )
        if shallow.stdout.strip() != "false":
            return {}
        log = subprocess.run(
            [*git, "log", "--format=@%cs", "--name-only", "--relative", "--", "."],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    dates: dict[str, str] = {}
    day = ""
    for line in log.stdout.splitlines():
        if line.startswith("@"):
            day = line[1:]
        elif line:
            dates.setdefault(line, day)  # the newest commit comes first
    return dates


def _finish_context(
    app: Sphinx,
    pagename: str,
    _templatename: str,
    context: dict[str, Any],
    doctree: nodes.document | None,
) -> None:
    """Date the page by its own last change, and tell the 404 page where it lives."""
    context["last_updated"] = None
    if doctree is not None:
        file = Path(app.env.doc2path(pagename)).relative_to(app.srcdir)
        dates = _last_changes(Path(app.srcdir))
        context["last_updated"] = dates.get(file.as_posix())
    # Served for any address, so its links cannot be relative.
    context["site_root"] = urlsplit(app.config.html_baseurl).path or "/"


class Bits(SphinxDirective):
    """Draw a bit pattern, colored by field; ``tests/test_links.py`` checks it.

    The argument is the pattern, most significant bit first. ``fields`` gives the number
    of sign, exponent and mantissa bits; bits beyond them are drawn as dropped.
    ``label`` says in a sentence what the picture shows.
    """

    required_arguments = 1
    option_spec: ClassVar[OptionSpec] = {
        "fields": directives.positive_int_list,
        "label": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        """Return the drawing as HTML; other builders leave it out."""
        pattern = self.arguments[0]
        widths = self.options.get("fields", [])
        if (
            set(pattern) - {"0", "1"}
            or len(widths) > len(_FIELDS)
            or not 0 < sum(widths) <= len(pattern)
        ):
            msg = f"not a bit pattern with these fields: {pattern} {widths}"
            raise self.error(msg)
        if not self.options.get("label"):
            msg = "a picture needs a :label: for those who do not see it"
            raise self.error(msg)
        kept, dropped = pattern[: sum(widths)], pattern[sum(widths) :]
        parts = [_draw_bits(kept, list(zip(_FIELDS, widths, strict=False)))]
        if dropped:
            parts.append(_draw_bits(dropped, [("dropped", len(dropped))]))
        label = escape(self.options["label"], quote=True)
        html = f'<div class="hb-bits" role="img" aria-label="{label}">'
        return [nodes.raw("", f"{html}{''.join(parts)}</div>", format="html")]


def _draw_bits(pattern: str, fields: list[tuple[str, int]]) -> str:
    """Write one row of cells and, under it, the name and width of each field."""
    bits = iter(pattern)
    cells = "".join(
        f'<b class="{name}">{bit}</b>'
        for name, width in fields
        for bit in islice(bits, width)
    )
    names = "".join(
        f'<small class="{name}" style="grid-column: span {width}">'
        f"{f'{name} {width}' if width > 1 else '±'}</small>"
        for name, width in fields
    )
    style = f"--hb-columns: {len(pattern)}"
    return f'<div class="hb-bits__part" style="{style}">{cells}{names}</div>'


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the look with Sphinx."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(_visit_math, None),
        block_renderers=(_visit_math_block, None),
    )
    app.add_directive("bits", Bits)
    app.add_css_file("half-the-bits.css", priority=900)
    app.connect("config-inited", _configure, priority=100)
    app.connect("html-page-context", _finish_context)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
