"""Run a script in two processes that talk by gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

__all__ = ["needs_gloo", "run_ranks"]

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)


def run_ranks(script: str, folder: Path) -> list[str]:
    """Return what each of two processes prints; each must end well.

    The script gets its rank and the path of a store as arguments.
    """
    (folder / "rank.py").write_text(script)
    root = str(Path(__file__).parent.parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "rank.py", str(rank), str(folder / "store")],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in ranks]
    for process, (_, error) in zip(ranks, ends, strict=True):
        assert process.returncode == 0, error
    return [output for output, _ in ends]
