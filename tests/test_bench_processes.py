"""Benchmarks in several processes: what they find comes together, and none can lose a run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from fastconv.bench import baselines, cases, ours, processes, results, rows, run
from fastconv.bench.baselines import Peer
from fastconv.bench.cases import Case
from fastconv.bench.contenders import Settings
from fastconv.bench.job import Job
from fastconv.bench.results import OURS, Document
from fastconv.bench.roofline import Roofline

CASES = tuple(
    Case("layers", f"conv3d:{c}-{c}:3x3x3@3x5x5:p1:g{c}", f"depthwise {c}") for c in (2, 4, 6)
)
STREAM = Case("streams", "conv3d:2-3:3x3x3@3x5x5:p0x1x1", "stream")
ROOFS = Roofline({"float32": 1e11}, "made up", {1 << 20: 1e11})
SETTINGS = Settings(threads=1, repeats=2, budget_s=0.01)
# A child whose peers are made up: what `fake` does depends on FAKE and on the case's name.
CHILD = """
import os, signal, sys, time
from fastconv.bench import baselines, child, contenders, job

def prepare(problem, settings):
    name, plan = problem.case.name, os.environ["FAKE"]
    if plan == name + " crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if plan == name + " exits":
        os._exit(7)
    if plan == name + " hangs":
        os.write(2, f"\\nhanging {os.getpid()}\\n".encode())  # at once: the parent writes there too
        time.sleep(600)
    print("chatter")
    os.write(1, b"chatter of C code")
    return contenders.Prepared(lambda: None, lambda: problem.want)

for name in ("fake", "fake-too"):
    baselines.PEERS[name] = baselines.Peer(name, name, name, (), prepare)
