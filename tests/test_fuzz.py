"""Random layers through the door that users take: whatever the planner may choose in C is right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cases
import tolerance
from fastconv import backends, planner
from fastconv.plan import LAYOUTS

pytestmark = pytest.mark.skipif(
    backends.available()["c"] is not None, reason=str(backends.available()["c"])
)
C_BACKENDS = [b for b in cases.CPU_BACKENDS if b == "c"]
WIDE = dict(max_size=13, max_channels=37, max_kernel=5, max_stride=3, max_dilation=3)


@pytest.mark.parametrize("backend", C_BACKENDS)
@pytest.mark.parametrize("family", ["winograd", "grouped", "depthwise"])
@given(data=st.data())
def test_every_plan_that_could_be_chosen(backend, family, data):
    geometry = data.draw(cases.geometries(family=family, **WIDE))
    epilogue, layout = data.draw(cases.epilogues()), data.draw(st.sampled_from(LAYOUTS))
    found = planner.candidates(
        geometry, epilogue=epilogue, layout=layout, backend="c", tolerance=100.0
    )
    plans = [candidate.plan for candidate in found if candidate.reason is None]
    assert plans, f"nothing runs {geometry}: {[c.reason for c in found]}"
    plan = replace(data.draw(st.sampled_from(plans)), backend=backend)
    arrays = cases.arrays_for(plan)
    y = cases.execute(plan, *arrays)
    tolerance.assert_conv_close(y, plan, *arrays)


@pytest.mark.parametrize("backend", C_BACKENDS)
@pytest.mark.parametrize("family", ["grouped", "depthwise"])
@given(data=st.data())
def test_integers_are_exact_to_the_last_bit(backend, family, data):
    """Sums of small integers have no rounding: direct kernels must equal the definition."""
    geometry = data.draw(cases.geometries(family=family, **WIDE))
    layout = data.draw(st.sampled_from(LAYOUTS))
    plan = planner.plan(geometry, layout=layout, backend="c", algorithm="direct")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.integers(-8, 9, geometry.x_shape).astype("float32")
    w = rng.integers(-8, 9, geometry.w_shape).astype("float32")
    exact = replace(plan, backend="reference", dtype="float64")
    want = cases.execute(exact, x.astype("float64"), w.astype("float64"))
    assert np.array_equal(cases.execute(replace(plan, backend=backend), x, w), want)
