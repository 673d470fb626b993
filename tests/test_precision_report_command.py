"""The command line of snippets/precision_report, as read in guide/precision_report."""

import json
import os
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

def leaves():
    raise SystemExit("enough")

def leaves_late():
    def loss(output, target):
        raise SystemExit
    return nn.Linear(4, 4), torch.ones(3, 4), loss

def renamed():
    from collections import namedtuple
    return namedtuple("Built", "batch model loss")(*build())

def sorted_():
    from collections import namedtuple
    model, batch, loss_fn = build()
    return namedtuple("Built", "batch loss_fn model")(batch, loss_fn, model)

def unnamed():
    from collections import namedtuple
    return namedtuple("Built", "net data criterion")(*build())
"""
TALKATIVE = """
import atexit, os, sys
import torch
from torch import nn

print("imported with", sys.argv)
os.system("echo from a shell")
atexit.register(print, "at exit")

class Talkative(nn.Linear):
    def forward(self, x):
        print("forward")
        return super().forward(x)

def build():
    print("built")
    return Talkative(32, 32), torch.ones(4, 32), loss

def loss(output):
    print("loss with", sys.argv)
    return output.square().mean()
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
        ("my_script:leaves", r"my_script:leaves calls sys.exit\('enough'\), so there"),
        ("my_script:leaves_late", r"the step calls sys.exit\(None\), so there is no"),
        ("my_script:renamed", "got the names batch, model, loss"),
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
    assert "\r\x1b[Kprecision_report: my_script:build, " in said
    assert "\r\x1b[Kprecision_report: backward pass" in said
    assert said.endswith("\r\x1b[K")


def test_what_a_script_prints_has_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the progress, there while a script builds, is wiped first."""
    (tmp_path / "prints.py").write_text("def build():\n    print('built')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["prints:build"]) == 2
    sys.modules.pop("prints")
    said = capsys.readouterr().err
    assert said.startswith(
        "\r\x1b[Kprecision_report: importing prints, 0 s"
        "\r\x1b[Kprecision_report: prints:build, 0 s"
        "\r\x1b[Kbuilt\nprecision_report: error: prints:build must return"
    )


def test_a_script_that_ends_the_process_has_no_report(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """``sys.exit(main())`` without a guard: 2, though the script says 0, and the cure.

    The same where a script reads arguments of its own, and wants one.
    """
    Path("no_guard.py").write_text("import sys\nsys.exit(0)\n")
    Path("wants.py").write_text(
        "import argparse\np = argparse.ArgumentParser()\n"
        "p.add_argument('data')\np.parse_args()\n"
    )
    assert main(["no_guard:build"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "precision_report: error: no_guard calls sys.exit(0), so there is no report; "
        'put what runs the script under if __name__ == "__main__":\n'
    )
    assert said.out == ""
    assert main(["wants:build"]) == 2
    said = capsys.readouterr()
    assert "wants.py: error: the following arguments are required: data" in said.err
    assert "wants calls sys.exit(2)" in said.err


def test_what_a_script_prints_is_not_the_report(tmp_path: Path) -> None:
    """JSON alone on stdout: not what is printed at import, in the step, or at exit.

    The script sees its own name and none of our arguments.
    """
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    command = [sys.executable, "-m", "snippets.precision_report", "--json", "--lr", "1"]
    done = subprocess.run(
        [*command, "talkative:build"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hypothesis"].endswith("lr=1")
    assert done.stderr.splitlines() == [
        "imported with ['talkative.py']",
        "from a shell",
        "built",
        "forward",
        "loss with ['talkative.py']",
        "at exit",
    ]


def test_the_command_puts_arguments_and_stdout_back(
    script: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the script fails."""
    given = ["ours", "--json"]
    monkeypatch.setattr(sys, "argv", given)
    stdout = sys.stdout
    for function, status in (("build", 0), ("fails", 2), ("leaves", 2)):
        assert main([f"{script}:{function}"]) == status
        assert sys.argv is given
        assert sys.stdout is stdout
        capfd.readouterr()
        os.write(1, b"after")
        assert capfd.readouterr().out == "after"


def test_a_named_tuple_is_read_by_its_names(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any order; where the names are others it is a tuple like any."""
    shown = []
    for function in ("build", "sorted_", "unnamed"):
        assert main([f"{script}:{function}"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize("form", [["--json"], []], ids=["JSON", "text"])
def test_a_reader_that_has_enough_is_no_error(tmp_path: Path, form: list[str]) -> None:
    """``... --json | head``: no traceback, and the status of the verdict."""
    (tmp_path / "my_script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "snippets.precision_report", "my_script:build"]
    with subprocess.Popen(
        [*command, *form, "--require", "16-true"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        assert running.stdout
        assert running.stderr
        running.stdout.close()
        said = running.stderr.read().decode()
        assert running.wait() == 1
    assert said.startswith("precision_report: required, but 16-true: unsafe")
    assert len(said.splitlines()) == 1
