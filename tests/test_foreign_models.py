"""Builders of other libraries go through `accelerate`, and what is peculiar to them in plain torch.

torchvision and pytorchvideo may be missing; the plain models are always there.
"""

from __future__ import annotations

import importlib
import sys

import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from models import close, randomized, run  # noqa: E402

nn, F = torch.nn, torch.nn.functional
# Of the libraries, when they are imported and when they build.
pytestmark = pytest.mark.filterwarnings("ignore")
_declared: list[torch.library.Library] = []


def foreign(name: str):
    """A module of another library; the test is skipped where that is not installed.

    A torchvision built for another PyTorch lacks operators for boxes, which no network here runs:
    they are declared.
    """
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


@pytest.fixture(scope="module", autouse=True)
def boxes():
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # operators live as long as this does


def clip(*size: int) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def check(model: nn.Module, *args):
    """The accelerated model's output is the model's own; every convolution has a plan."""
    model = randomized(model)
    new, report = fastconv.accelerate(model, args, check=False)  # float64 takes PyTorch long
    assert report.traced
    assert report.layers
    assert all(layer.plan is not None for layer in report.layers)
    close(run(new, *fresh(args)), run(model, *fresh(args)))
    other = torch.utils._pytree.tree_map(lambda x: x.flip(-1), args)
    close(run(new, *fresh(other)), run(model, *fresh(other)))


def fresh(args):
    """In lists of their own: some models write those that they are given."""
    return torch.utils._pytree.tree_map(lambda x: x, args)


TORCHVISION = {  # frames and pixels
    "r3d_18": (8, 48),
    "mc3_18": (8, 48),
    "r2plus1d_18": (8, 48),
    "s3d": (14, 224),  # the least that its last pooling takes
    "swin3d_t": (4, 48),
    "swin3d_s": (4, 48),
    "swin3d_b": (4, 48),
}
MVIT = ("mvit_v1_b", "mvit_v2_s")  # which take 16 x 224 x 224 alone: here as small ones


def test_torchvision_has_no_other_builders():
    models = foreign("torchvision.models")
    assert {*models.list_models(module=models.video)} == {*TORCHVISION, *MVIT}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    video = foreign("torchvision.models.video")
    frames, pixels = TORCHVISION[name]
    torch.manual_seed(0)
    check(getattr(video, name)(weights=None), clip(frames, pixels, pixels))


@pytest.mark.parametrize("name", MVIT)
def test_torchvisions_mvit(name):
    mvit = foreign("torchvision.models.video.mvit")
    second = name == "mvit_v2_s"
    width, query = (96, [3, 3, 3]) if second else (192, [])  # v1 widens behind its attention
    blocks = [
        mvit.MSBlockConfig(1, 96, width, query, [3, 3, 3], query and [1, 1, 1], [1, 4, 4]),
        mvit.MSBlockConfig(2, width, 192, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
    ]
    options = {"residual_pool": second, "residual_with_cls_embed": not second}
    options |= {"rel_pos_embed": second, "proj_after_attn": second}
    torch.manual_seed(0)
    check(mvit.MViT((64, 64), 4, blocks, **options), clip(4, 64, 64))


# The hub's configurations, with heads for few pixels.
ONES = ((1, 1, 1),) * 4
PYTORCHVIDEO = {
    "slow_r50": (
        "resnet.create_resnet",
        {"stem_conv_kernel_size": (1, 7, 7), "head_pool_kernel_size": (4, 2, 2)},
        (4, 64, 64),
    ),
    "c2d_r50": (
        "resnet.create_resnet",
        {
            "stem_conv_kernel_size": (1, 7, 7),
            "stage1_pool": nn.MaxPool3d,
            "stage_conv_a_kernel_size": ONES,
            "head_pool_kernel_size": (2, 2, 2),
        },
        (4, 64, 64),
    ),
    "i3d_r50": (
        "resnet.create_resnet",
        {
            "stem_conv_kernel_size": (5, 7, 7),
            "stage1_pool": nn.MaxPool3d,
            "stage_conv_a_kernel_size": (
                (3, 1, 1),
                [(3, 1, 1), (1, 1, 1)],
                [(3, 1, 1), (1, 1, 1)],
                [(1, 1, 1), (3, 1, 1)],
            ),
            "head_pool_kernel_size": (2, 2, 2),
        },
        (4, 64, 64),
    ),
    "csn_r50": ("csn.create_csn", {"head_pool_kernel_size": (1, 2, 2)}, (8, 64, 64)),
    "r2plus1d_r50": (
        "r2plus1d.create_r2plus1d",
        {"head_pool_kernel_size": (1, 2, 2), "head_activation": None},
        (4, 64, 64),
    ),
    "x3d": (
        "x3d.create_x3d",
        {"input_clip_length": 4, "input_crop_size": 64, "head_activation": None},
        (4, 64, 64),
    ),
    "x3d_xs": ("hub.x3d_xs", {"head_activation": None}, (4, 160, 160)),
    "efficient_x3d_xs": ("hub.efficient_x3d_xs", {}, (4, 160, 160)),
    "mvit": (
        "vision_transformers.create_multiscale_vision_transformers",
        {
            "spatial_size": 64,
            "temporal_size": 4,
            "depth": 3,
            "embed_dim_mul": [[1, 2.0]],
            "atten_head_mul": [[1, 2.0]],
            "pool_q_stride_size": [[1, 1, 2, 2]],
            "pool_kv_stride_adaptive": [1, 4, 4],
            "pool_kvq_kernel": [3, 3, 3],
        },
        (4, 64, 64),
    ),
}


@pytest.mark.parametrize("name", PYTORCHVIDEO)
def test_pytorchvideo(name):
    path, options, size = PYTORCHVIDEO[name]
    module, _, builder = path.rpartition(".")
    torch.manual_seed(0)
    check(getattr(foreign(f"pytorchvideo.models.{module}"), builder)(**options), clip(*size))


def test_pytorchvideos_slowfast():
    """Two clips in a list, which the model writes."""
    slowfast = foreign("pytorchvideo.models.slowfast")
    torch.manual_seed(0)
    model = slowfast.create_slowfast(head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2)))
    check(model, [clip(2, 64, 64), clip(8, 64, 64)])


class TwoPathways(nn.Module):
    """Slow and fast: a strided convolution in time joins them; the list that comes is written."""

    def __init__(self):
        super().__init__()
        self.stems = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(3, c, (t, 5, 5), (1, 2, 2), (t // 2, 2, 2), bias=False),
                nn.BatchNorm3d(c),
                nn.ReLU(inplace=True),
            )
            for c, t in ((16, 1), (4, 5))
        )
        self.lateral = nn.Conv3d(4, 8, (5, 1, 1), (4, 1, 1), (2, 0, 0))
        self.blocks = nn.ModuleList(nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0)) for c in (24, 4))
        self.head = nn.Linear(28, 5)

    def forward(self, clips):
        for i, stem in enumerate(self.stems):
            clips[i] = stem(clips[i])
        clips[0] = torch.cat([clips[0], self.lateral(clips[1])], 1)
        for i, block in enumerate(self.blocks):
            clips[i] = clips[i] + block(clips[i])
        return self.head(torch.cat([x.mean((2, 3, 4)) for x in clips], 1))


class PooledAttention(nn.Module):
    """Tokens become a volume for a depthwise convolution, and tokens again (MViT)."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.patches = nn.Conv3d(3, width, (3, 7, 7), (2, 4, 4), (1, 3, 3))
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        options = {"padding": 1, "groups": width // heads, "bias": False}
        self.pool_q = nn.Conv3d(width // heads, width // heads, 3, **options)
        self.pool_k = nn.Conv3d(width // heads, width // heads, 3, stride=(1, 2, 2), **options)
        self.pool_v = nn.Conv3d(width // heads, width // heads, 3, stride=(1, 2, 2), **options)
        self.project, self.heads = nn.Linear(width, 5), heads

    def forward(self, x):
        x = self.patches(x)
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        n, count, width = tokens.shape
        q, k, v = self.qkv(self.norm(tokens)).reshape(n, count, 3, self.heads, -1).unbind(2)

        def pooled(t, pool):
            volume = t.permute(0, 2, 3, 1).reshape(n * self.heads, -1, *size)
            return pool(volume).reshape(n, self.heads, width // self.heads, -1).transpose(2, 3)

        q, k, v = pooled(q, self.pool_q), pooled(k, self.pool_k), pooled(v, self.pool_v)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, count, width)
        return self.project((tokens + y).mean(1))


@pytest.mark.parametrize("form", [list, tuple, dict])
def test_two_pathways(form):
    torch.manual_seed(0)
    model = TwoPathways()
    slow, fast = clip(2, 24, 28), clip(8, 24, 28)
    if form is list:
        check(model, [slow, fast])
        return

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, clips):
            return self.model(list(clips.values() if isinstance(clips, dict) else clips))

    check(Wrapped(), {"slow": slow, "fast": fast} if form is dict else (slow, fast))


def test_a_list_of_a_caller_is_not_written():
    torch.manual_seed(0)
    model = randomized(TwoPathways())
    clips = [clip(2, 24, 28), clip(8, 24, 28)]
    before = list(clips)
    new, report = fastconv.accelerate(model, (clips,))
    assert report.traced
    run(new, clips)
    assert all(a is b for a, b in zip(clips, before, strict=True))
    assert len(clips) == 2


def test_pooled_attention():
    torch.manual_seed(0)
    check(PooledAttention(), clip(4, 24, 28))
