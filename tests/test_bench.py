"""The harness: nothing wrong is timed, nothing measured is lost, nothing missing is silent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

from fastconv import backends, cli, counts, planner
from fastconv.bench import (
    baselines,
    cases,
    cuda,
    errors,
    gpu,
    job,
    machine,
    no_gpu,
    ours,
    problems,
    processes,
    readme,
    report,
    results,
    roofline,
    rows,
)
from fastconv.bench.baselines import Peer
from fastconv.bench.cases import Case
from fastconv.bench.contenders import Prepared, Settings, in_place
from fastconv.bench.results import OURS, Document
from fastconv.bench.roofline import Roofline
from fastconv.count_table import parse_layer
from fastconv.counts import Counts
from fastconv.errors import BackendError, UnsupportedError
from fastconv.geometry import Geometry
from fastconv.reference import direct
from fastconv.timing import Timing

ROOT = Path(__file__).parent.parent
NEEDS_TORCH = pytest.mark.skipif(not backends.installed("torch"), reason="needs PyTorch")
QUICK = Settings(threads=1, repeats=2, budget_s=0.01)
ROOFS = Roofline({"float32": 1e11}, "made up", {1 << 20: 1e11, 1 << 27: 5e10})
LAYER = Case("layers", "conv3d:4-4:3x3x3@3x5x5:p1:g4", "depthwise 3x3x3 4, 3x5x5", bar=1.5)
BLOCK = Case("blocks", "separable:6-8-5:3x3x3@4x5x5", "separable", activation="relu")
STREAM = Case("streams", "conv3d:2-3:3x3x3@3x5x5:p0x1x1", "dense 3x3x3 2->3, 3x5x5")
SMALL = (LAYER, BLOCK, STREAM)
REFERENCE = ours.Choice("reference")


def peer(name="fake", prepare=None, **options) -> Peer:
    packages = options.pop("packages", ())
    return Peer(name, f"the peer {name}", name, packages, prepare or exact_peer, **options)


def exact_peer(problem, settings, precision="float32", off=0.0) -> Prepared:
    return Prepared(lambda: None, lambda: problem.want + off, precision)


# Cases


def test_the_table_has_the_layers_that_matter_first():
    table = cases.table()
    assert [c.kind for c in table] == sorted((c.kind for c in table), key=cases.KINDS.index)
    assert len({(c.kind, c.target) for c in table}) == len(table)
    first = table[0]
    assert (first.name, first.bar, first.goal) == ("dense 3x3x3 64->128, 16x56x56", 4.0, "4.7")
    assert all(c.bar is None or c.bar >= 1 for c in table)


@NEEDS_TORCH
def test_every_distinct_convolution_of_a_network_is_a_case_once():
    found = cases.of_networks(("x3d_s",))
    geometries = [case.geometry for case in found]
    assert len(set(geometries)) == len(geometries) > 20
    assert {case.source for case in found} == {"x3d_s"}
    chosen = cases.select(("layers",), ["x3d_m"])
    assert all("x3d_m" in case.source for case in chosen)


def test_filters_all_hold_and_an_empty_choice_is_refused():
    (case,) = cases.select(("layers",), ["depthwise", "54,"], traced=False)
    assert case.target.startswith("conv3d:54-54")
    with pytest.raises(UnsupportedError, match="no case of layers, blocks matches 'wavelet'"):
        cases.select(("layers", "blocks"), ["wavelet"], traced=False)


def test_a_case_in_another_dtype_has_no_bar_of_its_own():
    single, half = cases.select(("layers",), ["64->128"], False, ("float32", "float16"))
    assert single.bar == 4.0
    assert (half.dtype, half.bar, half.name) == ("float16", None, single.name + " float16")


@pytest.mark.parametrize(
    ("geometry", "text"),
    [
        (Geometry.of((1, 4, 5, 6), (6, 2, 1, 1), groups=2), "grouped/2 1x1 4->6, 5x6"),
        (Geometry.of((1, 4, 9), (8, 1, 3), 2, groups=4), "depthwise 3 4->8 /2, 9"),
        (Geometry.of((1, 4, 2, 3, 4), (8, 4, 1, 1, 1)), "pointwise 4->8, 2x3x4"),
    ],
)
def test_geometries_in_words(geometry, text):
    assert cases.describe(geometry) == text


# Problems


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.kind)
def test_ours_is_right_and_one_wrong_element_is_not(case):
    problem = problems.make(case)
    prepared = ours.prepare(problem, REFERENCE, QUICK)
    got = prepared.output().copy()
    assert problem.errors(got)[1] <= problem.allowed_rms("float32")
    got.flat[got.size // 2] += 0.1
    assert problem.errors(got)[1] > problem.allowed_rms("float32")


def test_a_stream_is_checked_on_its_newest_column():
    problem = problems.make(STREAM)
    window = np.moveaxis(problem.x[2:], 0, 2)
    want = direct.correlate(window, problem.weights[0], problem.stages[0])[:, :, 0]
    assert np.array_equal(problem.want, want)


def test_another_shape_and_values_that_are_not_finite_are_infinitely_wrong():
    problem = problems.make(LAYER)
    nan = np.full_like(problem.want, np.nan)
    assert problem.errors(nan) == problem.errors(problem.want[..., :2]) == (np.inf, np.inf)


def test_what_is_allowed_grows_with_precision_and_algorithm():
    problem = problems.make(LAYER)
    single = problem.allowed_rms("float32")
    assert problem.allowed_rms("float32", factor=3) == 3 * single
    assert single < problem.allowed_rms("tf32") < problem.allowed_rms("bfloat16") < 0.1


# Rows


def test_a_row_has_times_errors_and_the_nearer_roof():
    own, other = rows.of_case(LAYER, [peer()], REFERENCE, QUICK, ROOFS)
    assert (own["who"], own["status"], other["who"], other["status"]) == (OURS, "ok", "fake", "ok")
    assert own["macs"] == own["multiplications"] == 4 * 75 * 27
    assert own["roof"] == "compute"
    assert own["roof_ms"] == pytest.approx(1e3 * own["macs"] / 1e11)
    assert own["ratio"] == other["ratio"] == other["median_ms"] / own["median_ms"]
    assert other["ours_ms"] == own["median_ms"]
    assert own["error_max"] < 1e-6
    assert other["error_max"] == 0
    assert own["repeats"] <= QUICK.repeats


def test_what_is_wrong_is_never_timed():
    def wrong(problem, settings):
        def call():
            raise AssertionError("timed")

        return Prepared(call, lambda: problem.want + 0.1)

    own, other = rows.of_case(LAYER, [peer(prepare=wrong)], REFERENCE, QUICK, ROOFS)
    assert other["status"] == "wrong"
    assert other["error_rms"] > other["allowed_rms"]
    assert "median_ms" not in other
    assert "ratio" not in own


def test_every_peer_that_is_not_timed_says_why():
    def refuses(problem, settings):
        raise UnsupportedError("no such padding")

    def breaks(problem, settings):
        raise ZeroDivisionError("oh\nno")

    def runs_out(problem, settings):
        def output():
            raise MemoryError

        return Prepared(output, output)

    peers = [
        peer("absent", packages=("no_such_package",)),
        peer("gpu", devices=("cuda",)),
        peer("other", kinds=("networks",)),
        peer("refuses", refuses),
        peer("breaks", breaks),
        peer("runs_out", runs_out),
    ]
    found = rows.of_case(LAYER, peers, REFERENCE, QUICK, ROOFS)
    assert found[0]["status"] == "ok"
    assert {row["who"]: (row["status"], row["reason"]) for row in found[1:]} == {
        "absent": ("unavailable", "no_such_package not installed: pip install 'fastconv[bench]'"),
        "gpu": ("unsupported", "is for cuda"),
        "other": ("unsupported", "is for networks"),
        "refuses": ("unsupported", "no such padding"),
        "breaks": ("failed", "ZeroDivisionError: oh"),
        "runs_out": ("failed", "MemoryError: no message"),
    }


def test_the_best_peer_computes_in_the_same_precision():
    def coarse(problem, settings):
        return exact_peer(problem, settings, "bfloat16", off=1e-4)

    found = rows.of_case(LAYER, [peer("coarse", coarse), peer("exact")], REFERENCE, QUICK, ROOFS)
    assert [row["status"] for row in found] == ["ok"] * 3
    assert found[0]["best_peer"] == "exact"
    assert found[1]["ratio"] == found[1]["median_ms"] / found[0]["median_ms"]
    (line,) = [r for r in report.reasons(Document(rows=found)) if r.startswith("coarse")]
    assert line.startswith("coarse computes in bfloat16, largest error ")


@NEEDS_TORCH
def test_a_network_that_does_not_exist_is_listed():
    case = Case("networks", "danse_net", "danse_net")
    (row,) = rows.of_case(case, [peer()], REFERENCE, QUICK, ROOFS)
    assert row["status"] == "unsupported"
    assert row["reason"] == "the zoo of this version has no danse_net"


@NEEDS_TORCH
@pytest.mark.parametrize("name", ["torch", "torch-last", "openvino", "onnxruntime", "continual"])
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.kind)
def test_the_peers_are_right(name, case):
    chosen = next(p for p in baselines.PEERS.values() if p.name.startswith(name))
    if chosen.missing() or case.kind not in chosen.kinds:
        pytest.skip(chosen.missing() or "not for this kind")
    (_, row) = rows.of_case(case, [chosen], REFERENCE, QUICK, ROOFS)
    assert (row["status"], row["reason"]) == ("ok", "")
    assert row["error_rms"] < 1e-6


def test_cold_caches_are_emptied_between_calls(monkeypatch):
    monkeypatch.setattr(rows, "FLUSH_BYTES", 1 << 10)
    order: list[str] = []
    monkeypatch.setattr(rows.np, "add", lambda *a, **k: order.append("flush"))
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    found = rows.timed(functions, replace(QUICK, repeats=1, cold=True))
    assert list(found) == ["a", "b"]
    assert order[-4:] == ["flush", "a", "flush", "b"]


# Roofs


def test_the_nearer_roof_decides():
    compute = Counts(multiplications=10**9, transform_additions=10**9, activation_bytes=8)
    assert ROOFS.roof(compute) == (20.0, "compute")
    memory = Counts(multiplications=1, activation_bytes=10**9, weight_bytes=10**9)
    assert ROOFS.roof(memory) == (pytest.approx(40.0), "memory")
    assert ROOFS.total([compute, memory]) == (pytest.approx(60.0), "memory")


def test_small_layers_are_held_to_the_speed_of_caches():
    assert ROOFS.bandwidth(1 << 18) == 1e11
    assert ROOFS.bandwidth(1 << 26) == 5e10


@pytest.mark.skipif(not backends.installed("numba"), reason="needs Numba")
def test_the_loop_of_multiply_adds_does_them():
    from fastconv.bench import fma

    multiply_adds, call = fma.loop(threads=2, rounds=100)
    assert multiply_adds % (2 * 100 * fma.CHAINS) == 0
    out = call.__closure__ and next(
        c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, np.ndarray)
    )
    call()
    # s = s / 2 + 1 / 2 goes to 1 from everywhere.
    lanes = multiply_adds // (2 * 100 * fma.CHAINS)
    assert np.allclose(out[:, :lanes], fma.CHAINS)


# The command


@pytest.fixture
def small(monkeypatch):
    """A table of three small cases, roofs that take no time, and no other process."""
    monkeypatch.setattr(processes, "rows", job.Job.rows)
    monkeypatch.setattr(cases, "table", lambda: list(SMALL))
    monkeypatch.setattr(cases, "of_networks", list)
    monkeypatch.setattr(roofline, "of", lambda settings, dtypes: ROOFS)


@pytest.fixture
def bench(capfd):
    """`bench("layers", ...)`: exit code, stdout, lines of stderr without the progress bar."""

    def command(*argv: object) -> tuple[int | str | None, str, list[str]]:
        quick = ("--repeats", 2, "--budget", 0.01) if argv[0] in ("all", *cases.KINDS) else ()
        try:
            code: int | str | None = cli.main(["bench", *map(str, (*argv, *quick))])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("fastconv")]

    return command


def test_a_run_prints_a_table_and_writes_its_rows(small, bench, tmp_path):
    path = tmp_path / "new" / "rows.json"
    code, out, err = bench("all", "--backend", "reference", "--peers", "none", "--json", path)
    assert (code, err) == (0, [])
    assert f"wrote {path}" in out
    assert LAYER.name in out
    data = json.loads(path.read_text())
    assert [row["target"] for row in data["rows"]] == [case.target for case in SMALL]
    assert {row["status"] for row in data["rows"]} == {"ok"}
    assert data["machine"]["versions"]["numpy"] == np.__version__
    assert {"cpu", "instruction_sets", "cpus", "commit"} <= set(data["machine"])
    assert data["settings"]["threads"] >= 1
    assert not list(path.parent.glob("*.part"))


def test_a_folder_gets_a_file_named_by_the_machine(small, bench, tmp_path):
    bench("layers", "--backend", "reference", "--peers", "none", "--json", tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert results.read(path).machine["kind"] == path.stem


def test_an_interrupt_keeps_what_was_measured(small, bench, tmp_path, monkeypatch):
    real = job.of_case

    def second_time(case, *rest):
        if case.kind == "blocks":
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(job, "of_case", second_time)
    path = tmp_path / "rows.json"
    code, out, err = bench("all", "--backend", "reference", "--peers", "none", "--json", path)
    assert (code, err) == (130, ["fastconv: interrupted; 1 of 3 measurements are done"])
    assert LAYER.name in out
    assert [row["target"] for row in results.read(path).rows] == [LAYER.target]


def test_a_crash_keeps_what_was_measured(small, tmp_path, monkeypatch):
    real = job.of_case

    def second_time(case, *rest):
        if case.kind == "blocks":
            raise SystemError("the process is gone")
        return real(case, *rest)

    monkeypatch.setattr(job, "of_case", second_time)
    path = tmp_path / "rows.json"
    argv = ["bench", "all", "--backend", "reference", "--peers", "none", "--json", str(path)]
    with pytest.raises(SystemError):
        cli.main([*argv, "--repeats", "1"])
    assert [row["target"] for row in results.read(path).rows] == [LAYER.target]


def test_after_the_limit_cases_are_listed_as_skipped(small, bench, tmp_path):
    path = tmp_path / "rows.json"
    bench("all", "--backend", "reference", "--limit", 1e-9, "--json", path)
    found = results.read(path).rows
    assert {row["status"] for row in found} <= {"skipped", "unsupported", "unavailable"}
    own = [row for row in found if row["who"] == OURS]
    assert [row["status"] for row in own] == ["skipped"] * 3
    assert own[0]["reason"] == "the run's time limit was reached"


def test_a_wrong_answer_of_ours_is_loud(small, bench, monkeypatch):
    wrong = ours.prepare

    def prepare(problem, choice, settings):
        good = wrong(problem, choice, settings)
        return replace(good, output=lambda: good.output() + 1)

    monkeypatch.setattr(rows.ours, "prepare", prepare)
    code, out, _ = bench("layers", "--backend", "reference", "--peers", "none")
    assert code == 1
    assert "WRONG" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("layers", "--filter", "wavelet"), "bench: no case of layers matches 'wavelet'"),
        (("layers", "--peers", "abacus"), "bench: unknown peer 'abacus'. Known: all, none, torch,"),
        (("layers", "--backend", "abacus"), "unknown backend 'abacus'. Known: "),
        (("layers", "--backend", "triton"), "backend 'triton' is not available: "),
        (("layers", "--algorithm", "fft"), "bench: unknown algorithm 'fft'. Known: auto, direct"),
        (("layers", "--dtype", "int8"), "bench: unknown dtype 'int8'. Known: float32, "),
        (("layers", "--threads", "4096"), "bench: 4096 threads asked for, "),
        (("layers", "--json", "README.md/rows.json"), "bench: cannot write README.md/rows.json: "),
        (("layers", "--plot", "README.md/plots"), "bench: "),
        (("compare", "none.json", "none.json"), "bench: cannot read none.json: No such file"),
        (("show", "README.md"), "bench: README.md is not JSON: "),
    ],
)
def test_wrong_use_is_one_line_before_anything_runs(bench, monkeypatch, argv, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(roofline, "of", lambda *_: pytest.fail("ran"))
    code, out, err = bench(*argv)
    assert (code, out, len(err)) == (cli.FAILED, "", 1)
    assert err[0].startswith(f"fastconv: {message}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("wavelets",), "argument COMMAND: invalid choice: 'wavelets'"),
        (("layers", "--tile", "4xa"), "argument --tile: expected whole numbers joined by 'x'"),
        (("layers", "--repeats", "0"), "argument --repeats: expected a whole number of at least"),
        (("layers", "--limit", "soon"), "argument --limit: expected a number of seconds above 0"),
        (("gpu",), "the following arguments are required: --out"),
    ],
)
def test_a_wrong_command_line_is_one_line(bench, argv, message):
    code, out, err = bench(*argv)
    assert (code, out, len(err)) == (cli.USAGE, "", 1)
    assert err[0].startswith(f"fastconv: {message}")


def test_list_names_every_case_and_peer(bench):
    code, out, _ = bench("list")
    assert code == 0
    assert all(case.target in out for case in cases.table())
    assert all(f"peer {name} " in out for name in baselines.PEERS)


# Documents


def document(**medians: float) -> Document:
    """A document of one layer with these contenders and medians, quantiles 1 % apart."""
    made = Document(
        machine={
            "kind": "abacus",
            "cpu": "Abacus",
            "cpus": 2,
            "load": 0.1,
            "commit": "abc",
            "date": "2001-02-03 04:05 UTC",
            "versions": {"torch": "9.9"},
            "instruction_sets": ["beads"],
        },
        settings={
            "threads": 2,
            "repeats": 30,
            "budget_s": 4.0,
            "caches": "warm",
            "device": "cpu",
        },
        roofline=ROOFS.record(),
    )
    found = []
    for who, ms in medians.items():
        row = rows.bare(LAYER, who, "ok")
        timing = Timing(ms, 0.99 * ms, 1.01 * ms, 0.98 * ms, 30)
        row.update(vars(timing), noisy=False, precision="float32", algorithm="numba depthwise")
        row.update(error_max=2e-7, error_rms=1e-7)
        found.append(row)
    made_of = counts.count(LAYER.geometry)
    found[0].update(roof="memory", roof_ms=0.1, roof_fraction=0.5, bytes=made_of.activation_bytes)
    found[0].update(macs=made_of.macs, multiplications=made_of.macs)
    results.rate(found)
    made.add(found)
    return made


def test_a_document_comes_back_from_its_file(tmp_path):
    path = tmp_path / "rows.json"
    first = document(ours=1.0, torch=2.0)
    first.rows[0]["roof_fraction"] = float("inf")  # JSON has none
    first.write(path)
    again = results.read(path)
    assert again.machine == first.machine
    assert again.rows[1] == first.rows[1]
    assert again.rows[0]["roof_fraction"] is None


def test_the_table_has_the_ratio_first():
    head, line = report.table(document(ours=1.0, torch=2.0, openvino=1.5).cases())
    assert head.split()[:4] == ["ratio", "bar", "goal", "case"]
    assert line.split()[:2] == ["1.50", "1.5"]
    assert line.split().count("2.000") == 1


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({"ours": 0.5}, " 2.00x faster  depthwise 3x3x3 4, 3x5x5: 1.000 -> 0.500 ms"),
        ({"ours": 1.5}, " 0.67x SLOWER  depthwise 3x3x3 4, 3x5x5: 1.000 -> 1.500 ms"),
        ({"ours": 1.03}, "1 of 1 cases did not change beyond noise"),
        ({"torch": 3.0}, "peers: 1.50 times as long, median of 1 rows"),
    ],
)
def test_compare_tells_changes_from_noise(after, expected):
    before = {"ours": 1.0, "torch": 2.0}
    lines = report.comparison(document(**before), document(**{**before, **after}))
    assert expected in lines


def test_rates_are_per_nanosecond_and_thread():
    (line,) = report.rates(document(ours=1e-3, torch=2.0))
    moved = counts.count(LAYER.geometry).activation_bytes
    assert line.split()[:5] == ["numba", "depthwise", "bytes", "median", f"{moved / 2000:.1f}"]


def test_compare_warns_of_other_settings():
    other = document(ours=1.0)
    other.settings["threads"] = 1
    assert "NOT COMPARABLE: threads: 2 -> 1" in report.comparison(document(ours=1.0), other)


def test_the_readme_is_written_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(readme.errors, "measured", lambda: iter([ERROR]))
    (tmp_path / "bench" / "results").mkdir(parents=True)
    text = "before\n<!-- bench -->\nold\n<!-- /bench -->\n<!-- errors --><!-- /errors -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UnsupportedError, match="no results in bench/results"):
        readme.write(tmp_path)
    document(ours=1.0, torch=2.0, openvino=1.5).write(tmp_path / "bench/results/abacus.json")
    for _ in range(2):  # the second time changes nothing
        written = readme.write(tmp_path).read_text()
        before, rest = written.split("<!-- bench -->\n")
        table, rest = rest.split("\n<!-- /bench -->")
        assert before == "before\n"
        assert f"| {LAYER.name} | 1.000 | 1.500 OpenVINO | 1.50 | 2e-07 |" in table
        assert "Abacus, 2 threads" in table
        assert "| 2D F(4x4, 3x3) | 2.0e-06 | 1.0e-06 | 1.5 | 1.2 | 7.13 |" in rest
        assert rest.endswith("<!-- /errors -->\nafter\n")


ERROR = errors.Error(2, 4, 2e-6, 1e-6, 1.5, 1.2, 7.13)


def test_a_readme_without_its_markers_stays(tmp_path):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    document(ours=1.0).write(tmp_path / "bench/results/abacus.json")
    (tmp_path / "README.md").write_text("<!-- bench --><!-- /bench -->")
    with pytest.raises(UnsupportedError, match=r"needs <!-- errors --> and then <!-- /errors -->"):
        readme.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "<!-- bench --><!-- /bench -->"


def test_the_readme_of_this_checkout_has_its_markers():
    text = (ROOT / "README.md").read_text()
    for name in (readme.BENCH, readme.ERRORS):
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


def test_errors_of_minimal_filtering_are_near_what_is_expected(monkeypatch):
    """Small layers on whatever is here: the expected factor of the planner holds within 2."""
    layers = ("conv1d:16-16:3@64:p1", "conv2d:16-16:3x3@16x16:p1")
    monkeypatch.setattr(errors, "LAYERS", layers)
    found = {(e.axes, e.m): e for e in errors.measured()}
    assert set(found) == {(axes, m) for axes in (1, 2) for m in errors.TILES}
    for (axes, m), e in found.items():
        if m is None:
            assert (e.factor_largest, e.factor_rms, e.amplification) == (1, 1, 1)
            continue
        geometry = parse_layer(layers[axes - 1])
        plan = planner.plan(geometry, algorithm="winograd", tile=(m,) * axes, tolerance=1e9)
        assert e.factor_rms < 2 * planner.error_factor(plan)


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from fastconv.bench import plots

    written = plots.write(document(ours=1.0, torch=2.0), tmp_path)
    assert [path.name for path in written] == ["speedup-layers.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


# The GPU's side, without one


class FakeCuda:
    """Looks like `torch.cuda`: every call of a function takes one tick of a millisecond."""

    def __init__(self):
        self.ticks, self.synchronized, self.capturing = 0, 0, False
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.ticks

            def elapsed_time(self, end):
                assert fake.synchronized
                return float(end.at - self.at)

        class Graph:
            def replay(self):
                fake.ticks += 8  # launches cost the other half

        self.Event, self.CUDAGraph = Event, Graph

    def synchronize(self):
        self.synchronized += 1

    def Stream(self):
        return self

    current_stream = Stream

    def wait_stream(self, stream):
        pass

    def stream(self, stream):
        return self

    def graph(self, graph):
        self.capturing = True
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.capturing = False

    def function(self):
        self.ticks += 1

    def refuses_capture(self):
        if self.capturing:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.ticks += 2


def test_gpu_times_are_per_call_and_graphs_stand_apart():
    fake = FakeCuda()
    functions = {"ours": fake.function, "peer": fake.refuses_capture}
    called, graphs, refused = cuda.timed(functions, replace(QUICK, repeats=3, budget_s=60), fake)
    assert called["ours"].median_ms == 1
    assert called["peer"].median_ms == 2
    assert called["ours"].repeats == 3
    assert graphs["ours"].median_ms == 8 / cuda.MOST_SETS
    assert refused == {"peer": "RuntimeError: operation not permitted"}
    assert cuda.best_ms(fake.function, api=fake) == 1


@NEEDS_TORCH
def test_the_gpu_command_writes_all_rows_in_both_precisions(small, bench, tmp_path, monkeypatch):
    facts = machine.facts()
    monkeypatch.setattr(no_gpu, "reason", lambda: None)
    monkeypatch.setattr(machine, "kind", lambda device: f"{device} of the test")
    monkeypatch.setattr(machine, "facts", lambda device: facts)
    monkeypatch.setattr(gpu, "Settings", lambda threads, **_: QUICK)
    timed_there = [replace(case, cuda_batch=2) for case in (LAYER, BLOCK)]
    monkeypatch.setattr(gpu, "DTYPES", ("float32",))
    monkeypatch.setattr(gpu, "compile_all", lambda *_: None)
    monkeypatch.setattr(cases, "table", lambda: [*timed_there, STREAM])
    monkeypatch.setattr(baselines, "select", lambda *_: [])
    code, out, err = bench("gpu", "--out", tmp_path)
    assert (code, err) == (0, [])
    assert f"rows are in {tmp_path}" in out
    timed = results.read(tmp_path / "cuda of the test.json").rows
    assert [row["target"] for row in timed] == [LAYER.target, BLOCK.target]
    assert [(row["name"], row["batch"]) for row in timed] == [
        (f"{LAYER.name} x2", 2),
        (f"{BLOCK.name} x2", 2),
    ]


@NEEDS_TORCH
def test_training_compares_gradients_too():
    case = replace(LAYER, kind="training")
    problem = problems.make(case)
    y, gx, gw = problem.want
    assert (gx.shape, tuple(gw.shape)) == (problem.x.shape, problem.weights[0].shape)
    (row,) = rows.of_case(case, [], ours.Choice("torch"), QUICK, ROOFS)
    assert (row["status"], row["algorithm"]) == ("ok", "torch depthwise and gradients")
    assert problem.errors((y, gx, gw + 1))[0] > 0.01


@NEEDS_TORCH
def test_tensors_are_compared_where_they_are():
    import torch

    problem = problems.make(LAYER)
    off = problem.want.copy()
    off.flat[0] += np.abs(off).max()
    assert problem.errors(torch.from_numpy(off)) == pytest.approx(problem.errors(off))
    assert problem.errors(torch.full(off.shape, torch.nan)) == (np.inf, np.inf)


@NEEDS_TORCH
def test_on_a_gpu_every_call_sets_its_own_precision():
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def flags():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    on_gpu = replace(QUICK, device="cuda")
    rounded, exact = in_place(flags, on_gpu, tf32=True), in_place(flags, on_gpu)
    try:
        assert [rounded(), exact(), rounded()] == [(True, True), (False, False), (True, True)]
        assert in_place(flags, QUICK) is flags
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.skipif(no_gpu.reason() is None, reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(bench, tmp_path):
    code, out, err = bench("gpu", "--out", tmp_path / "rows")
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("fastconv: no GPU here: ")
    assert not (tmp_path / "rows").exists()
    code, _, err = bench("layers", "--device", "cuda")
    assert code == cli.FAILED
    assert err[0].startswith("fastconv: bench: no GPU here: ")


@pytest.mark.skipif(
    no_gpu.reason() is None or shutil.which("make") is None, reason="there is a GPU, or no make"
)
def test_without_a_gpu_make_says_so_in_one_line():
    command = ["make", "--no-print-directory", "gpu", f"GPU_PYTHON={sys.executable}"]
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "no GPU here: " in done.stderr


# One table for speed and for correctness


@pytest.mark.skipif(not backends.installed("numba"), reason="needs Numba")
@pytest.mark.parametrize("case", cases.table(), ids=lambda c: f"{c.kind}: {c.name}")
def test_every_case_is_right_on_smaller_maps(case):
    if case.kind == "networks":
        pytest.skip("accelerate has tests of its own")
    if case.kind == "training" and not backends.installed("torch"):
        pytest.skip("needs PyTorch")
    head, size = case.target.split("@")
    extents, *options = size.split(":")
    least = (99, 9, 9) if case.kind == "streams" else (5, 9, 9)
    small = [min(int(e), m) for e, m in zip(extents.split("x"), least, strict=True)]
    target = ":".join([f"{head}@{'x'.join(map(str, small))}", *options])
    problem = problems.make(replace(case, target=target))
    assert prod(problem.x.shape) < 1 << 18
    try:
        prepared = ours.prepare(problem, ours.Choice("numba"), QUICK)
    except BackendError as error:  # a module that is not written yet
        pytest.skip(str(error))
    _, error_rms = problem.errors(prepared.output())
    assert error_rms <= problem.allowed_rms("float32", prepared.factor)
