"""The C library as a whole: instruction sets, threads, processes, what Python and C agree on."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import cases
from fastconv import backends
from fastconv.epilogue import ACTIVATIONS
from fastconv.errors import BackendError
from fastconv.geometry import Geometry
from fastconv.plan import Plan
from processes import run_python

pytestmark = pytest.mark.skipif(
    backends.available()["c"] is not None, reason=str(backends.available()["c"])
)
CSRC = Path(__file__).parent.parent / "csrc"

# A layer large enough for several threads, computed once per process and again at will.
LAYER = """
import numpy as np
import cases
from fastconv.geometry import Geometry
from fastconv.plan import Plan
geometry = Geometry.of((2, 24, 4, 20, 20), (40, 24, 3, 3, 3), 1, 1)
plan = Plan("grouped", "c", geometry)
arrays = cases.arrays_for(plan)
y = cases.execute(plan, *arrays)
"""


def grouped_plan() -> Plan:
    return Plan("grouped", "c", Geometry.of((2, 24, 4, 20, 20), (40, 24, 3, 3, 3), 1, 1))


def test_families_and_activations_are_numbered_alike():
    from fastconv.c_kernels import launch

    enum = re.search(r"enum \{(.*?)\}", (CSRC / "families.h").read_text())
    assert enum is not None
    names = [name.strip().removeprefix("FC_").lower() for name in enum[1].split(",")]
    assert tuple(names) == launch.FAMILIES
    numbers = [getattr(launch.lib, f"FC_{name.upper()}") for name in ACTIVATIONS]
    assert numbers == list(range(len(ACTIVATIONS)))


def test_instruction_sets_are_those_of_the_cpu():
    from fastconv.c_kernels import launch

    usable = launch.instruction_sets()
    assert list(usable)[-1] == "plain"
    flags = set(backends.instruction_sets())
    assert ("avx512" in usable) == {"avx512f", "avx512bw", "avx512vl"}.issubset(flags)
    assert ("avx2" in usable) == {"avx2", "fma"}.issubset(flags)


@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_the_environment_forces_an_instruction_set(name):
    from fastconv.c_kernels import launch

    if name not in launch.instruction_sets():
        pytest.skip(f"this CPU has no {name}")
    code = "from fastconv.c_kernels import launch; print(launch.isa(), launch.lanes())"
    lanes = {"avx512": 16, "avx2": 8, "plain": 4}[name]
    assert run_python(code, FASTCONV_ISA=name) == f"{name} {lanes}"


def test_an_unknown_instruction_set_is_an_error_not_a_fallback():
    code = """
import numpy as np, fastconv
try:
    fastconv.conv1d(np.ones((1, 1, 5), "float32"), np.ones((1, 1, 3), "float32"))
except fastconv.BackendError as error:
    print(error)
"""
    out = run_python(code, FASTCONV_ISA="avx9")
    assert out.startswith("FASTCONV_ISA=avx9 cannot run here. Usable on this CPU:")


def test_forcing_refuses_what_cannot_run():
    from fastconv.c_kernels import launch

    refusal = pytest.raises(BackendError, match="instruction set 'sve' cannot run here")
    with refusal, launch.forced("sve"):
        pass


def test_what_is_packed_runs_on_its_own_instruction_set():
    plan = grouped_plan()
    x, w, *_ = cases.arrays_for(plan)
    module = backends.kernel("grouped", "c")
    from fastconv.c_kernels import launch

    for name in launch.instruction_sets():
        with launch.forced(name):
            packed, size = module.prepack(w, plan), module.workspace_size(plan)
        y = cases.laid_out(np.full(plan.geometry.y_shape, np.nan, "float32"), plan.layout)
        module.run(plan, cases.laid_out(x, plan.layout), packed, None, None, y, np.empty(size, "f"))
        assert np.isfinite(y).all()


def test_threads_follow_pytorch_and_openmp():
    code = "from fastconv.c_kernels import launch; {} print(launch.threads())"
    assert run_python(code.format(""), OMP_NUM_THREADS="3") == "3"
    if backends.available()["torch"] is None:
        with_torch = code.format("import torch; torch.set_num_threads(5);")
        assert run_python(with_torch, OMP_NUM_THREADS="3") == "5"


def test_more_threads_than_the_workspace_was_made_for():
    """The workspace of a plan may be older than the number of threads."""
    code = LAYER + (
        "from fastconv.backends import kernel\n"
        "import torch\n"
        "module, (x, w, *_) = kernel('grouped', 'c'), arrays\n"
        "torch.set_num_threads(1)\n"
        "packed, size = module.prepack(w, plan), module.workspace_size(plan)\n"
        "torch.set_num_threads(8)\n"
        "z, workspace = cases.Fenced(plan.geometry.y_shape, 'float32', plan.layout), "
        "cases.Fenced((size,))\n"
        "x = cases.laid_out(x, plan.layout)\n"
        "module.run(plan, x, packed, None, None, z.array, workspace.array)\n"
        "z.check(), workspace.check()\n"
        "print(np.array_equal(z.array, y))\n"
    )
    assert run_python(code) == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_can_go_on():
    code = LAYER + (
        "import os\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if np.array_equal(cases.execute(plan, *arrays), y) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert run_python(code) == "0"


def test_several_python_threads_at_once():
    plan = grouped_plan()
    arrays = cases.arrays_for(plan)
    want = cases.execute(plan, *arrays)
    wrong = []

    def work() -> None:
        results = (cases.execute(plan, *arrays) for _ in range(20))
        wrong.extend(y for y in results if not np.array_equal(y, want))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_interpreter_exits_while_a_thread_computes():
    code = LAYER + (
        "import threading\n"
        "def work():\n"
        "    while True:\n"
        "        cases.execute(plan, *arrays)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "import time; time.sleep(0.05)\n"
        "print('end')\n"
    )
    for _ in range(3):
        assert run_python(code) == "end"


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_register_blocks_have_the_same_rows_in_python_and_c(lanes):
    from fastconv.c_kernels import panels

    rows = re.findall(r"enum \{ (ROWS_1 = .*?) \};", (CSRC / "gemm.h").read_text())
    found = tuple(int(n) for n in re.findall(r"= (\d+)", rows[[16, 8, 4].index(lanes)]))
    assert panels._BLOCK_ROWS[lanes][1:] == found
