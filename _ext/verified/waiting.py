"""``python -m verified.waiting``: count the blocks that wait for each capability."""

import json
import sys
from collections import Counter
from pathlib import Path

from .capabilities import CAPABILITIES

_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Print a line for each capability that blocks wait for."""
    path = _ROOT / "verification" / "waiting.json"
    blocks = json.loads(path.read_text("utf-8"))["blocks"] if path.is_file() else {}
    count = Counter(name for b in blocks.values() for name in b["waits_for"])
    print(f"{len(blocks)} blocks wait for a machine that has what they need")
    for name, number in sorted(count.items()):
        print(f"  {name}: {number} ({CAPABILITIES[name].needs})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
