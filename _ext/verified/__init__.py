"""Run every block that the site shows, record it, and say so on the page.

A Sphinx extension on top of ``sphinx.ext.doctest``'s directives. Where the stock
extension fails open (a skipped block vanishes, an orphan output is dropped, zero
tests are a success), this one fails closed, with the line of the page. Reading order:

- ``blocks`` finds blocks and faults while Sphinx reads a page;
- ``worker`` runs a page's blocks in a child process, ``runner`` starts the children,
  ``outputs`` compares, ``capabilities`` says what a machine has;
- ``static`` and ``deprecated`` check blocks without running them;
- ``results`` keeps records and judges each block, ``session`` ties it together;
- ``render`` writes the status lines, ``builders`` are ``-b doctest`` and ``-b static``.

Configuration (all optional):

- ``verified_run``: the HTML builders run what has no current result (default True).
- ``verified_pages``: pages that ``-b doctest`` runs; all if empty.
- ``verified_time_limit``: seconds per block (default 60).
- ``verified_jobs``: pages run at once; the number of processors if 0.
- ``verified_preload``: modules imported once for all pages.
- ``verified_registry``: ``"module:NAME"`` of the capabilities; the module also has
  ``device()``, which describes the machine.
- ``verified_local``, ``verified_committed``: folders of results.
- ``verified_save``: a folder in which ``-b doctest`` writes results to commit; what
  passed leaves the waiting list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config
    from sphinx.environment import BuildEnvironment

# Sphinx is imported below, when it is Sphinx that calls: the processes that run pages
# import this package too, and must start at once.

_WRITES_PAGES = {"html", "dirhtml", "singlehtml", "epub"}


def _on_config(app: Sphinx, config: Config) -> None:
    from . import environment

    app.verified_registry = environment.load(config.verified_registry)  # type: ignore[attr-defined]
    # Sphinx reads all pages again when this differs, so that their hashes are new.
    config.verified_setup = repr([
        config.doctest_global_setup,
        config.doctest_global_cleanup,
        config.doctest_default_flags,
    ])


def _on_updated(app: Sphinx, env: BuildEnvironment) -> list[str]:
    from . import render
    from .session import Session

    session = Session(app)
    app.verified = session  # type: ignore[attr-defined]
    session.report_faults()
    if app.builder.name not in _WRITES_PAGES:
        return []
    if app.config.verified_run:
        if stale := session.stale():
            session.say(session.run(stale))
        session.check()
    session.judge(ran_everything=app.config.verified_run)
    return render.outdated(app, env, session)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register directives, builders and events."""
    from . import blocks, builders, render

    app.setup_extension("sphinx.ext.doctest")
    app.add_directive("testcode", blocks.Testcode, override=True)
    app.add_directive("doctest", blocks.Doctest, override=True)
    app.add_directive("testoutput", blocks.Testoutput, override=True)
    app.add_directive("verification-status", render.VerificationStatus)
    app.add_builder(builders.VerifyBuilder, override=True)
    app.add_builder(builders.StaticBuilder)
    app.add_node(render.Status)
    app.add_config_value("verified_run", True, "", bool)
    app.add_config_value("verified_pages", "", "", str)
    app.add_config_value("verified_time_limit", 60.0, "", float)
    app.add_config_value("verified_jobs", 0, "", int)
    app.add_config_value("verified_preload", [], "", list)
    app.add_config_value(
        "verified_registry", "verified.capabilities:CAPABILITIES", "env", str
    )
    app.add_config_value("verified_local", "build/verification", "", str)
    app.add_config_value("verified_committed", "verification", "", str)
    app.add_config_value("verified_save", "", "", str)
    app.add_config_value("verified_setup", "", "env", str)
    app.connect("config-inited", _on_config)
    app.connect("doctree-read", blocks.on_doctree_read, priority=900)
    app.connect("env-purge-doc", blocks.on_purge)
    app.connect("env-merge-info", blocks.on_merge)
    app.connect("env-updated", _on_updated)
    app.connect("doctree-resolved", render.on_resolved)
    return {
        "version": "1",
        "env_version": 1,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
