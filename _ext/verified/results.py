"""Keep what is known of each block: here, in other environments, and as text.

``build/verification/here.json`` holds the results of the machine at hand and
``build/verification/static.json`` those of the type checker; each file in
``verification/`` holds the results of another environment (a GPU, other versions).
A result counts only for the block whose hash it carries.
"""

import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from .blocks import Block
from .capabilities import Capability

__all__ = [
    "Record",
    "Results",
    "State",
    "Waiting",
    "judge",
    "tally",
    "write_junit",
]

SCHEMA = 1


@dataclass
class Record:
    """How one block ended in one environment."""

    id: str
    hash: str
    file: str
    line: int
    status: str  # "passed", "failed", "skipped" or "not run"
    reason: str = ""
    seconds: float = 0.0
    when: str = ""
    output: str = ""
    emulated: bool = False


@dataclass
class Results:
    """The results of one environment.

    Attributes:
        environment: ``device``, ``date``, and the versions of python, torch,
            lightning, Transformer Engine, CUDA and the driver, as far as they are
            there.
        records: By block id.
        local: These are results of the machine at hand.
    """

    environment: dict[str, str] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    local: bool = False

    @property
    def name(self) -> str:
        """The device, such as "CPU" or "NVIDIA H100 80GB HBM3"."""
        return self.environment.get("device", "CPU")

    @property
    def gpu(self) -> bool:
        """Whether these results come from a GPU."""
        return self.name != "CPU"

    def get(self, block: Block, *statuses: str) -> Record | None:
        """Return the record of ``block`` as it is now, if it has such a status."""
        record = self.records.get(block.id)
        if record is None or record.hash != block.digest:
            return None
        return record if record.status in statuses else None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "environment": self.environment,
            "blocks": [asdict(record) for record in self.records.values()],
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        part.replace(path)


def read(path: Path, *, local: bool = False) -> Results:
    """Read a results file; an absent local one is empty.

    Raises:
        ValueError: The file is not a results file of this schema.
    """
    if local and not path.is_file():
        return Results(local=True)
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["schema"] != SCHEMA:
            msg = f"schema {content['schema']}, expected {SCHEMA}"
            raise ValueError(msg)
        records = [Record(**entry) for entry in content["blocks"]]
        environment = dict(content["environment"])
    except (KeyError, TypeError, ValueError) as error:
        if local:  # ours, and cheap to make again
            return Results(local=True)
        msg = f"{path.name} is not a results file: {error}"
        raise ValueError(msg) from error
    return Results(environment, {r.id: r for r in records}, local=local)


# -- The blocks that nothing has run yet ---------------------------------------------


@dataclass
class Waiting:
    """``verification/waiting.json``: blocks allowed to have no pass yet.

    The list can only shrink: ``at_most`` is never raised, and an entry whose block
    has passed, or is gone, is an error until it is removed.
    """

    at_most: int = 0
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Waiting":
        """Read the list; an absent file is an empty list.

        Raises:
            ValueError: The file is not such a list.
        """
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text("utf-8"))
            blocks = {key: dict(entry) for key, entry in content["blocks"].items()}
            return cls(int(content["at_most"]), blocks)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            msg = f"{path.name} is not a waiting list: {error!r}"
            raise ValueError(msg) from error

    def shrink(self, path: Path, passed: Set[str]) -> None:
        """Write the list without the blocks that passed, if there are such."""
        left = {key: entry for key, entry in self.blocks.items() if key not in passed}
        if len(left) < len(self.blocks):
            content = {"at_most": min(self.at_most, len(left)), "blocks": left}
            path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def problems(self, states: Mapping[str, "State"], today: date) -> list[str]:
        """Say what is wrong with the list itself."""
        found = []
        if len(self.blocks) > self.at_most:
            found.append(f"{len(self.blocks)} blocks wait, at most {self.at_most} may")
        for key, entry in self.blocks.items():
            if key not in states:
                found.append(f"{key} waits but is no block: remove it")
            elif states[key].kind == "passed":
                found.append(f"{key} waits but has passed: remove it")
            elif set(entry.get("waits_for", ())) != set(states[key].block.requires):
                found.append(f"{key}: waits_for differs from the block's :requires:")
            try:
                since = date.fromisoformat(str(entry.get("since")))
            except ValueError:
                found.append(f"{key}: since is {entry.get('since')!r}, not a date")
            else:
                if since > today:
                    found.append(f"{key}: since {since} lies in the future")
            if not entry.get("reason"):
                found.append(f"{key}: no reason is given")
        return found


