"""The file of results: what tells them apart, what is ignored with a warning, and who may write."""

from __future__ import annotations

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fastconv import planner, winners
from fastconv.epilogue import Epilogue
from fastconv.errors import BackendError
from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.layouts import CONTIGUOUS
from fastconv.plan import Request
from fastconv.winners import Record
from processes import run_python

DENSE = Geometry.of((1, 4, 6, 8, 8), (4, 4, 3, 3, 3), padding=1)
REQUEST = Request.of(DENSE, backend="reference")
LABEL = "reference winograd 2x2x2"
RECORD = Record(LABEL, {LABEL: 2.0, "reference grouped": 3.0}, {}, "2026-01-01")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for results."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    winners.forget()
    yield tmp_path / "cache"
    winners.forget()


def chosen():
    return winners.label(planner.plan_of(REQUEST))


def test_a_record_survives_the_process():
    winners.keep(REQUEST, RECORD)
    winners.forget()
    assert winners.find(REQUEST) == RECORD
    assert chosen() == LABEL


def test_the_file_is_for_people_too():
    winners.keep(REQUEST, RECORD)
    text = winners.path().read_text()
    assert "conv3d 1x4x6x8x8 * 4x4x3x3x3 padding 1+1x1+1x1+1, float32, none" in text
    assert f'"winner": "{LABEL}"' in text
    assert winners.environment() in text
    assert winners.machine() in text


