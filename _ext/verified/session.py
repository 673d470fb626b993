"""What one Sphinx build knows: its blocks, the results so far, and how to get more."""

import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

from . import environment, static
from .blocks import Block, pages
from .results import (
    Record,
    Results,
    State,
    Waiting,
    judge,
    read,
    tally,
)
from .runner import Runner

__all__ = ["Session", "grouped"]

_log = logging.getLogger(__name__)

Groups = dict[tuple[str, str], list[Block]]


def _detail(state: State) -> str:
    """Return the lines of output after the first, which is the reason."""
    _reason, newline, rest = (state.record.output if state.record else "").partition(
        "\n"
    )
    return newline + rest


def grouped(blocks: Iterable[Block]) -> Groups:
    """Sort blocks into what runs in one process: one group of one page."""
    groups: Groups = {}
    for block in blocks:
        groups.setdefault((block.page, block.group), []).append(block)
    return groups


class Session:
    """One build's view of blocks and results."""

    def __init__(self, app: Sphinx) -> None:
        self.app = app
        self.root = Path(app.confdir)
        self.local = self.root / app.config.verified_local
        self.committed = self.root / app.config.verified_committed
        self.listed = self.committed / "waiting.json"
        self.registry = environment.load(app.config.verified_registry)
        self.here = read(self.local / "here.json", local=True)
        self.static = read(self.local / "static.json", local=True)
        if self._versions(self.here) != environment.versions():
            self.here = Results(local=True)
        self.states: dict[str, State] = {}
        self.problems = 0

    @staticmethod
    def _versions(results: Results) -> dict[str, str]:
        names = ("python", *environment.PACKAGES)
        return {n: results.environment[n] for n in names if n in results.environment}

    def warn(self, text: str, kind: str, location: str | None = None) -> None:
        """Emit a warning of this extension, which ``-W`` turns into a failed build."""
        self.problems += 1
        _log.warning("%s", text, location=location, type="verified", subtype=kind)

    def blocks(self, only: Iterable[str] = ()) -> list[Block]:
        """Return the blocks of all pages, or of ``only`` these, in reading order."""
        found = pages(self.app.env)
        wanted = set(only) or set(found)
        return [b for name in sorted(wanted) for b in found[name].blocks]

    def report_faults(self) -> None:
        """Warn of every fault of every page, also of those not read this time."""
        for page in pages(self.app.env).values():
            for fault in page.faults:
                self.warn(fault.text, fault.kind, f"{fault.file}:{fault.line}")

    # -- Running --

    def stale(self) -> Groups:
        """Return the groups with a block that has no current result here."""
        return {
            key: blocks
            for key, blocks in grouped(self.blocks()).items()
            if not all(self.here.get(b, "passed", "skipped") for b in blocks)
        }

    def run(self, groups: Groups) -> list[Record]:
        """Run ``groups`` and keep the results in ``build/``."""
        config = self.app.config
        runner = Runner(
            root=str(self.root),
            registry=config.verified_registry,
            preload=config.verified_preload,
            jobs=config.verified_jobs or os.cpu_count() or 1,
            time_limit=config.verified_time_limit,
            setup=config.doctest_global_setup,
            cleanup=config.doctest_global_cleanup,
            paths=config.doctest_path,
            flags=config.doctest_default_flags,
        )
        blocks = [block for group in groups.values() for block in group]
        asked = {name for block in blocks for name in block.requires}
        found, device = runner.probe(asked & set(self.registry))
        self._report_probes(blocks, found)
        if device["device"] != "CPU":
            runner.jobs = 1  # pages would take the device's memory from each other
        files = {name: page.files for name, page in pages(self.app.env).items()}
        outcomes = runner.run(groups, found, files, emulate=not _must_have_gpu())
        now = datetime.now(UTC).isoformat(timespec="seconds")
        records = [
            Record(
                id=b.id,
                hash=b.digest,
                file=b.file,
                line=b.line,
                status=(outcome := outcomes[b.id]).status,
                reason=outcome.reason,
                seconds=round(outcome.seconds, 3),
                when=now,
                output=outcome.output,
                emulated=outcome.emulated,
            )
            for b in blocks
        ]
        current = {b.id for b in self.blocks()}
        kept = {k: r for k, r in self.here.records.items() if k in current}
        kept.update((record.id, record) for record in records)
        self.here = Results(
            {**environment.versions(), **device, "date": now}, kept, local=True
        )
        self.here.write(self.local / "here.json")
        self._require_gpu(blocks, found)
        return records

    def _report_probes(
        self, blocks: list[Block], found: Mapping[str, bool | str]
    ) -> None:
        for block in blocks:
            for name in block.requires:
                if isinstance(said := found.get(name), str):
                    text = f"the probe of {name!r} raised {said}"
                    self.warn(text, "gate", f"{block.file}:{block.line}")

    def _require_gpu(
        self, blocks: list[Block], found: Mapping[str, bool | str]
    ) -> None:
        if not _must_have_gpu():
            return
        must = {name for name, c in self.registry.items() if c.gpu_runner}
        for block in blocks:
            for name in block.requires:
                if name in must and found.get(name) is not True:
                    text = (
                        f"skipped for lack of {name!r}, which a GPU runner must have"
                        " (GUIDE_REQUIRE_GPU is set)"
                    )
                    self.warn(text, "gate", f"{block.file}:{block.line}")

    def check(self) -> None:
        """Type-check all blocks, unless each has a current check; warn of findings."""
        blocks = self.blocks()
        about = {**environment.versions(), "checker": static.version()}
        known = {n: self.static.environment.get(n) for n in about} == about
        if not known or not all(self.static.get(b, "passed") for b in blocks):
            self._check(blocks, about)

    def _check(self, blocks: list[Block], about: dict[str, str]) -> None:
        folder = self.local.parent / "static"
        findings = static.check(grouped(blocks), folder, self.root)
        wrong = {finding.block.id for finding in findings}
        for finding in findings:
            kind = "deprecated" if finding.rule == "deprecated" else "static"
            text = f"{finding.text} [{finding.rule}]"
            self.warn(text, kind, f"{finding.block.file}:{finding.line}")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.static = Results(
            {**about, "date": now},
            {
                b.id: Record(
                    id=b.id,
                    hash=b.digest,
                    file=b.file,
                    line=b.line,
                    status="failed" if b.id in wrong else "passed",
                    when=now,
                )
                for b in blocks
            },
            local=True,
        )
        self.static.write(self.local / "static.json")

    # -- Judging --

    def judge(self, *, ran_everything: bool = True) -> None:
        """Find each block's state; warn of those that no page may have."""
        everywhere = self.everywhere = [self.here, *self._committed()]
        self.states = {
            b.id: judge(b, everywhere, self.static, self.registry)
            for b in self.blocks()
        }
        waiting = self.waiting()
        for state in self.states.values():
            block = state.block
            where = f"{block.file}:{block.line}"
            if state.kind == "failed":
                self.warn(f"this block {state.text}{_detail(state)}", "failed", where)
            elif state.kind != "passed" and block.id not in waiting.blocks:
                if not ran_everything and not state.missing:
                    continue  # not selected this time
                text = (
                    f"no environment has run this block as it is now ({state.text});"
                    f" block {block.id} is not in waiting.json"
                )
                self.warn(text, "never", where)
        for problem in waiting.problems(self.states, date.today()):
            self.warn(problem, "waiting", self._name(self.listed))

    def waiting(self) -> Waiting:
        """Read the list of the blocks that may wait; a broken one lets none."""
        try:
            return Waiting.read(self.listed)
        except ValueError as error:
            self.warn(str(error), "waiting", self._name(self.listed))
            return Waiting()

    def _committed(self) -> Iterator[Results]:
        for path in sorted(self.committed.glob("*.json")):
            if path.name == "waiting.json":
                continue
            try:
                yield read(path)
            except ValueError as error:
                self.warn(str(error), "results", self._name(path))

    def _name(self, path: Path) -> str:
        # Without a line, Sphinx would take it for the name of a page.
        return f"{self.app.config.verified_committed}/{path.name}:1"

    def say(self, records: list[Record]) -> None:
        """Print the tally of a run."""
        _log.info("")
        _log.info("blocks: %s", tally(records))


def _must_have_gpu() -> bool:
    return os.environ.get("GUIDE_REQUIRE_GPU", "") not in ("", "0")
