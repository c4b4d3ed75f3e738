"""The rules of published tables give what the tables print, to the digit."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from fastconv.count_table import RULES as OFFERED
from fastconv.errors import UnsupportedError
from fastconv.nn.rules import RULES, Exceptions, calls, operations, step_operations
from fastconv.published import READINGS, exceptions_of
from fastconv.targets import of_reading
from fastconv.zoo import NETWORKS

with (Path(__file__).parent / "data" / "oracle.csv").open(newline="", encoding="utf-8") as file:
    ROWS = [
        row
        for row in csv.DictReader(file)
        if (row["model"], row["variant"]) in READINGS and row["quantity"].startswith("flops")
    ]
# By paper: table 8 of 003 and all of 000 with one tool in two versions, 001 and 004 with others.
OF_PAPER = {"003": "thop", "000": "thop", "001": "ptflops", "004": "mfnet"}


def ours(row):
    reading = READINGS[row["model"], row["variant"]]
    target = of_reading(reading)
    if reading.per_frame:
        counted = step_operations(calls(target.model, target.x), target.exceptions)
        return sum(number for _, number in counted) + longer_pool(row)
    rule = "thop-2019" if row["quantity"].endswith("2019") else OF_PAPER[row["paper"]]
    counted = operations(calls(target.model, target.x), rule, target.exceptions)
    return sum(number for _, number in counted)


def longer_pool(row):
    """Table 3 adds the channels of X3D's head for every frame that its pooling has more."""
    if not row["model"].startswith("CoX3D"):
        return 0
    frames = NETWORKS[READINGS[row["model"], row["variant"]].network].input_shape[1]
    return 432 * (int(row["variant"].removeprefix("pool ")) - frames)


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{r['model']} {r['variant']} {r['quantity']}" for r in ROWS]
)
def test_printed_operations_come_out(row):
    value, measured = ours(row), row["measured_from_original_code"]
    if measured:
        assert value == int(measured)
    else:
        assert f"{round(value / 1e6)}M" == row["printed"]


def test_the_rules_offered_are_those_there_are():
    assert tuple(RULES) == OFFERED


CLIP = torch.zeros(1, 2, 4, 8, 8)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, stride=(1, 2, 2), padding=1)
        self.bn = nn.BatchNorm3d(4)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool3d(2)
        self.average = nn.AvgPool3d((1, 2, 2))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        y = self.average(self.pool(self.relu(self.bn(self.conv(x)))))
        return self.last(y.mean((2, 3, 4)))


BY_HAND = {
    "thop": {
        "conv": 4 * 4 * 4 * 4 * (54 + 1),
        "bn": 2 * 256,
        "relu": 256,
        "pool": 32 * 1,
        "average": 8 * 4,
        "last": 3 * 7,
    },
    "thop-2019": {
        "conv": 4 * 4 * 2 * 2 * (54 + 1),
        "bn": 2 * 256,
        "relu": 256,
        "pool": 32 * 1,
        "average": 8 * 4,
        "last": 3 * 7,
    },
    "ptflops": {
        "conv": 4 * 4 * 4 * 4 * (54 + 1),
        "bn": 2 * 256,
        "relu": 256,
        "pool": 256,
        "average": 32,
        "last": 12 + 3,
    },
    "mfnet": {"conv": 4 * 4 * 4 * 4 * 54, "last": 12},
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_by_hand(rule):
    counted = operations(calls(Small(), CLIP), rule)
    assert {call.name: number for call, number in counted} == BY_HAND[rule]
    layers = [call.name for call, _ in counted if call.is_layer]
    assert layers == ["conv", "last"]


def test_exceptions_leave_out_and_add():
    seen = calls(Small(), CLIP)
    hidden = Exceptions(functional=("re*",), pooled=("pool",))
    counted = {call.name: number for call, number in operations(seen, "ptflops", hidden)}
    assert "relu" not in counted
    assert counted["pool"] == 2 * BY_HAND["ptflops"]["pool"]
    added = Exceptions(added=("bn",))
    counted = operations(seen, "mfnet", added)
    assert {call.name: number for call, number in counted}["bn"] == 256


def test_a_step_is_counted_per_frame():
    of_clip = operations(calls(Small(), CLIP), "ptflops")
    of_step = step_operations(calls(Small(), CLIP))
    for (call, clip), (_, step) in zip(of_clip, of_step, strict=True):
        want = {"bn": clip // 4 * 2, "relu": clip // 4 * 2, "last": 5}
        frames = call.x_shape[2] if call.name in ("pool", "average") else 4
        assert step == want.get(call.name, clip // frames), call.name


def test_a_model_comes_back_as_it_was():
    model = Small().train()
    model.bn.eval()
    before = {name: module.training for name, module in model.named_modules()}
    calls(model, CLIP)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        calls(model, torch.zeros(1, 3, 4, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_rule_is_told():
    with pytest.raises(UnsupportedError) as caught:
        operations([], "flops")
    assert str(caught.value) == (
        "count: unknown rule 'flops'. Known: thop, thop-2019, ptflops, mfnet"
    )


def test_exceptions_are_of_networks_there_are():
    for name in NETWORKS:
        assert set(exceptions_of(name)) <= {"functional", "pooled", "added"}
    assert exceptions_of("i3d_r50") == {}
    assert exceptions_of("i3d")["functional"]
    assert exceptions_of("nothing") == {}