OTHERS = {
    "batch": replace(REQUEST, geometry=replace(DENSE, batch=2)),
    "channels": replace(REQUEST, geometry=replace(DENSE, out_channels=8)),
    "groups": replace(REQUEST, geometry=replace(DENSE, groups=2)),
    "size": replace(REQUEST, geometry=replace(DENSE, in_size=(6, 8, 9))),
    "kernel": replace(REQUEST, geometry=replace(DENSE, kernel=(3, 3, 1))),
    "stride": replace(REQUEST, geometry=replace(DENSE, stride=(1, 2, 1))),
    "padding": replace(REQUEST, geometry=replace(DENSE, padding=((1, 1), (1, 1), (1, 0)))),
    "dilation": replace(REQUEST, geometry=replace(DENSE, dilation=(1, 1, 2))),
    "axes": replace(REQUEST, geometry=Geometry.of((1, 4, 8, 8), (4, 4, 3, 3))),
    "block": replace(
        REQUEST,
        geometry=SeparableGeometry.of(
            (1, 4, 6, 8, 8), (4, 4, 3, 1, 1), (4, 1, 1, 3, 3), (4, 4, 1, 1, 1)
        ),
        epilogue=(Epilogue(),) * 3,
    ),
    "dtype": replace(REQUEST, dtype="float64"),
    "device": replace(REQUEST, device="cuda"),
    "precision": replace(REQUEST, precision="tf32"),
    "bias": replace(REQUEST, epilogue=Epilogue(bias=True)),
    "activation": replace(REQUEST, epilogue=Epilogue(activation="relu")),
    "residual": replace(REQUEST, epilogue=Epilogue(residual=True)),
    "layout": replace(REQUEST, layout=CONTIGUOUS),
    "algorithm": replace(REQUEST, algorithm="direct"),
    "backend": replace(REQUEST, backend="auto"),
    "tolerance": replace(REQUEST, tolerance=3.5),
    "tile": replace(REQUEST, tile=(2, 2, 2)),
    "continual": replace(REQUEST, continual=True),
    "workspace": replace(REQUEST, max_workspace_bytes=1 << 20),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_request_has_another_key(what):
    winners.keep(REQUEST, RECORD)
    assert winners.find(OTHERS[what]) is None


def test_every_request_has_its_own_key():
    keys = [winners.key(request) for request in (REQUEST, *OTHERS.values())]
    assert len(set(keys)) == len(keys)
    fields = set(vars(REQUEST)) - {"geometry", "epilogue"}
    assert fields - {"max_workspace_bytes"} <= OTHERS.keys(), "a new field belongs in the key"


def test_the_circumstances_are_part_of_the_key(monkeypatch):
    winners.keep(REQUEST, RECORD)
    monkeypatch.setattr(winners.costs, "threads", lambda: 57)
    assert winners.find(REQUEST) is None
    monkeypatch.undo()


def test_the_instruction_set_is_part_of_the_key():
    if planner.backends.available()["c"] is not None:
        pytest.skip("no C backend")
    from fastconv.c_kernels import launch

    here = winners.key(REQUEST)
    other = next(name for name in launch.instruction_sets() if name != launch.isa())
    with launch.forced(other):
        assert winners.key(REQUEST) != here
        assert f"C {other}" in winners.key(REQUEST)


def write(document):
    path = winners.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    winners.forget()


def good(**changes):
    """The document of one good record, changed."""
    record = {"winner": LABEL, "ms": {LABEL: 2.0}, "given_up": {}, "when": "", "noisy": False}
    record.update(changes.pop("record", {}))
    versions = changes.pop("versions", winners.environment())
    results = {versions: {winners.key(REQUEST): record}}
    return {"schema": winners.SCHEMA, "machine": winners.machine(), "results": results, **changes}


DAMAGED = {
    "empty": lambda: ("", "it is not JSON"),
    "torn": lambda: (json.dumps(good())[:-20], "it is not JSON"),
    "a list": lambda: ([1], "it is not a file of schema 1"),
    "schema": lambda: (good(schema=2), "it is not a file of schema 1"),
    "machine": lambda: (good(machine="an abacus"), "it is of another machine: 'an abacus'"),
    "versions": lambda: (good(versions="fastconv 0.0"), "its results are of other versions"),
    "results": lambda: (good(results=[1]), "it has no results"),
    "table": lambda: (good(results={winners.environment(): 3}), "it has no results"),
    "record": lambda: (
        good(results={winners.environment(): {winners.key(REQUEST): 3}}),
        "1 of its results make no sense",
    ),
    "winner without a time": lambda: (good(record={"winner": "x"}), "1 of its results make no"),
    "winner of another type": lambda: (good(record={"winner": [1]}), "1 of its results make no"),
    "times": lambda: (good(record={"ms": [2.0]}), "1 of its results make no sense"),
    "a word for a time": lambda: (good(record={"ms": {LABEL: "2"}}), "1 of its results make no"),
    "a truth for a time": lambda: (good(record={"ms": {LABEL: True}}), "1 of its results make no"),
    "no number": lambda: (good(record={"ms": {LABEL: float("nan")}}), "1 of its results make no"),
    "no flag": lambda: (good(record={"noisy": 1}), "1 of its results make no sense"),
    "no time": lambda: (good(record={"ms": {LABEL: 0}}), "1 of its results make no sense"),
    "less than no time": lambda: (good(record={"given_up": {"x": -1}}), "1 of its results make"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(damage):
    by_estimate = chosen()
    document, complaint = DAMAGED[damage]()
    write(document)
    with pytest.warns(UserWarning, match="fastconv ignores tuning results in .*: ") as caught:
        assert chosen() == by_estimate
    assert len(caught) == 1
    assert complaint in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == by_estimate


def test_bytes_that_are_no_text_are_ignored_with_a_warning():
    winners.path().parent.mkdir(parents=True)
    winners.path().write_bytes(b"\xff\xfe\x00")
    winners.forget()
    with pytest.warns(UserWarning, match="it cannot be read"):
        chosen()


@pytest.mark.parametrize("label", ["abacus winograd 2x2x2", "reference depthwise", "", "c"])
def test_a_winner_that_cannot_run_is_ignored_with_a_warning(label):
    """An unknown backend, a family that refuses the geometry, no plan at all."""
    by_estimate = chosen()
    winners.keep(REQUEST, Record(label, {label: 2.0, LABEL: 3.0}))
    with pytest.warns(UserWarning, match=f"a tuning result: {label!r} cannot run"):
        assert chosen() == by_estimate


def test_a_record_beside_a_damaged_one_is_used():
    document = good()
    document["results"][winners.environment()]["conv9d"] = {"winner": 1}
    write(document)
    with pytest.warns(UserWarning, match="1 of its results make no sense"):
        assert chosen() == LABEL


@pytest.mark.parametrize("damage", ["torn", "schema", "machine"])
def test_tuning_writes_a_damaged_file_anew(damage):
    write(DAMAGED[damage]()[0])
    with pytest.warns(UserWarning, match="the file was written anew"):
        winners.keep(REQUEST, RECORD)
    winners.forget()
    assert winners.find(REQUEST) == RECORD


def test_results_of_other_versions_stay_in_the_file():
    write(good(versions="fastconv 0.0"))
    winners.keep(REQUEST, RECORD)
    assert {*json.loads(winners.path().read_text())["results"]} == {
        "fastconv 0.0",
        winners.environment(),
    }
    winners.forget()
    assert chosen() == LABEL


def test_what_others_wrote_meanwhile_is_kept():
    other = replace(REQUEST, tolerance=3.0)
    winners.keep(REQUEST, RECORD)
    document = json.loads(winners.path().read_text())
    table = document["results"][winners.environment()]
    table[winners.key(other)] = table[winners.key(REQUEST)]
    winners.path().write_text(json.dumps(document))  # as another process does, unseen by this one
    assert winners.find(other) is None
    winners.keep(REQUEST, replace(RECORD, when="later"))
    assert winners.find(other) == RECORD
    assert winners.find(REQUEST).when == "later"


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch):
    winners.keep(REQUEST, RECORD)
    before = winners.path().read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(winners.os, "fsync", full)
    with pytest.raises(BackendError, match=r"tune: cannot write .*: No space left on device"):
        winners.keep(REQUEST, replace(RECORD, when="later"))
    assert winners.path().read_bytes() == before
    assert not list(winners.path().parent.glob("*.tmp"))


WRITER = """
from fastconv import winners
from fastconv.geometry import Geometry
from fastconv.plan import Request
for i in range(20):
    geometry = Geometry.of((1, 1, 100 + i), (1, 1, 3))
    request = Request.of(geometry, backend="reference", tolerance={who})
    winners.keep(request, winners.Record("reference grouped", {{"reference grouped": 1.0 + {who}}}))
    document = __import__("json").loads(winners.path().read_text())
print(len(winners.records()))
"""


def test_processes_that_write_at_once_lose_nothing():
    with ThreadPoolExecutor(3) as pool:
        counts = [int(n) for n in pool.map(lambda i: run_python(WRITER.format(who=i)), range(3))]
    winners.forget()
    assert len(winners.records()) == 60
    assert max(counts) == 60
    assert min(counts) >= 20
    assert not list(winners.path().parent.glob("*.tmp"))


def test_without_flock_the_file_is_still_whole(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fcntl", None)
    winners.keep(REQUEST, RECORD)
    winners.forget()
    assert winners.find(REQUEST) == RECORD


def test_clear_removes_everything():
    winners.keep(REQUEST, RECORD)
    assert chosen() == LABEL
    assert winners.clear() == 1
    assert not winners.path().exists()
    assert chosen() != LABEL
    assert winners.clear() == 0


def test_a_folder_that_cannot_be_written_is_named_before_measuring(tmp_path, monkeypatch):
    from fastconv import autotune

    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(autotune, "Trial", None)  # whoever measures fails otherwise
    with pytest.raises(BackendError, match="tune: cannot write .*; name another folder"):
        autotune.tune(DENSE, backend="reference")


@pytest.mark.skipif(os.name == "nt", reason="other folders there")
def test_the_folder(monkeypatch, tmp_path):
    assert winners.path().parent == Path(os.environ["FASTCONV_CACHE"])
    monkeypatch.delenv("FASTCONV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert winners.path().parent == tmp_path / "fastconv"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/do/not/count")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert winners.path().parent == tmp_path / "home" / ".cache" / "fastconv"


def test_nothing_is_read_before_a_plan_is_asked_for():
    winners.path().parent.mkdir(parents=True)
    winners.path().write_text("damaged")
    code = """
import warnings
warnings.simplefilter("error")
import fastconv
from fastconv import autotune, planner
try:
    fastconv.plan(fastconv.Geometry.of((1, 1, 9), (1, 1, 3)), backend="reference")
except UserWarning as warning:
    print(warning)
"""
    assert "it is not JSON" in run_python(code)
