"""What a plan should cost on a GPU: a model of an H200-class chip, used only to rank candidates.

Time is the longer of multiplying and of moving memory, plus what nothing hides: further passes over
memory, and the start of each kernel. The constants were fitted to times on an H200, of `bench gpu`
and of single kernels; on other chips all of them change together and the ranking holds. Where it
does not, `tune` measures.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from .counts import ELEMENT_BYTES, of_plan
from .epilogue import Epilogue
from .geometry import Geometry, SeparableGeometry
from .plan import CHANNELS_LAST, Plan

START_MS = 0.003  # of one kernel
BYTES = 4000.0  # per nanosecond, read and written
PEAK = {"ieee": 21700.0, "tf32": 190e3, "float16": 360e3, "bfloat16": 360e3, "float64": 10e3}
# PyTorch's depthwise kernel takes a thread per output, whatever the taps, and knows one layout; the
# other is copied.
TORCH_DEPTHWISE_OUTPUTS, TORCH_LAYOUT_BYTES = 52.0, 200.0
# cuDNN wastes most of its tiles on small groups: multiplications per input channel of a group.
TORCH_GROUP = {"ieee": 330.0, "tf32": 650.0, "float16": 1000.0, "bfloat16": 1000.0}
FEW_CHANNELS = 128  # below as many output channels, or where they are no multiple, tiles are padded
MEMORY_SHARE = 0.8  # of the copy's speed that PyTorch's element-wise and pointwise kernels reach


def estimate_ms(plan: Plan) -> float:
    """Expected time of one run in milliseconds."""
    if plan.backend == "torch":
        return _torch(plan)
    return _OURS[plan.family](plan)


def precision(plan: Plan) -> str:
    """What is multiplied: 'ieee' or 'tf32' for float32, else the dtype."""
    return plan.precision if plan.dtype == "float32" else plan.dtype


def moved_bytes(plan: Plan) -> float:
    """Bytes of weights and activations, each once; input that strides skip is not moved."""
    counts, geometry = of_plan(plan), plan.geometry
    skipped = 0.0
    if isinstance(geometry, Geometry):
        read = prod(min(1.0, k / s) for k, s in zip(geometry.kernel, geometry.stride, strict=True))
        skipped = (1 - read) * prod(geometry.x_shape) * ELEMENT_BYTES[plan.dtype]
    return counts.weight_bytes + counts.activation_bytes - skipped


def _torch(plan: Plan) -> float:
    """PyTorch: one kernel, then one more pass for each part of the epilogue but the bias."""
    geometry = plan.geometry
    if isinstance(geometry, SeparableGeometry):
        return sum(map(_torch, stages(plan)))
    assert isinstance(plan.epilogue, Epilogue)
    moved = moved_bytes(plan)
    y_bytes = prod(geometry.y_shape) * ELEMENT_BYTES[plan.dtype]
    memory = moved / (MEMORY_SHARE * BYTES)
    copies = 0.0
    if geometry.is_depthwise and geometry.groups > 1:
        compute = prod(geometry.y_shape) / TORCH_DEPTHWISE_OUTPUTS
        if plan.layout == CHANNELS_LAST:
            copies = moved / TORCH_LAYOUT_BYTES
    elif geometry.groups > 1:
        group = geometry.in_channels // geometry.groups
        rate = min(PEAK[precision(plan)], TORCH_GROUP.get(precision(plan), 350.0) * group)
        compute = geometry.macs / rate
    else:
        compute = geometry.macs / (PEAK[precision(plan)] * tile_share(geometry.out_channels))
    kernels, passes = 1, 0
    if plan.family == "continual":  # the window is put together first
        kernels, copies = 5, copies + 3 * moved / BYTES
    if plan.epilogue.residual:
        kernels, passes = kernels + 1, passes + 3
    if plan.epilogue.activation != "none":
        kernels, passes = kernels + 1, passes + 2
    extra = passes * y_bytes / (MEMORY_SHARE * BYTES)
    return (max(compute, memory) + copies + extra) / 1e6 + kernels * START_MS


def tile_share(channels: int) -> float:
    """How much of the tiles of a matrix product is used, in the direction of output channels."""
    padded = -(-channels // 32) * 32 if channels < FEW_CHANNELS else -(-channels // 128) * 128
    return max(0.25, min(1.0, padded / FEW_CHANNELS)) * channels / padded


def stages(plan: Plan) -> list[Plan]:
    """The three convolutions of a separable block, each as a plan of its own."""
    assert isinstance(plan.geometry, SeparableGeometry)
    assert isinstance(plan.epilogue, tuple)
    families = ("grouped", "depthwise", "grouped")
    parts = zip(families, plan.geometry.stages, plan.epilogue, strict=True)
    return [
        replace(plan, family=family, geometry=stage, epilogue=epilogue, transforms=())
        for family, stage, epilogue in parts
    ]


# Ours. Multiplications per nanosecond where arithmetic decides, and the share of the copy's speed
# where memory does.
DEPTHWISE, DEPTHWISE_SHARE = 6.5e3, 0.75
GROUPED = {"ieee": 8.5e3, "tf32": 9e3, "float16": 8e3, "bfloat16": 8e3}
DENSE = {"ieee": 17e3, "tf32": 60e3, "float16": 150e3, "bfloat16": 150e3}
DENSE_SHARE = 0.75
# The temporal stage of a block, by its tile: transforms take registers from the products.
TEMPORAL = {
    "ieee": {1: 36e3, 2: 17e3, 4: 11e3},
    "tf32": {1: 60e3, 2: 30e3, 4: 25e3},
    "float16": {1: 150e3, 2: 39e3, 4: 38e3},
    "bfloat16": {1: 150e3, 2: 39e3, 4: 38e3},
}
POINTWISE = {"ieee": 16e3, "tf32": 25e3, "float16": 32e3, "bfloat16": 32e3}  # and depthwise in it


def _depthwise(plan: Plan) -> float:
    compute = plan.geometry.macs / DEPTHWISE
    return max(compute, moved_bytes(plan) / (DEPTHWISE_SHARE * BYTES)) / 1e6 + START_MS


def _grouped(plan: Plan) -> float:
    geometry = plan.geometry
    assert isinstance(geometry, Geometry)
    rates = GROUPED if geometry.groups > 1 else DENSE
    share = 1.0 if geometry.groups > 1 else tile_share(geometry.out_channels)
    compute = geometry.macs / (rates[precision(plan)] * share)
    return max(compute, moved_bytes(plan) / (DENSE_SHARE * BYTES)) / 1e6 + START_MS


def _winograd(plan: Plan) -> float:
    """The kernels' own estimate, which knows their blocks."""
    from .triton_kernels import winograd_cost

    return winograd_cost.estimate_ms(plan)


def _hfa(plan: Plan) -> float:
    """Two kernels: the temporal stage, then depthwise and pointwise together."""
    temporal, _, pointwise = stages(plan)
    time = plan.transforms[0]
    saving = time.m * time.r / time.alpha
    rates = TEMPORAL[precision(plan)]
    products = temporal.geometry.macs / saving / rates[max(m for m in rates if m <= time.m)]
    products += pointwise.geometry.macs / POINTWISE[precision(plan)]
    y_bytes = [prod(s.geometry.y_shape) * ELEMENT_BYTES[plan.dtype] for s in (temporal, pointwise)]
    moved = moved_bytes(temporal) + y_bytes[0] + y_bytes[1]
    return max(products, moved / (DENSE_SHARE * BYTES)) / 1e6 + 2 * START_MS


def _continual(plan: Plan) -> float:
    """A step of its window's family, and the frame kept in a kernel of its own."""
    geometry = plan.geometry
    assert isinstance(geometry, Geometry)
    own = _depthwise if geometry.is_depthwise and geometry.groups > 1 else _grouped
    return own(plan) + START_MS


_OURS = {
    "depthwise": _depthwise,
    "grouped": _grouped,
    "winograd": _winograd,
    "hfa": _hfa,
    "continual": _continual,
}
