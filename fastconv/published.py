"""Which network of the zoo stands for which row of the papers' tables, and on which input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Options = tuple[tuple[str, Any], ...]


def given(**options: Any) -> Options:
    """Options of a builder in a form that can be a key."""
    return tuple(options.items())


@dataclass(frozen=True)
class Reading:
    """How one model of a paper is built and counted.

    network      a name of fastconv.zoo
    input_shape  (C, T, H, W) or (C, H, W); None: the network's own
    part         qualified name of the submodule that the paper counts; '': all
    options      `given` to the network's builder besides
    without      qualified name of a layer that the paper leaves out; '': none
    per_frame    one step of the network made continual, as fastconv.algorithms.step_of has it
    algorithm    of fastconv.algorithms.COMPARED; '': direct
    tile         outputs per tile in time and in space under it, ideal tiles
    """

    network: str
    input_shape: tuple[int, ...] | None = None
    part: str = ""
    options: Options = ()
    without: str = ""
    per_frame: bool = False
    algorithm: str = ""
    tile: tuple[int, int] = (1, 1)


def _by_width(model: str, network: str, *widths: str) -> dict[tuple[str, str], Reading]:
    return {
        (model, f"{width}x"): Reading(f"{network}_x{width.replace('.', '_')}") for width in widths
    }


def _resnets(depth: int) -> dict[tuple[str, str], Reading]:
    """Rows of the two papers that have 3D ResNets; one leaves the classifier out."""
    name, title = f"resnet3d_{depth}", f"ResNet-{depth}"
    return {
        (title, "shortcut A"): Reading(name),
        (title, "shortcut B"): Reading(f"{name}_b"),
        (title, "shortcut A, 400 classes"): Reading(name, options=given(num_classes=400)),
        (f"3D {title}", "shortcut A, no fc"): Reading(name, without="head.classifier"),
    }


def _continual(model: str, network: str, *pools: int) -> dict[tuple[str, str], Reading]:
    """One frame of a stream; the frames under the final pooling change no multiplications."""
    reading = Reading(network, SLOW if network == "slow_r50" else None, per_frame=True)
    return {(model, f"pool {pool}"): reading for pool in pools}


SLOW = (3, 8, 256, 256)  # what its paper counts; it is trained at 224 x 224


def _fsb_c3d(middles: str, tile: tuple[int, int] | None = None) -> Reading:
    """FSB-C3D with a reading of its middle channels, plain or under the hybrid fast algorithm."""
    options = given(clip=_UCF101[1:], middles=middles)
    algorithm = "" if tile is None else "hfa"
    return Reading("fsb_c3d", _UCF101, "trunk", options, algorithm=algorithm, tile=tile or (1, 1))


def _hybrid_c3d() -> dict[tuple[str, str], Reading]:
    return {
        ("C3D", f"FSB+hFA F({m},3) F(4x4,3x3), middle = {middles}"): _fsb_c3d(middles, (m, 4))
        for middles in ("input", "output")
        for m in (4, 6)
    } | {
        ("C3D", f"hFA over FSB-only, F({m},3) F({n}x{n},3x3), middle = input"): _fsb_c3d(
            "input", (m, n)
        )
        for m, n in ((2, 2), (4, 4), (6, 4), (6, 6))
    }


_UCF101 = (3, 64, 112, 112)
_C3D = given(clip=_UCF101[1:])
_NO_TEMPORAL = given(slow_taps=((1,),) * 4)
_STATIC = "no temporal convolutions in slow"

# By the papers' names of model and variant.
READINGS: dict[tuple[str, str], Reading] = {
    **_by_width("3D-ShuffleNetV1", "shufflenet3d_v1", "0.5", "1.0", "1.5", "2.0"),
    **_by_width("3D-ShuffleNetV2", "shufflenet3d_v2", "0.25", "1.0", "1.5", "2.0"),
    **_by_width("3D-MobileNetV1", "mobilenet3d_v1", "0.5", "1.0", "1.5", "2.0"),
    **_by_width("3D-MobileNetV2", "mobilenet3d_v2", "0.2", "0.45", "0.7", "1.0"),
    ("3D-SqueezeNet", "1.1"): Reading("squeezenet3d"),
    ("3D-SqueezeNet", "1.0x"): Reading("squeezenet3d"),
    **_resnets(18),
    **_resnets(50),
    **_resnets(101),
    ("ResNeXt-101", "shortcut B, cardinality 32"): Reading("resnext3d_101"),
    ("I3D (Inception)", "400 classes"): Reading("i3d"),
    ("I3D (Inception)", "600 classes"): Reading("i3d", options=given(num_classes=600)),
    ("D-ResNet-18", "None"): Reading("d_resnet18_none", part="trunk"),
    ("D-ResNet-18", "Summation"): Reading("d_resnet18_sum", part="trunk"),
    ("D-ResNet-18", "Concatenation"): Reading("d_resnet18", part="trunk"),
    ("D-ResNet-50", "Concatenation"): Reading("d_resnet50", part="trunk"),
    ("D-ResNet-101", "Concatenation"): Reading("d_resnet101", part="trunk"),
    ("X3D-XS", ""): Reading("x3d_xs"),
    ("X3D-S", ""): Reading("x3d_s"),
    ("X3D-M", ""): Reading("x3d_m"),
    ("X3D-L", ""): Reading("x3d_l"),
    ("I3D-R50", "8x8"): Reading("i3d_r50"),
    ("R(2+1)D-18", "8 frames"): Reading("r2plus1d_18", (3, 8, 112, 112)),
    ("R(2+1)D-18", "16 frames"): Reading("r2plus1d_18"),
    ("Slow-8x8-R50", ""): Reading("slow_r50", SLOW),
    ("SlowFast-8x8-R50", ""): Reading("slowfast_r50_8x8"),
    ("SlowFast-4x16-R50", ""): Reading("slowfast_r50_4x16"),
    ("RCU8", ""): Reading("rcn_18"),
    **_continual("CoX3D-S", "x3d_s", 13, 16, 32, 64, 96),
    **_continual("CoX3D-M", "x3d_m", 4, 16, 32, 64, 96),
    **_continual("CoX3D-L", "x3d_l", 16, 32, 64, 96),
    ("CoX3D-S", ""): Reading("x3d_s", per_frame=True),
    ("CoX3D-M", ""): Reading("x3d_m", per_frame=True),
    ("CoX3D-L", ""): Reading("x3d_l", per_frame=True),
    ("X3D-M", "clip 4"): Reading("x3d_m", (3, 4, 224, 224)),
    ("X3D-M", "clip 16"): Reading("x3d_m"),
    ("X3D-M", "clip 64"): Reading("x3d_m", (3, 64, 224, 224)),
    **_continual("CoI3D", "i3d_r50", 8, 64),
    **_continual("CoSlow", "slow_r50", 8, 64),
    ("C3D", "conv weights"): Reading("c3d", _UCF101, "trunk", _C3D),
    ("C3D", "baseline"): Reading("c3d", _UCF101, "trunk", _C3D),
    ("C3D", "3D Winograd F(4x4x4,3x3x3)"): Reading(
        "c3d", _UCF101, "trunk", _C3D, algorithm="winograd 3D", tile=(4, 4)
    ),
    ("C3D", "FSB-only, middle = input"): _fsb_c3d("input"),
    ("C3D", "FSB-only, middle = output"): _fsb_c3d("output"),
    ("C3D", "FSB-only, middle of table 4"): _fsb_c3d("table 4"),
    **_hybrid_c3d(),
    ("FSB-C3D", "Table-4 reading"): _fsb_c3d("table 4"),
    ("FSB-C3D", "middle of table 4"): _fsb_c3d("table 4"),
    ("SlowFast", "baseline"): Reading("slowfast_ucf101"),
    ("SlowFast", f"baseline, {_STATIC}"): Reading("slowfast_ucf101", options=_NO_TEMPORAL),
    ("SlowFast", "FSB-only"): Reading("slow_fsb"),
    ("SlowFast", f"FSB-only, {_STATIC}"): Reading("slow_fsb", options=_NO_TEMPORAL),
    ("SlowFast", "FSB+hFA F(4,3) F(4x4,3x3)"): Reading("slow_fsb", algorithm="hfa", tile=(4, 4)),
    ("FastTRG", ""): Reading("fast_trg"),
    ("FastTRG", _STATIC): Reading("fast_trg", options=_NO_TEMPORAL),
    ("SlowFast", "baseline, commit 251a97a"): Reading("slowfast_ucf101"),
    ("SlowFast", "baseline, commit 11d0646"): Reading("slowfast_ucf101", options=_NO_TEMPORAL),
    ("SlowFast", "baseline, 251a97a"): Reading("slowfast_ucf101"),
    ("SlowFast", "FSB-only, 251a97a"): Reading("slow_fsb"),
    ("FastTRG", "FSB slow path + TRG"): Reading("fast_trg", options=_NO_TEMPORAL),
    ("MF-Net-18 3D", "N=16, 400 classes"): Reading("mfnet3d"),
    ("MF-Net 2D", "N=16"): Reading("mfnet2d"),
    ("MF-Net 2D", "N=16 w/o multiplexer"): Reading("mfnet2d_plain"),
    ("MF-Net 2D", "N=12"): Reading("mfnet2d_n12"),
    ("MF-Net 2D", "N=24"): Reading("mfnet2d_n24"),
    ("MF-Net 2D", "N=16 w/o multiplexer, deeper & wider"): Reading("mfnet2d_deeper"),
    ("ResNet-18 (MF embedded)", ""): Reading("mf_resnet18"),
    ("MobileNet-v2 1.4 (MF embedded)", ""): Reading("mf_mobilenet_v2"),
    ("ResNeXt-26 (8x16d)", ""): Reading("resnext26"),
    ("ResNet-18", "baseline"): Reading("resnet18"),
    ("ResNet-50", "baseline"): Reading("resnet50"),
    ("MobileNet-v2 1.4", "baseline"): Reading("mobilenet_v2_x1_4"),
}

# What the published code of a network does otherwise than its modules here, which shows in counts
# made by hooking modules: see fastconv.nn.rules.Exceptions. By the beginning of a network's name.
_EXCEPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "mobilenet3d_v1": {"functional": ("*block*.act", "*head.pool")},
    "mobilenet3d_v2": {"functional": ("*head.pool",)},
    "shufflenet3d": {"functional": ("*head.pool",)},
    "i3d": {"functional": ("*.act", "*pool*", "*branch3.0", "*head.mean")},
    "i3d_r50": {},
    "slow_r50": {"pooled": ("trunk.stage2",)},
    "slowfast_r50": {"pooled": ("slow.stage2", "fast.stage2")},
    "mfnet": {"added": ("trunk.stage?.unit?",)},
    "mf_resnet18": {"added": ("trunk.stage?.unit?",)},
}


def exceptions_of(network: str) -> dict[str, tuple[str, ...]]:
    """The keywords of `fastconv.nn.rules.Exceptions` for a network of the zoo; {} for most."""
    beginnings = [key for key in _EXCEPTIONS if network.startswith(key)]
    return _EXCEPTIONS[max(beginnings, key=len)] if beginnings else {}
