"""Continual modules: a stream has the columns of its clip, in every start mode; slots are alone."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastconv.errors import GeometryError, UnsupportedError  # noqa: E402  (after the skip)
from fastconv.nn import (  # noqa: E402
    Concat,
    ContinualAvgPool1d,
    ContinualAvgPool3d,
    ContinualConv1d,
    ContinualConv2d,
    ContinualConv3d,
    ContinualGRU,
    ContinualLSTM,
    ContinualMaxPool3d,
    Delay,
    GlobalPool,
    Residual,
    Sequential,
    SqueezeExcite,
)
from fastconv.nn.continual import momentum, set_momentum  # noqa: E402
from processes import run_python  # noqa: E402

nn = torch.nn
STARTS = ("wait", "zeros", "replicate")


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_statistics(module):
    """Eval mode, and batch norms that do something."""
    generator = torch.Generator().manual_seed(7)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            part.weight.data.uniform_(0.5, 2, generator=generator)
            part.bias.data.normal_(generator=generator)
    return module.eval()


def block(**options):
    """Branches of unequal depth, strides, batch norm, every pooling."""
    torch.manual_seed(0)
    strided = Residual(
        nn.Sequential(nn.Conv3d(8, 8, 3, 2, 1), nn.BatchNorm3d(8)),
        nn.Conv3d(8, 8, 1, 2),
        nn.SiLU(),
    )
    branches = Concat(
        nn.Conv3d(8, 3, (5, 1, 1), padding=(2, 0, 0), dilation=(1, 1, 1)),
        nn.AvgPool3d(3, 1, 1),
        Delay(0),
    )
    gate = nn.Sequential(nn.Conv3d(19, 19, 1), nn.Sigmoid())
    return with_statistics(
        Sequential(
            nn.Conv3d(4, 8, 3, padding=1),
            nn.ReLU(),
            strided,
            nn.MaxPool3d((3, 2, 2), (1, 2, 2), (1, 0, 0)),
            branches,
            SqueezeExcite(gate, 2),
            GlobalPool(3),
            nn.Flatten(),
            nn.Linear(19, 5),
            **options,
        )
    )


def seeded(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options).eval()


def headed(head, **options):
    """A convolution and a recurrent layer, the same weights every time."""
    module = Sequential(nn.Conv1d(4, 8, 3), head, **options).eval()
    for i, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=i) / 3
    return module


# The module, the shape of a clip.
MODULES = {
    "conv3d": (lambda **o: seeded(ContinualConv3d, 4, 6, 3, padding=1, **o), (2, 4, 9, 6, 7)),
    "conv3d_strided": (
        lambda **o: seeded(ContinualConv3d, 4, 8, 3, stride=(2, 1, 2), padding=(1, 1, 1), **o),
        (2, 4, 12, 6, 7),
    ),
    "conv3d_dilated_grouped": (
        lambda **o: seeded(
            ContinualConv3d, 4, 8, 3, padding=(2, 1, 1), dilation=(2, 1, 1), groups=4, **o
        ),
        (2, 4, 12, 6, 7),
    ),
    "conv3d_same": (
        lambda **o: seeded(ContinualConv3d, 4, 6, 3, padding="same", **o),
        (1, 4, 9, 5, 5),
    ),
    "conv2d": (lambda **o: seeded(ContinualConv2d, 4, 6, (4, 3), **o), (2, 4, 9, 7)),
    "conv1d": (lambda **o: seeded(ContinualConv1d, 4, 6, 3, dilation=2, **o), (2, 4, 9)),
    "average": (lambda **o: seeded(ContinualAvgPool3d, 3, 2, 1, **o), (2, 4, 9, 6, 7)),
    "average1d": (lambda **o: seeded(ContinualAvgPool1d, 4, 1, **o), (2, 4, 9)),
    "largest": (
        lambda **o: seeded(ContinualMaxPool3d, 3, (1, 2, 2), 1, **o),
        (2, 4, 9, 6, 7),
    ),
    "global": (lambda **o: seeded(GlobalPool, 4, "max", **o), (2, 4, 9, 6, 7)),
    "delay": (lambda **o: seeded(Delay, 3, **o), (2, 4, 9, 6, 7)),
    "lstm": (lambda **o: headed(ContinualLSTM(8, 6, 2), **o), (2, 4, 9)),
    "gru": (lambda **o: headed(ContinualGRU(8, 6, batch_first=True), **o), (2, 4, 9)),
    "block": (block, (2, 4, 36, 12, 12)),
}
modules = pytest.mark.parametrize("name", MODULES)
starts = pytest.mark.parametrize("start", STARTS)


def made(name, start="wait"):
    make, shape = MODULES[name]
    return make(start=start), noise(*shape)


@modules
@starts
def test_a_stream_has_the_columns_of_its_clip(name, start):
    module, clip = made(name, start)
    want = module(clip)
    step = module.forward_steps(clip)
    assert step.ready.all()
    assert torch.equal(step.output, want)
    columns = -(-(clip.shape[2] - module.warm_up) // module.rate)
    if start != "replicate" or module.rate == 1:
        assert want.shape[2] == columns
    assert module.seen == (clip.shape[2],) * clip.shape[0]


@modules
@starts
@pytest.mark.parametrize("chunks", [(1, 1, 1), (3, 5)])
def test_chunks_do_not_matter(name, start, chunks):
    module, clip = made(name, start)
    want, got, at = module(clip), [], 0
    for count in (*chunks, clip.shape[2] - sum(chunks)):
        got.append(module.forward_steps(clip[:, :, at : at + count]).output)
        at += count
    assert torch.equal(torch.cat(got, dim=2), want)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"lstm", "gru"}))  # no end of memory
def test_replicate_is_a_stream_that_had_its_first_frame_for_ever(name):
    module, clip = made(name, "replicate")
    waits = MODULES[name][0](start="wait")
    copies = -(-module.receptive_field // module.rate) * module.rate
    for _ in range(copies):
        waits.forward_step(clip[:, :, 0])
    for t, frame in enumerate(clip.unbind(2)):
        got, want = module.forward_step(frame), waits.forward_step(frame)
        assert got.ready.all() == (want.ready.all() or t == 0)
        if want.ready.all():
            assert torch.equal(got.output, want.output)


@pytest.mark.parametrize("name", ["conv3d", "conv3d_strided", "conv3d_dilated_grouped", "conv1d"])
def test_convolutions_are_pytorchs(name):
    """The clip network with its padding gives the columns of 'zeros', without it of 'wait'."""
    for start in ("zeros", "wait"):
        module, clip = made(name, start)
        kind = next(c for c in type(module).__mro__ if c.__module__ == "torch.nn.modules.conv")
        want = kind.forward(module, clip)
        first = module.clock.begin
        got = module(clip)
        torch.testing.assert_close(got, want[:, :, first : first + got.shape[2]])


@pytest.mark.parametrize("name", ["average", "average1d", "largest"])
def test_poolings_are_pytorchs(name):
    for start in ("zeros", "wait"):
        module, clip = made(name, start)
        kind = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))
        want, got = kind.forward(module, clip), module(clip)
        first = module.clock.begin
        torch.testing.assert_close(got, want[:, :, first : first + got.shape[2]])


@pytest.mark.parametrize("depths", [(1, 0), (2, 0), (0, 2), (3, 1), (1, 3)])
def test_residuals_of_any_depth_align(depths):
    """Against PyTorch: with temporal padding every branch keeps its columns in place."""

    def branch(depth):
        return nn.Sequential(*(nn.Conv3d(4, 4, 3, padding=1) for _ in range(depth)))

    torch.manual_seed(0)
    long, short = map(branch, depths)
    module = Residual(long, short, nn.ReLU(), start="zeros").eval()
    clip = noise(1, 4, 12, 5, 6)
    want = torch.relu(long(clip) + short(clip)).detach()
    got = module.forward_steps(clip).output
    assert module.delay == max(depths)
    torch.testing.assert_close(got, want[:, :, : 12 - module.delay])


def test_timing_is_that_of_the_layers():
    module = block()
    # 3 taps; strided 3 taps at rate 1; then rate 2: 3 taps, 5 taps, squeeze of 2, window of 3
    assert module.rate == 2
    assert module.receptive_field == 1 + 2 + 2 + 2 * (2 + 4) + 2 * 1 + 2 * 2
    assert module.receptive_field == module.delay + module.padding + 1
    assert ContinualConv3d(1, 1, 3, padding=1).delay == 1
    assert ContinualConv3d(1, 1, 3).delay == 2
    assert Delay(3).delay == 3


def test_warm_up_is_told_and_holds_zeros():
    module, clip = made("conv3d", "wait")
    assert module.warm_up == 2
    for t in range(4):
        output, ready = module.forward_step(clip[:, :, t])
        assert output.shape == (2, 6, 6, 7)
        assert ready.tolist() == [t >= 2] * 2
        assert (t >= 2) or not output.any()
    empty = made("conv3d")[0].forward_steps(clip[:, :, :2])
    assert empty.output.shape == (2, 6, 0, 6, 7)
    assert empty.ready.shape == (2, 0)


@modules
@starts
def test_slots_are_alone(name, start):
    """Two streams, the second of which stalls, ends and begins anew, beside NaN."""
    module, clip = made(name, start)
    one, other = (MODULES[name][0](start=start) for _ in range(2))
    # PyTorch's matrix products round differently in batches of another size.
    products = name in ("lstm", "gru", "block")
    equal = torch.testing.assert_close if products else assert_equal
    if clip.shape[0] == 1:
        clip = torch.cat([clip, noise(*clip.shape, seed=2)])
    for t in range(clip.shape[2]):
        stalls = t % 3 == 1
        frame = clip[:, :, t].clone()
        if stalls:
            frame[1] = float("nan")
        if t == 5:
            module.reset(1)
            other.stop()
        got = module.forward_step(frame, [True, not stalls])
        want = one.forward_step(clip[:1, :, t])
        assert got.ready[0] == want.ready[0]
        equal(got.output[:1], want.output)
        if stalls:
            assert not got.ready[1]
            assert not got.output[1].any()
        else:
            want = other.forward_step(clip[1:, :, t])
            assert got.ready[1] == want.ready[0]
            equal(got.output[1:], want.output)


def assert_equal(a, b):
    assert torch.equal(a, b)


def states(module):
    return {
        (name, key): tensor.clone()
        for name, _, state in module.named_states()
        for key, tensor in state.items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@modules
@starts
def test_a_look_ahead_and_a_failed_call_change_nothing(name, start):
    module, clip = made(name, start)
    for t in range(4):
        before = states(module) if t else None
        seen = module.seen
        ahead = module.forward_step(clip[:, :, t], update_state=False)
        if before is not None:
            assert same(states(module), before)
            assert module.seen == seen
            for wrong in (clip[:, :2, t], clip[:, :, t].double(), clip[:1, :, t, None]):
                with pytest.raises(GeometryError, match="forward_step"):
                    module.forward_step(wrong)
            with pytest.raises(GeometryError, match="active must be"):
                module.forward_step(clip[:, :, t], [True] * 3)
            assert same(states(module), before)
        step = module.forward_step(clip[:, :, t])
        assert torch.equal(step.output, ahead.output)
        assert torch.equal(step.ready, ahead.ready)


def test_a_step_that_breaks_off_is_not_continued():
    module, clip = made("block")
    module.forward_steps(clip[:, :, :30])
    linear = module.get_submodule("8")
    linear.weight, kept = None, linear.weight
    with pytest.raises(TypeError):
        module.forward_step(clip[:, :, 30])
    linear.weight = kept
    with pytest.raises(UnsupportedError, match="broke off"):
        module.forward_step(clip[:, :, 30])
    module.reset()
    assert torch.equal(module.forward_steps(clip).output, module(clip))


@modules
def test_slots_are_saved_restored_and_copied(name):
    module, clip = made(name, "zeros")
    if clip.shape[0] == 1:
        clip = torch.cat([clip, noise(*clip.shape, seed=2)])
    module.forward_steps(clip[:, :, :4])
    saved = module.save(0)
    want = [module.forward_step(clip[:, :, t]).output[0] for t in range(4, 7)]
    module.restore(1, saved)
    got = [module.forward_step(clip[[1, 0], :, t]).output[1] for t in range(4, 7)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    module.copy(1, 0)
    step = module.forward_step(clip[:1, :, 7].expand_as(clip[:, :, 7]).contiguous())
    torch.testing.assert_close(step.output[0], step.output[1])
    with pytest.raises(GeometryError, match="slot must be from 0 to 1"):
        module.save(2)
    other, frames = made("conv2d" if name != "conv2d" else "conv1d")
    other.start(frames[:, :, 0])
    with pytest.raises(GeometryError, match="another network"):
        other.restore(0, saved)


def test_a_slot_survives_its_process(tmp_path):
    code = f"""
