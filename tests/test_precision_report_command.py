"""The command line of snippets/precision_report, as read in guide/precision_report."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snippets.precision_report.__main__ import main

ROOT = Path(__file__).parents[1]

SCRIPT = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    batch = torch.ones(4, 32), torch.zeros(4, 32)
    return nn.Linear(32, 32), batch, nn.functional.mse_loss

def loud():
    def loss(model, batch):
        return (model(batch) * 1e30).log().mean()
    return {"model": nn.Linear(4, 4), "batch": torch.ones(3, 4) * 1e6, "loss_fn": loss}

def odd():
    return 3

def backward():
    def loss(model, batch):
        value = model(batch).sum()
        value.register_hook(lambda grad: {}["x"])
        return value
    return nn.Linear(4, 4), torch.ones(3, 4), loss

def fails():
    return {}["x"]
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Put a script into an empty working directory.

    Yields:
        Its name.
    """
    (tmp_path / "my_script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_script"
    sys.modules.pop("my_script", None)


def test_the_command_prints_and_exits(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 with a report, 1 if a required mode is unsafe; JSON, and a figure."""
    assert main([f"{script}:build", "--require", "bf16", "--plot", "a.png"]) == 0
    assert "bf16-mixed: safe" in capsys.readouterr().out
    assert Path("a.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        main([
            f"{script}.py:build",
            "--json",
            "--formats",
            "tf32",
            "--require",
            "mxfp8",
        ])
        == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["formats"] == ["tf32", "bfloat16", "mxfp8_e4m3"]
    assert main([f"{script}:build", "--require", "16-true", "--lr", "1e-2"]) == 1
    assert "required, but 16-true: unsafe" in capsys.readouterr().err
    assert (
        main([f"{script}:loud", "--require", "16-mixed", "--require", "bf16-mixed"])
        == 1
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("my_script", "my_script:build, got 'my_script'"),
        ("nothing:build", "no nothing.py in"),
        ("my_script:build_", "did you mean 'build'"),
        ("my_script:odd", "must return .model, batch, loss_fn., got int"),
        ("my_script:fails", "my_script:fails raises KeyError: 'x'"),
        ("my_script:backward", "error: the step raises KeyError"),
        ("my_script:build --lr -1", "lr must be positive"),
        ("my_script:build --plot no/such/a.png", "cannot write no/such/a.png"),
    ],
)
def test_usage_errors_exit_with_two(
    script: str, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    """One line on stderr, no traceback."""
    assert main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", ["--require bf16-mixt", "--formats float61", "", "--lr x"]
)
def test_argparse_refuses_with_two(
    script: str, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    """Unknown modes and formats name what is near."""
    with pytest.raises(SystemExit) as exit_:
        main([*(["my_script:build"] if arguments else []), *arguments.split()])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    if "require" in arguments:
        assert "did you mean 'bf16-mixed'" in said
    if "formats" in arguments:
        assert "did you mean 'float16'" in said


def test_a_copied_folder_runs_as_a_command(script: str, tmp_path: Path) -> None:
    """As python -m precision_report, with nothing of this project in reach."""
    import shutil  # noqa: PLC0415

    shutil.copytree(ROOT / "snippets/precision_report", tmp_path / "precision_report")
    done = subprocess.run(
        [sys.executable, "-m", "precision_report", f"{script}:build"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "recommended: bf16-mixed" in done.stdout
    assert done.stderr == ""


def test_progress_is_told_on_a_terminal_and_when_it_takes_long(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that is rewritten, or one now and then; nothing where it is short."""
    clock = iter(range(0, 10**6, 7))
    main([f"{script}:build"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(
        "snippets.precision_report.__main__.time.monotonic", lambda: next(clock)
    )
    main([f"{script}:build"])
    assert re.search(r"(?m)^precision_report: \w+.*, \d+ s$", capsys.readouterr().err)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    main([f"{script}:build"])
    said = capsys.readouterr().err
    assert "\r\x1b[Kprecision_report: backward pass" in said
    assert said.endswith("\r\x1b[K")