job.set_up = lambda settings: None
child.main()
"""


def a_job(*peers: str, chosen: tuple[Case, ...] = CASES, until: float = float("inf")) -> Job:
    return Job(chosen, peers, ours.Choice("reference"), SETTINGS, ROOFS, until)


@pytest.fixture
def fakes(monkeypatch):
    """Peers `fake` and `fake-too` here and in children; call it with what should go wrong."""

    def plan(text: str) -> None:
        monkeypatch.setenv("FAKE", text)

    for name in ("fake", "fake-too"):
        peer = Peer(name, name, name, (), lambda *_: pytest.fail("prepared in the parent"))
        monkeypatch.setitem(baselines.PEERS, name, peer)
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", CHILD))
    plan("nothing")
    return plan


def summary(found: list[list[dict]]) -> list[tuple]:
    return [(row["name"], row["who"], row["status"]) for case in found for row in case]


# Which processes there are


def test_a_process_has_the_peers_that_share_it_and_the_cases_that_any_of_them_tries(monkeypatch):
    monkeypatch.setattr(Peer, "missing", lambda self: None)
    job = a_job(*baselines.PEERS, chosen=(*CASES, STREAM))
    found = {part.process: part for part in processes.parts(job)}
    assert list(found) == [
        "torch",
        "openvino",
        "onnxruntime",
        "continual-inference",
        "torch-compile",
    ]
    assert found["openvino"].peers == ("openvino", "openvino-default")
    assert found["continual-inference"].cases == (STREAM,)
    assert found["torch-compile"].cases == CASES
    refused = processes.refusals(job, list(found.values()))
    reasons = {(row["who"], row["name"]): row["reason"] for row in refused}
    assert reasons["torch-compile", "stream"] == "is for layers, blocks, networks"
    assert reasons["torch-tf32", "depthwise 2"] == "is for cuda"
    assert not any(who.startswith("openvino") for who, _ in reasons)


def test_layers_of_networks_come_after_the_table_with_every_peer(monkeypatch):
    monkeypatch.setattr(Peer, "missing", lambda self: None)
    layer = replace(CASES[0], name="layer", source="x3d_s")
    found = processes.parts(a_job("torch", "openvino", chosen=(layer, *CASES)))
    assert [(part.process, part.cases) for part in found] == [
        ("torch", CASES),
        ("openvino", CASES),
        ("torch", (layer,)),
        ("openvino", (layer,)),
    ]


def test_what_is_not_installed_gets_no_process_but_a_reason(monkeypatch):
    monkeypatch.setattr(Peer, "missing", lambda self: f"no {self.name}")
    job = a_job("openvino", chosen=(*CASES, STREAM))
    found = processes.parts(job)
    assert found == [processes.Part(processes.ALONE, (*CASES, STREAM), ())]
    refused = processes.refusals(job, found)
    assert {(row["status"], row["reason"]) for row in refused} == {("unavailable", "no openvino")}
    assert len(refused) == 4


def test_on_a_gpu_one_process_does_it_all(monkeypatch):
    job = replace(a_job("torch", "torch-tf32"), settings=replace(SETTINGS, device="cuda"))
    monkeypatch.setattr(processes, "rows", lambda job: pytest.fail("another process"))
    ((part, _),) = processes.measured(job, processes.parts(job))
    assert (part.cases, part.peers) == (CASES, ("torch", "torch-tf32"))


# What a child does


def test_rows_come_from_the_child_case_by_case(fakes):
    found = list(processes.rows(a_job("fake")))
    assert summary(found) == [(c.name, who, "ok") for c in CASES for who in (OURS, "fake")]
    assert found[0][1]["ours_ms"] == found[0][0]["median_ms"]


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        ("crashes", f"its process was killed: {signal.strsignal(signal.SIGSEGV)}"),
        ("exits", "its process ended with exit code 7"),
    ],
)
def test_a_crash_costs_one_case(fakes, verb, reason):
    fakes(f"depthwise 4 {verb}")
    found = list(processes.rows(a_job("fake")))
    status = {"depthwise 2": "ok", "depthwise 4": "failed", "depthwise 6": "ok"}
    assert summary(found) == [(n, who, s) for n, s in status.items() for who in (OURS, "fake")]
    assert found[1][1]["reason"] == reason


def test_a_process_that_cannot_begin_is_started_once(fakes, monkeypatch):
    fakes("depthwise 2 crashes")
    assert {status for *_, status in summary(list(processes.rows(a_job("fake"))))} == {"failed"}
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    found = list(processes.rows(a_job("fake")))
    assert {row["reason"] for case in found for row in case} == {
        "its process ended with exit code 3"
    }


def test_after_its_time_a_child_skips(fakes):
    found = list(processes.rows(a_job("fake", until=time.time() - 1)))
    assert {status for *_, status in summary(found)} == {"skipped"}


# What becomes of it


def part(ours_ms: float, status: str = "ok", **peers: float) -> list[dict]:
    """The rows of one process."""
    found = [rows.bare(CASES[0], OURS, status), *(rows.bare(CASES[0], p, "ok") for p in peers)]
    for row, ms in zip(found, (ours_ms, *peers.values()), strict=True):
        if row["status"] == "ok":
            row.update(median_ms=ms, precision="float32")
    results.rate(found)
    return found


def test_the_ratio_is_the_lowest_within_a_process():
    document = Document()
    # ONNX Runtime is the fastest, but ours was slow beside it: OpenVINO is the best peer.
    for found in (
        part(1.0, torch=3.0, **{"torch-last": 2.5}),
        part(1.0, openvino=2.0),
        part(0.5, onnxruntime=1.9),
    ):
        document.add(found)
    own, *others = document.rows
    assert (own["best_peer"], own["ratio"], own["median_ms"]) == ("openvino", 2.0, 1.0)
    assert {row["who"]: row["ratio"] for row in others} == {
        "torch": 3.0,
        "torch-last": 2.5,
        "openvino": 2.0,
        "onnxruntime": 3.8,
    }
    assert others[-1]["ours_ms"] == 0.5


@pytest.mark.parametrize("turned", [False, True])
def test_one_row_of_ours_stays_and_a_mistake_is_never_hidden(turned):
    def standing(*found: list[dict]) -> dict:
        document = Document()
        for one in found[::-1] if turned else found:
            document.add(one)
        (own,) = (row for row in document.rows if row["who"] == OURS)
        return own

    good, alone = part(1.0, torch=2.0), part(0.8)
    assert standing(good, alone) is good[0]
    assert standing(good, part(1.0, "failed", openvino=1.0)) is good[0]
    wrong = part(1.0, "wrong", openvino=1.0)
    assert standing(good, wrong) is wrong[0]
    assert "ratio" not in wrong[1]


def test_a_crash_is_shown_beside_the_ratio_to_the_others(fakes, monkeypatch, tmp_path, capfd):
    from fastconv import cli

    fakes("depthwise 4 crashes")
    monkeypatch.setattr(cases, "table", lambda: list(CASES))
    monkeypatch.setattr(run.roofline, "of", lambda *_: ROOFS)
    path = tmp_path / "rows.json"
    argv = ["bench", "layers", "--table-only", "--backend", "reference", "--json", str(path)]
    quick = ["--repeats", "2", "--budget", "0.01", "--peers", "fake,fake-too"]
    assert cli.main([*argv, *quick]) == 1  # both crash on it, so ours failed there
    out = capfd.readouterr().out
    assert "fake: failed (depthwise 4): its process was killed: " in out
    first, second, third = results.read(path).cases()
    assert [row["status"] for row in (*first, *third)] == ["ok"] * 6
    assert [row["status"] for row in second] == ["failed"] * 3
    assert first[0]["ratio"] == min(row["ratio"] for row in first[1:])
    assert json.loads(path.read_text())["format"] == results.FORMAT


PARENT = """
import sys
from fastconv import cli
from fastconv.bench import baselines, cases, processes, roofline
from tests_of_processes import CASES, CHILD, ROOFS

processes.COMMAND = (sys.executable, "-c", CHILD)
baselines.PEERS["fake"] = baselines.Peer("fake", "fake", "fake", (), None)
cases.table = lambda: list(CASES)
roofline.of = lambda *_: ROOFS
sys.exit(cli.main(sys.argv[1:]))
""".replace("tests_of_processes", __name__)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_keeps_the_rows_and_ends_the_child(tmp_path):
    path = tmp_path / "rows.json"
    argv = ["bench", "layers", "--table-only", "--backend", "reference", "--peers", "fake"]
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, *argv, "--repeats", "2", "--json", str(path)],
        env={**os.environ, "FAKE": "depthwise 4 hangs", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = (re.match(r"hanging (\d+)$", line) for line in process.stderr)
    child = next(int(found[1]) for found in lines if found)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == run.INTERRUPTED
    assert "fastconv: interrupted; 1 of 3 measurements are done" in err
    assert [row["who"] for row in results.read(path).rows] == [OURS, "fake"]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