import torch, test_nn_continual as t
module, clip = t.made("block", "zeros")
module.forward_steps(clip[:, :, :20])
torch.save(module.save(1), {str(tmp_path / "slot.pt")!r})
"""
    run_python(code)
    module, clip = made("block", "zeros")
    want = module.forward_steps(clip).output
    module.reset()
    module.start(clip[:, :, 0])
    module.restore(0, torch.load(tmp_path / "slot.pt"))
    rest = clip[[1, 0], :, 20:]
    got = [module.forward_step(f, [True, False]) for f in rest.unbind(2)]
    got = torch.stack([s.output[0] for s in got if s.ready[0]], dim=-1)
    torch.testing.assert_close(got, want[1, :, -got.shape[-1] :])


def test_copies_and_pickles_have_no_state_but_go_on():
    module, clip = made("block")
    module.forward_steps(clip[:, :, :20])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.slots == 0
        assert torch.equal(other.forward_steps(clip).output, module(clip))


def test_a_long_stream_does_not_drift():
    """Whatever came before: the window's bits are those of a stream that just began."""
    module = seeded(GlobalPool, 5)
    frames = 1e6 * noise(3000, 1, 3, 2, 2)
    for frame in frames:
        last = module.forward_step(frame).output
    fresh = seeded(GlobalPool, 5)
    for frame in frames[-5:]:
        want = fresh.forward_step(frame).output
    assert torch.equal(last, want)


