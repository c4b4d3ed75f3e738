"""Streams that share a network: they come, go and stall; lost, late and surplus frames."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv import cli, stream_command  # noqa: E402
from fastconv.errors import GeometryError, UnsupportedError  # noqa: E402
from fastconv.nn import ContinualConv3d  # noqa: E402
from fastconv.stream import Policy, StreamError, StreamPool  # noqa: E402
from fastconv.zoo import NETWORKS  # noqa: E402

REFUSE = Policy("refuse", "refuse", "refuse", queue=4)


def conv():
    torch.manual_seed(0)
    return ContinualConv3d(2, 3, 3).eval()


def frames(count, seed=0):
    return torch.randn(count, 2, 4, 5, generator=torch.Generator().manual_seed(seed))


def pool(slots=2, policy=REFUSE):
    return StreamPool(conv(), slots, frames(1)[0], policy=policy)


def alone(pictures):
    """What a stream gives that is alone in the network: one output per frame, None at first."""
    module = conv()
    steps = [module.forward_step(frame[None]) for frame in pictures]
    return [step.output[0] if step.ready[0] else None for step in steps]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_streams_join_stall_and_leave_on_their_own():
    cameras = [frames(12, seed) for seed in range(3)]
    shared, got, at = pool(slots=3), {0: [], 1: [], 2: []}, [0, 0, 0]
    names = {0: shared.join()}
    for tick in range(20):
        if tick == 2:
            names[1] = shared.join()
        if tick == 5:
            names[2] = shared.join()
        for camera, name in list(names.items()):
            if at[camera] == 12:
                shared.leave(name)
                del names[camera]
            elif (tick + camera) % 4:
                shared.push(name, cameras[camera][at[camera]])
                at[camera] += 1
        for name, result in shared.tick().items():
            camera = next(c for c, n in names.items() if n == name)
            assert result.number == len(got[camera])
            assert result.latency_ms >= 0
            got[camera].append(result.output)
    for camera in range(3):
        assert_same(got[camera], alone(cameras[camera][: at[camera]]))
    assert shared.tick() == {}


def test_a_slot_is_free_again_and_empty():
    shared, pictures = pool(slots=1), frames(6)
    for _ in range(2):
        name = shared.join()
        with pytest.raises(StreamError, match="all 1 slots are taken"):
            shared.join()
        got = []
        for frame in pictures:
            shared.push(name, frame)
            got.append(shared.tick()[name].output)
        assert_same(got, alone(pictures))
        shared.leave(name)
    assert shared.free == 1
    assert shared.streams == ()
    with pytest.raises(StreamError, match="there is no stream 1"):
        shared.push(1, pictures[0])


def test_a_stream_goes_on_elsewhere():
    first, second, pictures = pool(), pool(slots=3), frames(8)
    name, got = first.join(), []
    for frame in pictures[:4]:
        first.push(name, frame)
        got.append(first.tick()[name].output)
    saved = first.leave(name, save=True)
    second.join()
    name = second.join(saved)
    for frame in pictures[4:]:
        second.push(name, frame)
        result = second.tick()[name]
        got.append(result.output)
    assert result.number == 7
    assert_same(got, alone(pictures))


def play(policy, numbers, seed=0):
    """Push frames by these numbers, then tick until nothing waits; numbers and outputs."""
    shared, pictures = pool(policy=policy), frames(20, seed)
    name = shared.join()
    accepted = [shared.push(name, pictures[n], n) for n in numbers]
    results = []
    while shared.waiting(name):
        results.append(shared.tick()[name])
    return shared, name, accepted, results, pictures


def test_a_full_queue():
    with pytest.raises(StreamError, match="has 2 frames in its queue"):
        play(Policy("refuse", "refuse", "refuse", queue=2), range(3))
    _, _, accepted, results, pictures = play(
        Policy("drop_newest", "skip", "refuse", queue=3), range(5)
    )
    assert accepted == [True] * 3 + [False] * 2
    assert_same([r.output for r in results], alone(pictures[:3]))
    shared, name, accepted, results, pictures = play(
        Policy("drop_oldest", "skip", "refuse", queue=3), range(5)
    )
    assert accepted == [True] * 5
    assert [r.number for r in results] == [2, 3, 4]
    assert_same([r.output for r in results], alone(pictures[2:5]))
    assert shared.lost(name) == 2


def test_lost_frames():
    numbers = [0, 1, 2, 5, 6, 7]
    with pytest.raises(StreamError, match="lost frames 3 to 4"):
        play(Policy("refuse", "refuse", "refuse", queue=8), numbers)
    kept = Policy("refuse", "skip", "refuse", queue=8)
    shared, name, _, results, pictures = play(kept, numbers)
    assert [r.number for r in results] == numbers
    assert shared.lost(name) == 2
    assert_same([r.output for r in results], alone(pictures[numbers]))
    _, _, _, results, _ = play(Policy("refuse", "repeat", "refuse", queue=8), numbers)
    assert [r.number for r in results] == list(range(8))
    assert_same([r.output for r in results], alone(pictures[[0, 1, 2, 2, 2, 5, 6, 7]]))
    _, _, _, results, _ = play(Policy("refuse", "reset", "refuse", queue=8), numbers)
    assert_same(
        [r.output for r in results], [*alone(pictures[[0, 1, 2]]), *alone(pictures[[5, 6, 7]])]
    )


def test_dropped_frames_are_lost_ones():
    policy = Policy("drop_oldest", "reset", "refuse", queue=2)
    shared, pictures = pool(policy=policy), frames(8)
    name, got = shared.join(), []
    for n in range(3):
        shared.push(name, pictures[n])
        got.append(shared.tick()[name].output)
    for n in range(3, 7):
        shared.push(name, pictures[n])  # 3 and 4 go
    got += [shared.tick()[name].output for _ in range(2)]
    assert_same(got, [*alone(pictures[:3]), *alone(pictures[5:7])])


def test_late_and_reordered_frames():
    with pytest.raises(StreamError, match="had frame 1 or a later one"):
        play(Policy("refuse", "skip", "refuse", queue=8), [0, 1, 2, 1])
    _, _, accepted, results, pictures = play(
        Policy("refuse", "skip", "drop", queue=8), [0, 1, 3, 2, 4]
    )
    assert accepted == [True, True, True, False, True]
    assert [r.number for r in results] == [0, 1, 3, 4]
    policy = Policy("refuse", "refuse", "refuse", queue=8, reorder=2)
    _, _, _, results, _ = play(policy, [1, 2, 0, 4, 3, 5])
    assert [r.number for r in results] == list(range(6))
    assert_same([r.output for r in results], alone(pictures[:6]))
    with pytest.raises(StreamError, match="lost frames 1 to 1"):
        play(policy, [0, 2, 3, 4])
    policy = Policy("refuse", "skip", "refuse", queue=8, reorder=2)
    shared, name, _, results, _ = play(policy, [0, 2, 3, 4, 5])
    assert [r.number for r in results] == [0, 2, 3, 4, 5]
    assert shared.lost(name) == 1


def test_what_is_refused_changes_nothing():
    shared, pictures = pool(policy=Policy("refuse", "refuse", "refuse", queue=2)), frames(6)
    name = shared.join()
    shared.push(name, pictures[0])
    with pytest.raises(GeometryError, match="the pool takes frames"):
        shared.push(name, pictures[0, :1])
    with pytest.raises(StreamError, match="lost"):
        shared.push(name, pictures[3], 3)
    shared.push(name, pictures[1])
    with pytest.raises(StreamError, match="in its queue"):
        shared.push(name, pictures[2])
    got = []
    for n in range(2, 6):
        got.append(shared.tick()[name].output)
        shared.push(name, pictures[n])
    got += [shared.tick()[name].output for _ in range(2)]
    assert_same(got, alone(pictures))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("never", "skip", "drop"), "full must be one of"),
        (("refuse", "never", "drop"), "lost must be one of"),
        (("refuse", "skip", "never"), "late must be one of"),
        (("drop_oldest", "refuse", "drop"), "loses frames"),
        (("refuse", "skip", "drop", 0), "queue >= 1"),
        (("refuse", "skip", "drop", 1, -1), "reorder >= 0"),
    ],
)
def test_policies_are_checked(arguments, reason):
    with pytest.raises(UnsupportedError, match=reason):
        Policy(*arguments)


def test_a_policy_is_asked_for():
    with pytest.raises(TypeError, match="policy"):
        fastconv.StreamPool(conv(), 1, frames(1)[0])
    with pytest.raises(UnsupportedError, match="slots must be at least 1"):
        pool(slots=0)


def test_state_is_that_of_all_slots():
    assert pool(slots=3).state_bytes == 3 * (2 * 2 * 4 * 5 * 4 + 8)


def test_the_command_plays_the_clip(capsys):
    """Two streams of the default clip; a third waits for a slot."""
    video = pytest.importorskip("fastconv.video")
    pytest.importorskip("av")
    try:
        clip = str(video.default_clip())
    except video.VideoError as error:
        pytest.skip(str(error))
    command = ["stream", clip, clip, clip, "--streams", "2", "--frames", "4", "--threads", "1"]
    assert cli.main([*command, "--network", "d_resnet18", "--start", "zeros"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "bikes.mp4" in line]
    assert [row[:4] for row in rows] == [[str(i), "bikes.mp4", "4", "2"] for i in range(3)]
    assert len({row[-1] for row in rows}) == 1
    assert "receptive field 11 frames, delay 2" in out
    assert "times as long" in out


def test_the_command_compares_with_clips(capsys):
    pytest.importorskip("av")
    command = ["stream", "--frames", "14", "--threads", "1", "--network", "d_resnet18"]
    if cli.main(command):
        pytest.skip("no default clip")
    out = capsys.readouterr().out
    assert "largest difference of the last results from a clip's" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--network", "resnet"], "unknown network 'resnet'"),
        (["no/such.mp4"], "no such file"),
        (["--backend", "nobody"], "nobody"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, reason, capsys):
    assert cli.main(["stream", *arguments]) == 1
    assert reason in capsys.readouterr().err


def test_the_command_knows_its_networks():
    for name in stream_command.NETWORKS.values():
        expects = stream_command.preprocessing_of(name)
        assert expects.crop == NETWORKS[name].input_shape[2]
