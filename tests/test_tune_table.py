"""`python -m fastconv tune`: what it measures, shows and removes; who is fastest is invented."""

from __future__ import annotations

import pytest

from fastconv import autotune, backends, cli, planner, winners
from fastconv.autotune import Tuned
from fastconv.errors import UnsupportedError

LAYER = "conv3d:4-4:3x3x3@6x8x8:p1"
NEEDS_TORCH = pytest.mark.skipif(
    backends.available()["torch"] is not None, reason="networks need PyTorch"
)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """`run("tune", ...)`: exit code, lines on stdout, lines on stderr; no results at first."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    winners.forget()

    def command(*argv):
        try:
            code = cli.main(["tune", *map(str, argv)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    yield command
    winners.forget()


@pytest.fixture
def asked(monkeypatch):
    """The requests that were tuned: the second best estimate always wins, in 2 ms."""
    requests = []

    def invented(request, budget_s):
        requests.append(request)
        before = planner.plan_of(request)
        found = [c.plan for c in planner.priced(request) if c.reason is None]
        after = (found * 2)[1]
        framework = {winners.label(p): 6.0 for p in found if p.backend == "torch"}
        ms = {winners.label(after): 2.0}
        noisy = request.geometry.x_shape[1] == 6
        winners.keep(request, winners.Record(winners.label(after), ms, framework, noisy=noisy))
        wrong = {"c winograd": "its result is wrong", "numba winograd": autotune.NO_ROOM}
        return Tuned(request, before, after, 4.0, 2.0, 6.0, noisy, wrong if noisy else {})

    monkeypatch.setattr(autotune, "tune_request", invented)
    return requests


def test_a_layer_is_measured_once_and_shown_before_and_after(run, asked):
    code, out, err = run(LAYER, "--backend", "reference")
    assert (code, err, len(asked)) == (0, [], 1)
    header, row, summary = out
    assert header.split() == [
        "layer",
        "convolution",
        "before",
        "ms",
        "now",
        "ms",
        "torch",
        "ms",
        "ratio",
    ]
    assert row.startswith(LAYER)
    before, after = (winners.label(c.plan) for c in planner.priced(asked[0])[:2])
    assert row.index(before) < row.index("4.000") < row.index(after) < row.index("2.000")
    assert "~" not in row
    assert summary.startswith("1 of 1 measured, 1 changed")
    assert str(winners.path()) in summary
    code, out, _ = run(LAYER, "--backend", "reference")
    assert len(asked) == 1
    assert "as measured before" in out[1]
    run(LAYER, "--backend", "reference", "--again")
    assert len(asked) == 2


def test_what_was_disturbed_is_marked_and_measured_again(run, asked):
    layer = "conv3d:6-6:3x3x3@6x8x8:p1"
    for times in (1, 2):
        _, out, _ = run(layer, "--backend", "reference")
        assert len(asked) == times
        assert out[1].endswith("~ c winograd: its result is wrong")
    _, out, _ = run(layer, "--backend", "reference", "--show")
    assert out[1].endswith("~")
    assert run("--show")[1][0].endswith(" ~")


def test_options_are_those_of_the_request(run, asked):
    options = [
        "--backend",
        "reference",
        "--tolerance",
        "2",
        "--layout",
        "contiguous",
        "--dtype",
        "float64",
    ]
    code, _, _ = run(LAYER, *options, "--bias", "--residual", "--activation", "silu")
    (request,) = asked
    assert code == 0
    assert (request.backend, request.tolerance) == ("reference", 2.0)
    assert (request.layout, request.dtype) == ("contiguous", "float64")
    epilogue = request.epilogue
    assert (epilogue.bias, epilogue.activation, epilogue.residual) == (True, "silu", True)
    run("separable:4-4-4:3x3x3@6x8x8", "--backend", "reference", "--residual")
    assert [e.residual for e in asked[-1].epilogue] == [False, False, True]
    run("conv3d:4-4:3x3x3@3x8x8:p0x1x1", "--backend", "reference", "--continual")
    assert asked[-1].continual


@NEEDS_TORCH
def test_a_network_is_measured_by_its_distinct_convolutions(run, asked):
    code, out, err = run("c3d@16x32x32", "--backend", "numba" if _has("numba") else "torch")
    assert (code, err) == (0, [])
    assert len(out) == len(asked) + 2
    assert all(request.epilogue.bias for request in asked)  # C3D's convolutions have one
    assert {request.layout for request in asked} == {"channels_last_3d"}
    again = run("c3d@16x32x32", "--backend", "numba" if _has("numba") else "torch", "--show")
    assert len(again[1]) == len(out)
    assert sum("as measured before" in line for line in again[1]) == len(asked)


def _has(backend):
    return backends.available()[backend] is None


def test_show_and_clear(run, asked):
    assert run("--show")[1][-1].startswith("0 results for fastconv ")
    run(LAYER, "--backend", "reference")
    code, out, _ = run("--show")
    assert code == 0
    assert out[0].startswith("conv3d 1x4x6x8x8 * 4x4x3x3x3 padding 1+1x1+1x1+1, float32, none")
    assert out[1].strip().startswith("> 2.000 ms  reference ")
    assert out[-1].startswith("1 results for ")
    code, out, _ = run("conv3d:8-8:3x3x3@6x8x8:p1", "--show", "--backend", "reference")
    assert "not measured" in out[1]
    assert len(asked) == 1
    code, out, _ = run("--clear")
    assert (code, out) == (0, [f"1 results removed: {winners.path()}"])


def test_interrupted_keeps_what_was_measured(run, asked, monkeypatch):
    invented = autotune.tune_request

    def enough(request, budget_s):
        if asked:
            raise KeyboardInterrupt
        return invented(request, budget_s)

    monkeypatch.setattr(autotune, "tune_request", enough)
    code, out, _ = run(LAYER, "conv3d:8-8:3x3x3@6x8x8:p1", "--backend", "reference")
    assert code == 0
    assert out[0] == "interrupted: what was measured is kept"
    assert len(winners.records()) == 1


def test_a_layer_that_cannot_be_timed_leaves_the_others_in_peace(run, asked, monkeypatch):
    invented = autotune.tune_request

    def picky(request, budget_s):
        if request.geometry.in_channels == 8:
            raise UnsupportedError("tune: not this one")
        return invented(request, budget_s)

    monkeypatch.setattr(autotune, "tune_request", picky)
    _, out, _ = run("conv3d:8-8:3x3x3@6x8x8:p1", LAYER, "--backend", "reference")
    assert out[1].endswith("tune: not this one")
    assert out[3].startswith("1 of 2 measured")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "tune: what? Name a network or a layer, or --show or --clear"),
        (("x4d",), "tune: 'x4d' is neither a network nor a layer. Networks: c3d, "),
        (("conv3d:3",), "tune: layer 'conv3d:3' is not written like "),
        (("conv3d:4-8:3x3@8x8x8",), "tune: conv3d needs 2 channels and 3 extents"),
        ((LAYER, "--backend", "triton"), "backend 'triton' is not available: "),
        ((LAYER, "--backend", "cuda"), "unknown backend 'cuda'. Known: "),
    ],
)
def test_what_cannot_be_done_is_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out, len(err)) == (cli.FAILED, [], 1)
    assert err[0].startswith(f"fastconv: {message}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((LAYER, "--threads", "0"), "argument --threads: expected a whole number of at least 1"),
        ((LAYER, "--budget", "soon"), "argument --budget: expected a whole number of at least 1"),
        ((LAYER, "--layout", "NHWC"), "argument --layout: invalid choice: 'NHWC'"),
        ((LAYER, "--tolerance", "x"), "argument --tolerance: invalid float value: 'x'"),
        (("--show", "--clear"), "argument --clear: not allowed with argument --show"),
    ],
)
def test_a_wrong_command_line_is_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out, len(err)) == (cli.USAGE, [], 1)
    assert err[0].startswith(f"fastconv: {message}")


@NEEDS_TORCH
def test_a_clip_that_a_network_does_not_take_is_one_line(run):
    code, out, err = run("x3d_m@3")
    assert (code, out, len(err)) == (cli.FAILED, [], 1)
    assert err[0].startswith("fastconv: tune: expected x3d_m@FRAMESxHEIGHTxWIDTH")