@pytest.mark.parametrize("form", ["sum", "auto"])
@pytest.mark.parametrize("name", ["conv3d", "conv3d_dilated_grouped", "conv1d", "block"])
@starts
def test_incomplete_columns_instead_of_frames(name, form, start):
    module, clip = MODULES[name][0](start=start, form=form), noise(*MODULES[name][1])
    want = made(name, start)[0](clip)
    torch.testing.assert_close(module.forward_steps(clip).output, want)


def test_state_bytes_are_the_rings():
    module = seeded(ContinualConv3d, 4, 6, 3, padding=1)
    assert module.state_bytes == 0
    module.forward_step(noise(2, 4, 5, 6))
    assert module.state_bytes == 2 * (2 * 4 * 5 * 6 * 4 + 8)
    strided = seeded(ContinualConv3d, 4, 4, 3, (1, 2, 2), padding=1, form="auto")
    strided.forward_step(noise(1, 4, 8, 8))
    assert strided.state_bytes == 2 * 4 * 4 * 4 * 4 + 8


def test_momentum_of_frames():
    assert momentum(0.1, 1) == pytest.approx(0.1)
    assert momentum(0.1, 16) == pytest.approx(2 / (1 + 16 * 19))
    module = nn.Sequential(nn.BatchNorm3d(2), nn.BatchNorm3d(2, momentum=None))
    set_momentum(module, 16)
    assert module[0].momentum == pytest.approx(2 / 305)
    assert module[1].momentum is None


