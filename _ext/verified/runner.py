"""Run blocks, page by page, each group of a page in a process of its own.

Processes are forked from a server that has imported the slow packages once
(``verified_preload``), so a page costs milliseconds to start, and nothing that it
changes (default dtype, working directory, a crash) reaches the next page.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import capabilities, environment
from .blocks import Block
from .worker import Code, Job, Outcome, run, start

__all__ = ["Runner"]

_GRACE = 5.0  # seconds after a block's own limit until its process is killed


class Runner:
    """Runs blocks on this machine.

    Args:
        registry: Module path of the capability registry, ``"module:NAME"``.
        preload: Modules that the server of processes imports once.
        jobs: Pages that run at the same time.
        time_limit: Seconds per block.
    """

    def __init__(
        self,
        *,
        root: str,
        registry: str,
        preload: list[str],
        jobs: int,
        time_limit: float,
        setup: str = "",
        cleanup: str = "",
        paths: Iterable[str] = (),
        flags: int = 0,
    ) -> None:
        # Pages share the processors; threads of one would wait for those of another.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = multiprocessing.get_context("forkserver")
        # Before Python 3.12.8 the server finds only what is installed: doctest is what
        # takes long in the worker's imports.
        modules = ["verified.worker", "doctest", "tempfile", *preload]
        self._context.set_forkserver_preload(modules)
        self.registry_path = registry
        self.registry = environment.load(registry)
        self.jobs = jobs
        self._defaults: dict[str, Any] = {
            "root": root,
            "setup": setup,
            "cleanup": cleanup,
            "paths": list(paths),
            "default_flags": flags,
            "time_limit": time_limit,
        }

    def probe(self, names: set[str]) -> tuple[capabilities.Findings, dict[str, str]]:
        """Probe capabilities, and describe the machine, in a process of their own.

        Asking a GPU initializes CUDA, which no process may do before it forks.
        """
        with _child(self._context, environment.probe, (self.registry_path, names)) as (
            answer,
            process,
        ):
            try:
                found: tuple[capabilities.Findings, dict[str, str]] = answer.recv()
            except EOFError:
                how = f"it, or one probed with it, {_ended(process)}"
                found = dict.fromkeys(names, how), {"device": "CPU"}
            return found

    def run(
        self,
        groups: Mapping[tuple[str, str], list[Block]],
        found: capabilities.Findings,
        files: Mapping[str, list[str]],
        *,
        emulate: bool = True,
    ) -> dict[str, Outcome]:
        """Run the blocks of each (page, group), in order; return outcomes by id.

        Args:
            groups: The blocks.
            found: What this machine has.
            files: For each page, the files that its working directory holds.
            emulate: Run blocks on the emulator of what this machine lacks.
        """
        outcomes: dict[str, Outcome] = {}
        jobs = []
        for (page, _group), blocks in groups.items():
            codes = []
            emulators: dict[str, None] = {}
            for block in blocks:
                missing = [n for n in block.requires if found.get(n) is not True]
                needed = self._emulators(missing) if emulate else []
                if needed:
                    emulators.update(dict.fromkeys(needed))
                    missing = []
                known = [n for n in missing if n in self.registry]
                if missing and len(known) == len(missing):
                    why = capabilities.reason(self.registry, missing)
                    outcomes[block.id] = Outcome(block.id, "skipped", why)
                elif missing:
                    why = "its :requires: names no known capability"
                    outcomes[block.id] = Outcome(block.id, "not run", why)
                else:
                    codes.append(
                        Code(
                            block.id,
                            block.kind,
                            block.file,
                            block.line,
                            block.code,
                            block.want,
                            block.flags,
                            bool(needed),
                        )
                    )
            if codes:
                job = Job(
                    page=page,
                    codes=codes,
                    files=files.get(page, []),
                    emulators=list(emulators),
                    **self._defaults,
                )
                jobs.append(job)
        with ThreadPoolExecutor(max(self.jobs, 1)) as pool:
            for result in pool.map(self._run, jobs):
                outcomes.update(result)
        return outcomes

    def _emulators(self, missing: list[str]) -> list[str]:
        """Return what stands in for all that is missing, or nothing."""
        found = [self.registry[n].emulator for n in missing if n in self.registry]
        return found if len(found) == len(missing) and all(found) else []

    def _run(self, job: Job) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        current: str | None = None
        with (
            _folder(job.files) as folder,
            _child(self._context, run, (job, folder)) as (answer, process),
        ):
            while True:
                if not answer.poll(job.time_limit + _GRACE):
                    why = f"took longer than its limit of {job.time_limit:g} s"
                    break
                try:
                    said = answer.recv()
                except EOFError:
                    why = _ended(process)
                    break
                if said is None:
                    return outcomes
                if isinstance(said, Outcome):
                    outcomes[said.id] = said
                    current = None
                elif said[0] == "start":
                    current = said[1]
                else:  # the cleanup failed after the last block had passed
                    last = job.codes[-1].id
                    outcomes[last] = Outcome(last, "failed", said[1], 0.0, said[1])
        for code in job.codes:
            if code.id not in outcomes:
                status, text = (
                    ("failed", why)
                    if code.id == current
                    else (
                        "not run",
                        "the process of its page had ended",
                    )
                )
                outcomes[code.id] = Outcome(code.id, status, text, 0.0, text)
        if current is None:  # it died between blocks: blame none, fail the page
            last = job.codes[-1].id
            outcomes[last] = Outcome(last, "failed", why, 0.0, why)
        return outcomes


@contextlib.contextmanager
def _folder(files: Iterable[str]) -> Iterator[str]:
    # Belongs to the parent: a page that kills its process leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        for file in files:
            shutil.copy(file, folder)
        yield folder


@contextlib.contextmanager
def _child(context: Any, target: Any, args: tuple[Any, ...]) -> Iterator[Any]:
    # Start target(*args, connection); leave no process behind.
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=start, args=(target, args, theirs), daemon=False)
    process.start()
    theirs.close()
    try:
        yield answer, process
    finally:
        answer.close()
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()


def _ended(process: Any) -> str:
    process.join(_GRACE)
    code = process.exitcode
    if code is None:
        return "cut its process off from the runner"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"ended the process that ran it ({how})"
