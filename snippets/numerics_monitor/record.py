"""The records of a run in a file of JSON lines, and as numbers for a logger."""

import json
from pathlib import Path
from typing import Any

import torch


def write(path: Path, record: dict[str, Any], *, is_first: bool) -> None:
    """Append a record; a line with its step goes ahead of the first of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if is_first:
            if file.tell() and not _ends_a_line(file):  # killed while it wrote
                file.write(b"\n")
            file.write(json.dumps({"start": record["step"]}).encode() + b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run: a later part replaces what it did again."""
    records: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # killed while it wrote
            continue
        if "start" in entry:
            records = [r for r in records if r["step"] < entry["start"]]
        else:
            records.append(entry)
    return records


def numbers(record: dict[str, Any], skips: int) -> dict[str, float]:
    """Return what of a record a logger can draw, by the logger's names."""
    names = ("scale", "zero", "underflow", "lost", "update_ratio")
    found = {n: float(record[n]) for n in names if record.get(n) is not None}
    found |= {
        "skips": float(skips),
        "nonfinite": float(record["nonfinite"] is not None),
    }
    amax = record.get("amax", {})
    found |= {f"amax/{n}": value for n, value in amax.items() if value is not None}
    end = f"/{record['optimizer']}" if record["optimizer"] else ""
    return {f"numerics/{name}{end}": number for name, number in found.items()}


def is_first_rank() -> bool:
    """Tell whether it is for this process to write and to log."""
    dist = torch.distributed
    is_on = dist.is_available() and dist.is_initialized()
    return not is_on or dist.get_rank() == 0


def _ends_a_line(file: Any) -> bool:  # noqa: ANN401
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")