# -- From results to one state a block -------------------------------------------------


@dataclass
class State:
    """What a page says of one block: its highest rung, in words.

    Attributes:
        kind: "passed", "failed", "stale" (an earlier form passed somewhere) or
            "waiting" (nothing has run it).
        text: The line under the block.
        missing: Why it was skipped here, if it was.
    """

    block: Block
    kind: str
    text: str
    missing: str = ""
    where: Results | None = None
    record: Record | None = None


def judge(
    block: Block,
    results: Iterable[Results],
    static: Results,
    registry: Mapping[str, Capability],
) -> State:
    """Find the highest rung of a block: a GPU, a CPU, an emulator, the type checker."""
    results = list(results)
    for run in results:
        if failed := run.get(block, "failed", "not run"):
            words = "fails" if failed.status == "failed" else "was not run"
            text = f"{words} on {run.name}: {failed.reason}"
            return State(block, "failed", text, "", run, failed)
    here = next((run.get(block, "skipped") for run in results if run.local), None)
    missing = here.reason if here else ""
    notes = [
        f"changed since it ran on {run.name}"
        for run in results
        if not run.local and _passed_before(run, block)
    ]
    passes = [(run, r) for run in results if (r := run.get(block, "passed"))]
    if passes:
        run, record = max(
            passes, key=lambda p: (not p[1].emulated, p[0].gpu, p[1].when)
        )
        facts = [
            f"ran on {run.name}" + (" with the emulator" * record.emulated),
            f"torch {_short(run.environment['torch'])}"
            if "torch" in run.environment
            else f"Python {run.environment.get('python', '?')}",
            record.when[:10],
            _seconds(record.seconds),
        ]
        notes = [] if run.gpu else notes
        text = " · ".join(facts + notes)
        return State(block, "passed", text, "", run, record)
    checked = "type-checked" if static.get(block, "passed") else "parsed"
    if any(registry[n].gpu_runner for n in block.requires if n in registry) or any(
        name.startswith("sm") for name in block.requires
    ):
        text = f"{checked}; {notes[0] if notes else 'not yet run on a GPU'}"
    else:
        text = f"{checked}; {notes[0] if notes else 'not yet run'}"
    if missing:
        text += f" · {missing}"
    return State(block, "stale" if notes else "waiting", text, missing)


def _passed_before(run: Results, block: Block) -> bool:
    record = run.records.get(block.id)
    return (
        record is not None and record.status == "passed" and record.hash != block.digest
    )


def _short(version: str) -> str:
    return version.partition("+")[0]


def _seconds(seconds: float) -> str:
    # A no-break space keeps the number and its unit on one line of a phone.
    return (
        "<\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}s"
        if seconds < 0.1
        else f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    )


# -- Reports ---------------------------------------------------------------------------


def tally(records: Iterable[Record]) -> str:
    """Count the records, and each skip reason: the closing lines of a run."""
    records = list(records)
    count = Counter(record.status for record in records)
    lines = [
        ", ".join(
            f"{count[status]} {status}" for status in ("passed", "failed", "skipped")
        )
        + (f", {count['not run']} not run" if count["not run"] else "")
    ]
    for status in ("skipped", "not run"):
        reasons = Counter(r.reason for r in records if r.status == status)
        lines += [
            f"  {status}: {reason} ({number})"
            for reason, number in sorted(reasons.items())
        ]
    return "\n".join(lines)


def write_junit(path: Path, records: Iterable[Record]) -> None:
    """Write the records as a JUnit file, one test case a block."""
    records = list(records)
    count = Counter(record.status for record in records)
    suite = ET.Element(
        "testsuite",
        name="blocks",
        tests=str(len(records)),
        failures=str(count["failed"]),
        errors=str(count["not run"]),
        skipped=str(count["skipped"]),
        time=f"{sum(record.seconds for record in records):.3f}",
    )
    tags = {"failed": "failure", "not run": "error", "skipped": "skipped"}
    for record in records:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=record.id.partition("#")[0].replace("/", "."),
            name=record.id,
            file=record.file,
            line=str(record.line),
            time=f"{record.seconds:.3f}",
        )
        if record.status in tags:
            about = ET.SubElement(case, tags[record.status], message=record.reason)
            about.text = _printable(record.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )
