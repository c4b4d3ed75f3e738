"""A recorded step has the bits of the ordinary one, whatever happens between two frames."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from fastconv import backends, winners  # noqa: E402  (after the skip)
from fastconv.errors import GeometryError  # noqa: E402
from fastconv.nn import (  # noqa: E402
    Concat,
    ContinualConv3d,
    ContinualLSTM,
    Delay,
    GlobalPool,
    Residual,
    Sequential,
    SqueezeExcite,
    continual_record,
)
from fastconv.nn.continual_play import Player  # noqa: E402
from test_nn_continual import block, noise, same, seeded, states, with_statistics  # noqa: E402

pytestmark = pytest.mark.skipif(
    backends.available()["c"] is not None, reason=str(backends.available()["c"])
)
nn = torch.nn


def excited(**options):
    """As in X3D: expand, depthwise, squeeze and excitation, project, residual; a head."""
    torch.manual_seed(0)

    def branch(stride):
        gate = nn.Sequential(nn.Conv3d(18, 4, 1), nn.ReLU(), nn.Conv3d(4, 18, 1), nn.Sigmoid())
        return Sequential(
            nn.Conv3d(8, 18, 1, bias=False),
            nn.BatchNorm3d(18),
            nn.ReLU(),
            nn.Conv3d(18, 18, 3, (1, stride, stride), 1, groups=18, bias=False),
            nn.BatchNorm3d(18),
            SqueezeExcite(gate),
            nn.SiLU(),
            nn.Conv3d(18, 8, 1, bias=False),
            nn.BatchNorm3d(8),
        )

    strided = Residual(branch(2), nn.Conv3d(8, 8, 1, (1, 2, 2)), nn.ReLU())
    return with_statistics(
        Sequential(
            nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
            strided,
            Residual(branch(1), None, nn.ReLU()),
            GlobalPool(3),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(8, 5),
            **options,
        )
    )


def strided(**options):
    """A column every second frame, sums that wait for a slow branch."""
    torch.manual_seed(0)
    return with_statistics(
        Sequential(
            nn.Conv3d(3, 8, 3, (2, 1, 1), 1),
            nn.BatchNorm3d(8),
            nn.SiLU(),
            Residual(nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)), Delay(0), nn.Hardswish()),
            nn.AvgPool3d((2, 2, 2), 1),
            nn.Conv3d(8, 4, (3, 1, 1), dilation=(2, 1, 1)),
            **options,
        )
    )


def pools(**options):
    torch.manual_seed(0)
    return with_statistics(
        Sequential(
            nn.Conv3d(3, 6, 3, padding=1),
            nn.MaxPool3d(3, (1, 2, 2), 1),
            Concat(
                nn.AvgPool3d(3, 1, 1, count_include_pad=False),
                nn.Conv3d(6, 5, (5, 1, 1), padding=(2, 0, 0)),
                nn.MaxPool3d((1, 3, 3), 1, (0, 1, 1)),
            ),
            GlobalPool(2, "max"),
            **options,
        )
    )


def thinned(**options):
    """Every second column of what every frame brings, and one after that."""
    torch.manual_seed(0)
    thin = nn.AvgPool3d((1, 2, 2), (2, 2, 2))
    return Sequential(nn.Conv3d(3, 4, 3, padding=1), thin, nn.Conv3d(4, 4, 1), **options).eval()


def thinned_last(**options):
    torch.manual_seed(0)
    return Sequential(nn.Conv3d(3, 4, 3), nn.AvgPool3d((1, 2, 2), (2, 2, 2)), **options).eval()


def recurrent(**options):
    torch.manual_seed(0)
    convolutions = [nn.Conv3d(3, 6, 3, padding=1), nn.ReLU(), GlobalPool(2)]
    return Sequential(*convolutions, ContinualLSTM(6, 7, 2), **options).eval()


# The network, the size of its frames, the operations that stay in Python.
NETWORKS = {
    "excited": (excited, (3, 17, 13), 0),
    "strided": (strided, (3, 6, 7), 0),
    "pools": (pools, (3, 7, 9), 1),
    "thinned": (thinned, (3, 6, 8), 0),
    "thinned_last": (thinned_last, (3, 6, 8), 0),
    "recurrent": (recurrent, (3, 6, 5), 3),
    "block": (block, (4, 12, 12), 0),
    "sums": (partial(seeded, ContinualConv3d, 3, 6, 3, padding=1, form="sum"), (3, 6, 7), 0),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def made(name, slots=2, frames=24, **options):
    """A network, its twin that runs step by step, and a clip."""
    make, size, _ = NETWORKS[name]
    ordinary = make(**options)
    ordinary._recording = lambda *_: None
    return make(**options), ordinary, noise(frames, slots, *size)


def recordings(module):
    return [found for _, found in module._recorded.values() if found is not None]


def agree(module, ordinary, *arguments, **options):
    """The step's result, the same from both."""
    got = module.forward_step(*arguments, **options)
    want = ordinary.forward_step(*arguments, **options)
    assert torch.equal(got.output, want.output)
    assert torch.equal(got.ready, want.ready)
    assert got.output.stride() == want.output.stride()
    return got


@networks
@pytest.mark.parametrize("start", ["wait", "replicate"])
@pytest.mark.parametrize("slots", [1, 2])
def test_the_bits_of_an_ordinary_step(name, start, slots):
    module, ordinary, frames = made(name, slots, start=start)
    for frame in frames:
        agree(module, ordinary, frame)
    assert same(states(module), states(ordinary))
    steps = [part for found in recordings(module) for part in found._parts]
    players = [part for part in steps if isinstance(part, Player)]
    assert len(recordings(module)) == module.rate
    assert len(players) >= module.rate
    assert len(steps) - len(players) == NETWORKS[name][2] * module.rate


@pytest.mark.parametrize("name", ["excited", "block"])
def test_the_bits_of_the_clip(name):
    module, _, frames = made(name)
    clip = frames.movedim(0, 2)
    assert torch.equal(module.forward_steps(clip).output, module(clip))
    assert recordings(module)


@networks
def test_streams_stall_end_and_move(name):
    module, ordinary, frames = made(name, 3, 30)
    for t, frame in enumerate(frames):
        if t == 18:
            for one in (module, ordinary):
                one.reset(1)
        if t == 20:
            saved = module.save(2)
            for one in (module, ordinary):
                one.restore(0, saved)
        if t == 24:
            for one in (module, ordinary):
                one.copy(2, 1)
        stalls = t % 4 == 3
        frame = frame.clone()
        frame[2] = float("nan") if stalls else frame[2]
        got = agree(module, ordinary, frame, [True, True, not stalls])
        assert not (stalls and got.output[2].any())
    assert same(states(module), states(ordinary))
    # Streams that are not at the same phase of a temporal stride go on step by step.
    assert recordings(module) or module.rate > 1


def test_a_stream_with_a_mask_is_played_too():
    """Slots that never had a frame keep nobody waiting."""
    module, ordinary, frames = made("excited", 3)
    for frame in frames:
        agree(module, ordinary, frame, [True, False, True])
    assert recordings(module)
    assert module.seen == (24, 0, 24)


@networks
def test_looking_ahead_changes_nothing(name):
    module, ordinary, frames = made(name)
    for frame in frames:
        ahead = module.forward_step(frame, update_state=False)
        assert torch.equal(agree(module, ordinary, frame).output, ahead.output)


@networks
@pytest.mark.parametrize("near", [1, 1 << 12])
def test_few_streams_at_a_time(name, near, monkeypatch):
    """Through some layers one by one, or a few; with one that stalls."""
    monkeypatch.setattr(continual_record, "NEAR_BYTES", near)
    module, ordinary, frames = made(name, 5)
    for t, frame in enumerate(frames):
        agree(module, ordinary, frame, [True, True, True, t % 5 != 4, True])
    assert same(states(module), states(ordinary))
    for found in recordings(module):
        streams = {call.stream for p in found._parts if isinstance(p, Player) for call in p.calls}
        assert near > 1 or streams == set(range(5))


def test_a_refused_frame_changes_nothing():
    module, ordinary, frames = made("excited")
    for frame in frames:
        agree(module, ordinary, frame)
        for wrong in (frame[:, :2], frame.double(), frame[:1]):
            with pytest.raises(GeometryError):
                module.forward_step(wrong)


def test_weights_are_followed():
    module, ordinary, frames = made("excited")
    for t, frame in enumerate(frames):
        if t == 12:
            for one in (module, ordinary):
                with torch.no_grad():
                    one.get_submodule("1.branch.0").weight.mul_(-1.5)
                    one.get_submodule("2.branch.4").running_mean.add_(1)
        if t == 16:
            for one in (module, ordinary):
                one.get_submodule("6").bias.data = torch.arange(5.0)
                one.get_submodule("6").weight = nn.Parameter(torch.ones(5, 8))
        agree(module, ordinary, frame)


def test_dropout_by_hand():
    """A part in training mode inside of a network in eval mode."""
    module, ordinary, frames = made("excited")
    for frame in frames:
        agree(module, ordinary, frame)
    module.get_submodule("5").p = 1.0
    module.get_submodule("5").train()
    bias = module.get_submodule("6").bias
    assert torch.equal(module.forward_step(frames[0]).output, bias.expand(2, 5))


def test_heads_without_channels():
    """What comes out has one axis."""
    ends = [GlobalPool(2), nn.Flatten(0), nn.Sigmoid()]
    module = seeded(Sequential, nn.Conv1d(4, 1, 3), *ends)
    ordinary = copy.deepcopy(module)
    ordinary._recording = lambda *_: None
    for frame in noise(9, 1, 4):
        agree(module, ordinary, frame)
    assert recordings(module)


def test_weights_change_what_a_step_brings():
    module, _, frames = made("excited")
    for frame in frames:
        before = module.forward_step(frame).output
    assert recordings(module)
    with torch.no_grad():
        module.get_submodule("6").weight.zero_()
    after = module.forward_step(frames[-1]).output
    assert not torch.equal(before, after)
    assert torch.equal(after, module.get_submodule("6").bias.expand_as(after))


@pytest.mark.parametrize("name", ["excited", "strided", "pools"])
def test_results_are_tensors_of_their_own(name):
    module, ordinary, frames = made(name)
    results = [agree(module, ordinary, frame).output for frame in frames]
    assert recordings(module)
    kept = [result.clone() for result in results]
    results[-2].fill_(float("nan"))
    agree(module, ordinary, frames[0])
    agree(module, ordinary, frames[1])
    for i in (*range(len(kept) - 2), len(kept) - 1):
        assert torch.equal(results[i], kept[i])


def test_frames_in_any_layout():
    module, ordinary, frames = made("excited")
    for t, frame in enumerate(frames):
        layouts = (
            frame,
            frame.contiguous(memory_format=torch.channels_last),
            frame.transpose(2, 3).contiguous().transpose(2, 3),
        )
        agree(module, ordinary, layouts[t % 3])


def test_threads_and_instruction_sets_in_between():
    from fastconv.c_kernels import launch

    module, _, frames = made("excited")
    ordinary = excited()
    wanted = [ordinary.forward_step(frame).output for frame in frames]
    threads = torch.get_num_threads()
    try:
        for t, (frame, want) in enumerate(zip(frames, wanted, strict=True)):
            torch.set_num_threads(1 + t % 5)
            assert torch.equal(module.forward_step(frame).output, want)
    finally:
        torch.set_num_threads(threads)
    with launch.forced("plain"):
        torch.testing.assert_close(
            module.forward_step(frames[0]).output, ordinary.forward_step(frames[0]).output
        )
        plain = recordings(module)
    agree(module, ordinary, frames[1])
    assert recordings(module) != plain


def test_new_measurements_are_asked_for():
    module, ordinary, frames = made("excited")
    for frame in frames:
        agree(module, ordinary, frame)
    before = recordings(module)
    winners.forget()
    agree(module, ordinary, frames[0])
    assert recordings(module) != before


def test_copies_have_recordings_of_their_own():
    module, ordinary, frames = made("excited")
    for frame in frames:
        agree(module, ordinary, frame)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not recordings(other)
        fresh = made("excited")[1]
        for frame in frames:
            agree(other, fresh, frame)
    agree(module, ordinary, frames[0])


def test_training_in_between():
    """A step with a gradient does not write its state in place: what was recorded is void."""
    module, ordinary, frames = made("strided")
    for t, frame in enumerate(frames):
        for one in (module, ordinary):
            one.train(10 <= t < 13)
        if t in (10, 11, 12):
            for one in (module, ordinary):
                for part in one.modules():
                    if isinstance(part, nn.BatchNorm3d):
                        part.eval()
        agree(module, ordinary, frame)


@networks
@pytest.mark.parametrize("played", [True, False])
def test_memory_is_found_by_the_state_alone(name, played):
    """Numbers of the host say which columns there are, never where they are kept: what records a
    step, a CUDA graph too, may repeat it."""
    module, ordinary, frames = made(name, frames=36)
    if not played:
        module._recording = ordinary._recording
    for t, frame in enumerate(frames):
        if t == 32:  # behind everybody's warm-up
            module._seen += 1001 * module.rate
        agree(module, ordinary, frame)


def test_another_start():
    module, ordinary, frames = made("excited")
    for one in (module, ordinary):
        one.forward_steps(frames.movedim(0, 2))
        one.stop()
    for frame in frames[:, :1, :, :9, :9]:
        agree(module, ordinary, frame)


def test_precision_without_kernels_goes_step_by_step():
    module = excited().double()
    for frame in noise(9, 1, 3, 9, 9, dtype=torch.float64):
        module.forward_step(frame)
    assert not recordings(module)


def test_a_long_stream_does_not_drift():
    """A hundred thousand frames later: the bits of a stream that just began."""
    torch.manual_seed(0)
    module = Sequential(nn.Conv3d(1, 4, (2, 1, 1)), nn.ReLU(), GlobalPool(5)).eval()
    fresh = copy.deepcopy(module)
    frames = 1e6 * noise(997, 1, 1, 2, 2)
    with torch.inference_mode():
        for t in range(100_000):
            last = module.forward_step(frames[t % 997]).output
        for t in range(100_000 - 6, 100_000):
            want = fresh.forward_step(frames[t % 997]).output
    assert recordings(module)
    assert torch.equal(last, want)