def test_training_frame_by_frame():
    """No statistics during the transient, then those of the columns; gradients of the newest."""
    torch.manual_seed(0)
    conv, norm = nn.Conv3d(3, 4, 3, padding=(0, 1, 1)), nn.BatchNorm3d(4)
    module = Sequential(conv, norm, nn.ReLU()).train()
    clip = noise(2, 3, 5, 4, 4)
    for t in range(2):
        assert not module.forward_step(clip[:, :, t]).ready.any()
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(4))
    output = module.forward_step(clip[:, :, 2]).output
    assert norm.num_batches_tracked == 1
    other = copy.deepcopy(nn.Sequential(conv, norm, nn.ReLU()))
    other[1].reset_running_stats()
    want = other(clip[:, :, :3])
    torch.testing.assert_close(output, want[:, :, 0])
    torch.testing.assert_close(norm.running_mean, other[1].running_mean)
    output.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, other[0].weight.grad)
    torch.testing.assert_close(norm.weight.grad, other[1].weight.grad)


def test_clips_train_too():
    torch.manual_seed(0)
    conv, norm = nn.Conv3d(3, 4, 3, padding=(0, 1, 1)).double(), nn.BatchNorm3d(4).double()
    module = Sequential(conv, norm, nn.ReLU()).train()
    other = copy.deepcopy(nn.Sequential(conv, norm, nn.ReLU()))
    clip = noise(2, 3, 6, 4, 4, dtype=torch.float64)
    for net in (module, other):
        net(clip).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, other[0].weight.grad)
    torch.testing.assert_close(norm.running_var, other[1].running_var)


def test_weights_that_are_written_are_folded_anew():
    module, clip = made("block")
    module.forward_steps(clip[:, :, :20])
    with torch.no_grad():
        module.get_submodule("2.branch.1").weight.mul_(2)
    module.reset()
    assert torch.equal(module.forward_steps(clip).output, module(clip))
    fresh = copy.deepcopy(module)
    assert torch.equal(fresh(clip), module(clip))


REFUSED = {
    "GroupNorm": (nn.GroupNorm(2, 4), "1 (GroupNorm) normalises with the statistics"),
    "InstanceNorm3d": (nn.InstanceNorm3d(4), "1 (InstanceNorm3d) normalises with"),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 4, 2), "1 (ConvTranspose3d) is a transposed"),
    "adaptive": (nn.AdaptiveAvgPool3d(2), "pools a clip to 2 columns"),
    "unsaid": (nn.AdaptiveAvgPool3d(1), "say over how many columns"),
    "replicated": (nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate"), "pads with 'repl"),
    "bidirectional": (nn.LSTM(4, 4, bidirectional=True), "is bidirectional"),
    "padding": (nn.Conv3d(4, 4, 1, padding=1), "pads 1 frames in front of a window of 1"),
    "unknown": (nn.CosineSimilarity(), "1 (CosineSimilarity) has no rule"),
    "indices": (nn.MaxPool3d(2, return_indices=True), "returns places"),
    "ceil": (nn.AvgPool3d(2, divisor_override=3), "divides by a number of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_continual_is_named(name):
    module, reason = REFUSED[name]
    with pytest.raises(UnsupportedError) as told:
        _ = Sequential(nn.ReLU(), module).delay
    assert reason in str(told.value)


def test_options_are_checked():
    for options, reason in (({"start": "ones"}, "unknown start"), ({"form": "x"}, "unknown form")):
        with pytest.raises(UnsupportedError, match=reason):
            _ = ContinualConv3d(1, 1, 3, **options).delay
    with pytest.raises(UnsupportedError, match="window must be at least 1"):
        GlobalPool(0)
    with pytest.raises(UnsupportedError, match="frames must be at least 0"):
        Delay(-1)


def test_convert_shares_parameters():
    theirs = nn.Conv3d(4, 6, 3)
    ours = ContinualConv3d.convert(theirs)
    assert ours.weight is theirs.weight
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    clip = noise(1, 4, 5, 6, 7)
    torch.testing.assert_close(ours.eval()(clip), theirs(clip).detach())


def test_streams_begin_in_inference_mode_and_go_on_outside():
    module, clip = made("block", "zeros")
    want = module(clip)
    with torch.inference_mode():
        first = module.forward_steps(clip[:, :, :20]).output
    rest = module.forward_steps(clip[:, :, 20:]).output
    assert torch.equal(torch.cat([first, rest], dim=2), want)


def test_float64_streams():
    module = MODULES["block"][0](start="zeros").double()
    clip = noise(2, 4, 36, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(module.forward_steps(clip).output, module(clip))
    single = made("block", "zeros")[0]
    got = single.forward_steps(clip.float()).output
    assert np.allclose(got, module(clip), rtol=1e-4, atol=1e-4)
