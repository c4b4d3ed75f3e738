"""The main job on the real clip, from the command line: table, totals, and a loud failure."""

import re

import pytest

from fastconv import backends, cli
from fastconv.video import VideoError, default_clip

for package in ("torch", "av", "tqdm"):
    pytest.importorskip(package)
try:
    default_clip()
except VideoError as error:
    pytest.skip(str(error), allow_module_level=True)

ARGS = ["demo", "--network", "x3d_xs"]


@pytest.mark.parametrize(
    "backend", [b for b in ("auto", "torch") if backends.available().get(b) is None]
)
def test_both_networks_agree_on_the_real_clip(backend, capsys):
    assert cli.main([*ARGS, "--backend", backend]) == 0
    out = capsys.readouterr().out
    header, *lines = out.splitlines()
    columns = ["layer", "geometry", "algorithm", "backend", "direct", "actual", "torch ms"]
    assert header.split() == " ".join([*columns, "ours ms", "ratio"]).split()
    rows = [line for line in lines if re.search(r"\d+%", line)]
    # X3D-XS has 26 blocks of three convolutions, 4 shortcuts, 15 squeeze-excites, stem and head.
    assert len(rows) == 1 + 26 * 3 + 4 + 15 * 2 + 4
    direct, actual = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{9,}", rows[-1]))
    assert direct == 605_256_512 - 2048 * 400
    assert actual <= direct
    assert "outputs match" in out
    assert "bikes.mp4: 4 of 250 frames" in out


def test_outputs_that_differ_fail_loudly(monkeypatch, capsys):
    from fastconv import torch_ops

    right = torch_ops.Runner.__call__
    monkeypatch.setattr(torch_ops.Runner, "__call__", lambda *a: right(*a) * 1.01)
    assert cli.main([*ARGS, "--backend", "torch"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fastconv: accelerate: the error of the outputs is" in shown.err
