"""The builders: ``-b doctest`` runs every block, ``-b static`` checks every block."""

import difflib
from collections.abc import Set as AbstractSet
from typing import final

from sphinx.builders import Builder

from . import environment
from .blocks import pages
from .results import Results, write_junit
from .session import Session, grouped

__all__ = ["StaticBuilder", "VerifyBuilder"]


class _Checks(Builder):
    """A builder that reads all pages and writes none."""

    allow_parallel = True

    @property
    def session(self) -> Session:
        session: Session = self.app.verified  # type: ignore[attr-defined]
        return session

    def get_outdated_docs(self) -> list[str]:
        """Return nothing: reading is all that the pages are needed for."""
        return []

    def get_target_uri(self, docname: str, typ: str | None = None) -> str:
        """Return a link target, which nothing follows."""
        return ""

    @final
    def finish(self) -> None:
        """Do the work; any problem fails the build, with ``-W`` or without."""
        self.work()
        if self.session.problems:
            self.app.statuscode = 1

    def work(self) -> None:
        """Run or check the blocks."""
        raise NotImplementedError

    def write_documents(self, docnames: AbstractSet[str]) -> None:
        """Write nothing."""


class VerifyBuilder(_Checks):
    """Runs the blocks of all pages, or of ``-D verified_pages=guide/x,guide/y``."""

    name = "doctest"
    epilog = "The results are in build/verification/."

    def work(self) -> None:
        """Run, record, and report."""
        wanted = self._selection()
        if self.config.verified_pages and not wanted:
            return
        blocks = self.session.blocks(wanted)
        if not blocks:
            self.session.warn("no block was run: there is none on these pages", "empty")
            return
        records = self.session.run(grouped(blocks))
        if all(record.status == "skipped" for record in records):
            self.session.warn("no block was run: all were skipped", "empty")
        write_junit(self.session.local / "junit.xml", records)
        if folder := self.config.verified_save:
            self._save(folder)
        self.session.check()
        self.session.judge(ran_everything=not wanted)
        self.session.say(records)

    def _selection(self) -> list[str]:
        known = pages(self.env)
        wanted = []
        for text in self.config.verified_pages.replace(",", " ").split():
            name = text.removeprefix("source/").removesuffix(".md").removesuffix(".rst")
            if name in known:
                wanted.append(name)
                continue
            near = difflib.get_close_matches(name, known, 3, 0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            self.session.warn(f"there is no page {name!r}{hint}", "empty")
        return wanted

    def _save(self, folder: str) -> None:
        """Write what passed and failed, to be committed; what passed waits no more."""
        here = self.session.here
        kept = {
            key: record
            for key, record in here.records.items()
            if record.status in ("passed", "failed")
        }
        for record in kept.values():
            record.output = ""
        name = environment.slug(here.name) or "cpu"
        if not here.gpu:
            name += f"-python{here.environment['python']}"
        target = self.session.root / folder / f"{name}.json"
        Results(here.environment, kept).write(target)
        passed = {key for key, record in kept.items() if record.status == "passed"}
        self.session.waiting().shrink(self.session.listed, passed)


class StaticBuilder(_Checks):
    """Parses and type-checks every block; runs none."""

    name = "static"
    epilog = "Every block was parsed and type-checked."

    def work(self) -> None:
        """Check, also what has a current check."""
        self.session.static = Results(local=True)
        if not self.session.blocks():
            self.session.warn("no block was checked: there is none", "empty")
        self.session.check()
