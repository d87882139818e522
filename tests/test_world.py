"""The synthetic world against its reader, its own layout, and the rules that its docstring gives.

The reader knows colours, shapes and motions but no scene, so that reading back every clip's caption
checks both. Then the reader itself: what it must survive (noise, blur, tints), what must change its
answer (time reversed, mirrored, colours exchanged), and what holds nothing to read. Clips are drawn
once for a size and split; fixed seeds.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import toy.world as world_file
from data import DataConfig, to_float, to_uint8
from toy.reader import UNCLEAR, Track, in_order, read, tracks
from toy.world import (
    COLOURS,
    COMBINATIONS,
    EXTENT,
    MOTIONS,
    SHAPES,
    SPLITS,
    Thing,
    World,
    caption,
    coverage,
    is_held_out,
    motions_of,
    tell,
)

SMALL = DataConfig()
SIZES = {
    "32x32": SMALL,
    "48x64": DataConfig(frames=24, height=48, width=64, semantic_height=48, semantic_width=64),
    "64x48": DataConfig(frames=24, height=64, width=48, semantic_height=32, semantic_width=24),
}
splits = pytest.mark.parametrize("split", SPLITS)
sizes = pytest.mark.parametrize("size", SIZES)


@lru_cache
def clips(split: str = "test", size: str = "32x32", count: int = 150):
    return World(SIZES[size], split).batch(range(count))


def parse(text: str) -> tuple[Thing, ...]:
    """Read a caption back."""
    return tuple(Thing(*part.removeprefix("a ").split(" ", 2)) for part in text.split(" and "))


def read_all(video: Tensor) -> list[str]:
    """Return the captions of clips of any dtype, (B, 3, F, H, W) in 0 to 255."""
    video = video.float().round().clamp(0, 255).to(torch.uint8)
    return [caption(read(clip)) for clip in video]


def misread(found: Sequence[str], expected: Sequence[str]) -> list[tuple[int, str, str]]:
    """Return (clip, read, told) of the clips read otherwise."""
    triples = zip(range(len(expected)), found, expected, strict=True)
    return [(i, a, b) for i, a, b in triples if a != b]


# --- what is drawn is a function of split and index --------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 3), min_size=1, max_size=7))
def test_a_clip_does_not_depend_on_what_is_drawn_beside_it(indices):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_file, "CHUNK", 3)
        made = World(SMALL, "train")
        batch = made.batch(indices)
    for video, low, text, i in zip(*batch, indices, strict=True):
        alone = made.batch([i])
        assert alone.video[0].equal(video) and alone.semantic_video[0].equal(low)
        assert [text] == alone.captions == made.captions([i]) == [caption(made.scene(i))]


def test_a_batch_of_many_chunks_is_its_clips_one_by_one():
    batch = clips("train")
    alone = torch.cat([World(SMALL, "train").batch([i]).video for i in range(150)])
    assert batch.video.equal(alone)


def test_splits_and_clips_differ():
    videos = [clips(split).video[:50] for split in SPLITS]
    everything = torch.cat(videos).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 150


LONG = {
    "64 frames, 4 events": DataConfig(frames=64, events=4),
    "50 frames, 3 events, wide": DataConfig(
        frames=50, fps=12.0, height=32, width=48, semantic_width=48, events=3
    ),
}


@splits
@pytest.mark.parametrize("name", LONG)
def test_stories_are_read_back(split, name):
    """What each object does in each stretch of a long clip, one thing after another."""
    world = World(LONG[name], split)
    batch = world.batch(range(60))
    for clip, text in zip(batch.video, batch.captions, strict=True):
        found = read(clip, world.config.events)
        assert caption(found) == text
        assert parse(text) == found
    told = {event for text in batch.captions for t in parse(text) for event in motions_of(t.motion)}
    assert told == set(MOTIONS)
    assert all(len(motions_of(t.motion)) == world.config.events for t in parse(batch.captions[0]))


def test_a_story_is_told_and_taken_apart():
    told = tell(["moves left", "moves up", "stays still", "grows", "moves right"])
    assert told == "moves left then up then stays still then grows then right"
    assert motions_of(told) == ["moves left", "moves up", "stays still", "grows", "moves right"]
    for text in (
        "moves left then",
        "moves left then sideways",
        "up",
        "moves left then moves up up",
    ):
        with pytest.raises(ValueError, match="no motion"):
            motions_of(text)


@given(st.integers(0, 149), st.integers(1, 16), st.integers(1, 8))
def test_too_few_frames_for_a_story_are_no_error(i, frames, events):
    for thing in read(clips().video[i, :, :frames], events):
        assert thing.motion == UNCLEAR or len(thing.motion.split(" then ")) == events


def test_one_event_after_another_is_what_single_clips_show():
    """The stretch of one event, read alone, shows that event."""
    world = World(DataConfig(frames=65, events=4))  # an event is 16 frames: edges lie on frames
    batch = world.batch(range(40))
    for clip, text in zip(batch.video, batch.captions, strict=True):
        for k in range(4):
            alone = read(clip[:, 16 * k : 16 * k + 17])
            told = [motions_of(thing.motion)[k] for thing in parse(text)]
            assert sorted(thing.motion for thing in alone) == sorted(told)


@splits
def test_frames_hold_one_or_two_objects_about_equally_often(split):
    counts = [len(World(SMALL, split).scene(i)) for i in range(600)]
    assert set(counts) == {1, 2}
    assert 0.44 < counts.count(1) / 600 < 0.56  # 3 deviations
    alone = World(DataConfig(objects=1), split)
    assert all(len(alone.scene(i)) == 1 for i in range(100))


def test_every_combination_comes_up():
    """Of 151 in training, each about 40 times in 6000 objects; none far more than its share."""
    seen = [thing for i in range(4000) for thing in World(SMALL, "train").scene(i)]
    counts = [seen.count(thing) for thing in COMBINATIONS if not is_held_out(thing)]
    mean = len(seen) / len(counts)
    assert min(counts) > mean / 2 and max(counts) < 2 * mean, (min(counts), mean, max(counts))


# --- what is held out --------------------------------------------------------------------------


def test_a_tenth_is_held_out_but_every_pair_of_attributes_is_shown():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == 168
    shown = [thing for thing in COMBINATIONS if not is_held_out(thing)]
    assert len(shown) == 168 - 17
    for first, second in combinations(range(3), 2):
        pairs = set(product((COLOURS, SHAPES, MOTIONS)[first], (COLOURS, SHAPES, MOTIONS)[second]))
        assert {(thing[first], thing[second]) for thing in shown} == pairs
    held = [thing for thing in COMBINATIONS if is_held_out(thing)]
    for place, names in enumerate((COLOURS, SHAPES, MOTIONS)):  # and tests every attribute
        assert {thing[place] for thing in held} == set(names)


@splits
def test_a_split_shows_only_its_own(split):
    made = World(SMALL, split)
    for i in range(500):
        assert {is_held_out(thing) for thing in made.scene(i)} == {split == "held_out"}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'val': choose train, test, held_out"):
        World(SMALL, "val")


# --- captions ----------------------------------------------------------------------------------


def test_every_caption_parses_back():
    scenes = [(thing,) for thing in COMBINATIONS]
    scenes += [(a, b) for a, b in product(COMBINATIONS, COMBINATIONS) if a.colour != b.colour]
    assert len({caption(scene) for scene in scenes}) == len(scenes)  # no two sound alike
    assert all(parse(caption(scene)) == scene for scene in scenes)


# --- the layout --------------------------------------------------------------------------------


@sizes
@splits
def test_objects_stay_in_the_frame_apart_and_in_order(split, size):
    """By the layout alone: nothing is read from pixels."""
    config = SIZES[size]
    made, unit = World(config, split), min(config.height, config.width) / 32
    side = np.array([config.height, config.width]) / unit
    for i in range(200):
        objects, _ = made._layout(i)
        assert tuple(thing for thing, *_ in objects) == made.scene(i)
        middles = []
        for _, _, path in objects:
            for *place, radius in path:
                place = np.array(place)
                assert (place - EXTENT * radius > -1e-6).all(), f"clip {i}: {place}, {radius}"
                assert (place + EXTENT * radius < side + 1e-6).all(), f"clip {i}: {place}, {radius}"
            middles.append(path[:, :2].mean(0))
        if len(objects) == 2:
            first, second = (thing for thing, *_ in objects)
            assert first.colour != second.colour
            gap = middles[1] - middles[0]  # positive along the axis they lie on: in order
            assert gap[abs(gap).argmax()] > 2, f"clip {i}: {gap}"
            assert abs(gap).max() - abs(gap).min() > 2, f"clip {i}: {gap} is nearly diagonal"


def test_motions_are_what_their_names_say():
    for i in range(300):
        for thing, _, path in World(SMALL, "train")._layout(i)[0]:
            dy, dx = path[1, :2] - path[0, :2]
            still = thing.motion in ("stays still", "grows", "shrinks")
            direction = {
                "moves left": dy == 0 and dx < -4,
                "moves right": dy == 0 and dx > 4,
                "moves up": dx == 0 and dy < -4,
                "moves down": dx == 0 and dy > 4,
            }
            assert direction.get(thing.motion, (dy, dx) == (0, 0)), f"{thing}: {dy}, {dx}"
            growth = path[1, 2] / path[0, 2]
            expected = {"grows": growth > 1.5, "shrinks": growth < 1 / 1.5}
            assert expected.get(thing.motion, growth == 1), f"{thing}: {growth}"
            assert still or growth == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [4.6, 12.0])
def test_nothing_of_a_shape_is_beyond_its_extent(shape, radius):
    """EXTENT, and the half pixel that anti-aliasing adds."""
    side = np.arange(64, dtype=np.float32) + 0.5
    mask = coverage(shape, 32.0, 32.0, radius, side, side)
    assert mask.min() == 0 and mask.max() == 1
    far = np.maximum(abs(side[:, None] - 32), abs(side - 32)) > EXTENT * radius + 1.0
    assert mask[far].max() == 0
    fine = (np.arange(64 * 16, dtype=np.float32) + 0.5) / 16
    inside = SHAPES[shape]((fine - 32) / radius, ((fine - 32) / radius)[:, None]) < 0
    share = inside.reshape(64, 16, 64, 16).mean((1, 3))  # 256 points of each pixel
    assert abs(mask - share).max() < 0.3 and abs(mask.sum() / share.sum() - 1) < 0.03


# --- the two rates -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.sampled_from([8, 12, 24, 30, Fraction(24000, 1001)]),
    st.sampled_from([Fraction(1), Fraction(2), Fraction(8, 5), Fraction(3)]),
)
def test_low_rate_frames_are_those_on_screen_and_cover_the_clip(frames, fps, semantic_fps):
    config = DataConfig(frames=frames, fps=float(fps), semantic_fps=float(semantic_fps))
    found = World(config)._low_rate_frames().tolist()
    assert len(found) == config.semantic_frames and len(found) % 2 == 0
    for k, frame in enumerate(found):
        shown = [f for f in range(frames) if f / Fraction(fps) <= k / semantic_fps]
        assert frame == shown[-1], f"{k} / {semantic_fps} s shows frame {shown[-1]}, not {frame}"
    pairs = len(found) // 2
    last = Fraction(frames - 1) / fps * semantic_fps / 2  # when the last frame begins, in pairs
    assert pairs - 1 < last <= pairs or (pairs == 1 and last <= 0)


@splits
def test_the_low_rate_shows_the_same_clip(split):
    made = World(SMALL, split)
    batch = clips(split)
    assert made.semantic_video(range(40)).equal(batch.semantic_video[:40])
    assert batch.semantic_video.equal(batch.video[:, :, [0, 4, 8, 12]])


@pytest.mark.parametrize("indices", [[0], [5, 3, 5], list(range(40, 0, -1))])
def test_the_low_rate_at_another_size_shows_the_same_clip(indices):
    """Half as wide: every pixel about the mean of four of the clip's own."""
    made = World(SIZES["64x48"], "test")
    batch = made.batch(indices)
    assert batch.semantic_video.equal(made.semantic_video(indices))
    low = to_float(batch.video[:, :, made._low_rate_frames()])
    low = F.avg_pool2d(low.flatten(0, 1), 2).view_as(batch.semantic_video)
    difference = (low - to_float(batch.semantic_video)).abs().mean().item()
    assert difference < 0.02, f"mean difference {difference:.3g}"


def test_a_low_rate_of_another_aspect_is_refused():
    with pytest.raises(ValueError, match="aspect"):
        World(DataConfig(height=32, width=64, semantic_height=32, semantic_width=32))


def test_bytes_survive_as_floats():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(to_float(values)).equal(values)
    assert to_float(values).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.0])).tolist() == [0, 255, 128]


# --- the reader --------------------------------------------------------------------------------


@sizes
@splits
def test_every_clip_is_read_as_it_is_told(split, size):
    batch = clips(split, size, 150 if size == "32x32" else 60)
    wrong = misread(read_all(batch.video), batch.captions)
    assert not wrong, f"{len(wrong)} of {len(batch.captions)} misread: {wrong[:3]}"


def noisy(video: Tensor, generator: torch.Generator) -> Tensor:
    return video + 10 * torch.randn(video.shape, generator=generator)


def blurred(video: Tensor, _) -> Tensor:
    frames = F.pad(video.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(frames, 3, 1).view_as(video)


def tinted(video: Tensor, generator: torch.Generator) -> Tensor:
    """Each clip's channels shifted by up to 10."""
    return video + 10 * (2 * torch.rand(len(video), 3, 1, 1, 1, generator=generator) - 1)


def scaled(video: Tensor, generator: torch.Generator) -> Tensor:
    """Each clip's channels scaled by up to 10 %."""
    return video * (0.9 + 0.2 * torch.rand(len(video), 3, 1, 1, 1, generator=generator))


@pytest.mark.parametrize("spoil", [noisy, blurred, tinted, scaled])
def test_mild_damage_is_survived(spoil):
    """With sharp pictures alone a reader would judge a painter's blur, not what it shows."""
    batch = clips()
    spoilt = spoil(batch.video.float(), torch.Generator().manual_seed(0))
    wrong = misread(read_all(spoilt), batch.captions)
    rate = 1 - len(wrong) / len(batch.captions)
    assert rate >= 0.99, f"only {rate:.1%} read: {wrong[:3]}"  # today 100 % of each


REVERSED = {
    "moves left": "moves right",
    "moves right": "moves left",
    "moves up": "moves down",
    "moves down": "moves up",
    "grows": "shrinks",
    "shrinks": "grows",
}


@splits
def test_time_reversed_reverses_motions(split):
    batch = clips(split)
    expected = [
        caption([t._replace(motion=REVERSED.get(t.motion, t.motion)) for t in parse(text)])
        for text in batch.captions
    ]
    wrong = misread(read_all(batch.video.flip(2)), expected)
    assert not wrong, f"{len(wrong)} of 150 misread: {wrong[:3]}"


@pytest.mark.parametrize("axis, ways", [(4, ("left", "right")), (3, ("up", "down"))])
def test_mirrored_exchanges_two_directions_and_the_order_along_them(axis, ways):
    """Upside down, a triangle is none: then only colours and motions count."""
    batch, made = clips(), World(SMALL, "test")
    exchange = {f"moves {a}": f"moves {b}" for a, b in (ways, ways[::-1])}
    wrong = []
    for i, (clip, text) in enumerate(zip(batch.video.flip(axis), batch.captions, strict=True)):
        scene = [t._replace(motion=exchange.get(t.motion, t.motion)) for t in parse(text)]
        if len(scene) == 2:
            gap = abs(np.diff([path[:, :2].mean(0) for *_, path in made._layout(i)[0]], axis=0))
            scene = scene[::-1] if gap[0].argmax() == axis - 3 else scene
        found = list(read(clip))
        if axis == 3:
            scene, found = ([t._replace(shape="") for t in s] for s in (scene, found))
        wrong += [(i, found, scene)] * (found != scene)
    assert not wrong, f"{len(wrong)} of 150 misread: {wrong[:3]}"


@pytest.mark.parametrize(
    "channels, exchanged",
    [
        ((1, 0, 2), {"red": "green", "green": "red", "magenta": "cyan", "cyan": "magenta"}),
        ((0, 2, 1), {"green": "blue", "blue": "green", "yellow": "magenta", "magenta": "yellow"}),
        ((2, 1, 0), {"red": "blue", "blue": "red", "yellow": "cyan", "cyan": "yellow"}),
    ],
)
def test_exchanged_channels_exchange_colours(channels, exchanged):
    """The new colours are not quite the palette's, but nearer to it than to any other."""
    batch = clips()
    expected = [
        caption([t._replace(colour=exchanged.get(t.colour, t.colour)) for t in parse(text)])
        for text in batch.captions
    ]
    wrong = misread(read_all(batch.video[:, channels]), expected)
    assert not wrong, f"{len(wrong)} of 150 misread: {wrong[:3]}"


@splits
def test_tracks_are_where_the_layout_puts_them(split):
    """Centres of mass within half a pixel, areas within a tenth of the shape's own."""
    batch, made = clips(split), World(SMALL, split)
    grid = (np.arange(400) + 0.5) / 100 - 2
    for i in range(100):
        found = {track.colour: track for track in tracks(batch.video[i])}
        for thing, _, path in made._layout(i)[0]:
            track = found[thing.colour]
            inside = SHAPES[thing.shape](grid, grid[:, None]) < 0
            middle = (inside.sum(1) @ grid) / inside.sum()  # how far below the centre its mass is
            when = np.linspace(0, 1, SMALL.frames)[:, None]
            now = path[0] * (1 - when) + path[1] * when  # (F, 3)
            expected, radius = now[:, :2], now[:, 2:]
            expected[:, :1] += middle * radius
            gap = abs(track.centres.numpy()[:, ::-1] * 32 - expected).max()
            assert gap < 0.5, f"clip {i}, {thing}: {gap:.2f} pixels away"
            area = inside.sum() / 100**2 * radius[:, 0] ** 2
            ratio = track.areas.numpy() * 32**2 / area
            assert ratio.min() > 0.85 and ratio.max() < 1.15, f"clip {i}, {thing}: {ratio}"
            assert track.coverage.sum((1, 2)).numpy() / 32**2 == pytest.approx(track.areas.numpy())


def test_order_does_not_depend_on_the_order_of_finding():
    batch = clips()
    for clip in batch.video[:100]:
        found = tracks(clip)
        colours = [[t.colour for t in in_order(some, 32, 32)] for some in (found, found[::-1])]
        assert colours[0] == colours[1]
    assert in_order([], 32, 32) == []


@pytest.mark.parametrize(
    "x, y, told",
    [(0.3, 0.4, "first"), (0.1, 0.4, "last"), (-0.3, 0.4, "last"), (-0.1, 0.4, "last")],
)
def test_order_counts_pixels_not_shares_of_the_frame(x, y, told):
    """In a frame twice as wide as high, 0.3 of its width is more than 0.4 of its height."""
    low = Track("red", torch.full((4, 2), 0.5), torch.ones(4), torch.ones(4, 16, 32))
    high = low._replace(colour="blue", centres=torch.tensor([0.5 + x, 0.5 - y]).expand(4, 2))
    expected = [low, high] if told == "first" else [high, low]
    found = [track.colour for track in in_order([low, high], 16, 32)]
    assert found == [track.colour for track in expected]


@splits
def test_backgrounds_alone_hold_nothing(split, monkeypatch):
    layout = World._layout
    monkeypatch.setattr(World, "_layout", lambda self, i: ([], layout(self, i)[1]))
    for clip in World(SMALL, split).batch(range(200)).video:
        assert read(clip) == ()


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_plain_video_holds_nothing(value):
    assert read(torch.full((3, 16, 32, 32), value, dtype=torch.uint8)) == ()


@pytest.mark.parametrize("side, things", [(2, 0), (4, 1)])
def test_a_speck_is_no_thing(side, things):
    video = torch.full((3, 16, 32, 32), 110, dtype=torch.uint8)
    video[0, :, 10 : 10 + side, 20 : 20 + side] = 220
    video[1:, :, 10 : 10 + side, 20 : 20 + side] = 40
    assert len(read(video)) == things


@pytest.mark.parametrize("colour", COLOURS)
def test_a_frame_full_of_a_colour_is_background(colour):
    frame = torch.tensor(COLOURS[colour], dtype=torch.uint8)
    assert read(frame.view(3, 1, 1, 1).expand(3, 16, 32, 32)) == ()


@settings(max_examples=30)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(16, 32, 32), (2, 8, 40), (24, 48, 64), (16, 33, 31)]),
)
def test_noise_has_no_shape(seed, size):
    """A patch of one colour by chance may be a thing, but one that no caption tells."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    assert {thing.shape for thing in read(noise)} <= {UNCLEAR}


@settings(max_examples=30)
@given(st.integers(0, 149), st.integers(1, 16), st.integers(1, 32), st.integers(1, 32))
def test_any_part_of_a_video_can_be_read(i, frames, height, width):
    for track in tracks(clips().video[i, :, :frames, :height, :width]):
        assert track.centres.isfinite().all() and track.areas.isfinite().all()
    for thing in read(clips().video[i, :, :frames, :height, :width]):
        assert thing.colour in COLOURS
        assert thing.shape in (*SHAPES, UNCLEAR) and thing.motion in (*MOTIONS, UNCLEAR)
        assert (thing.shape, thing.motion) != (UNCLEAR, UNCLEAR)


@pytest.mark.parametrize("missing", [0, 3])
def test_an_object_may_be_missing_from_a_frame(missing):
    """As in a few frames of a generated video, or where it comes in late."""
    batch = clips()
    video = batch.semantic_video[:100].clone()
    video[:, :, missing] = 110
    found = [[(t.colour, t.shape) for t in read(clip)] for clip in video]
    told = [[(t.colour, t.shape) for t in parse(text)] for text in batch.captions[:100]]
    wrong = misread(found, told)
    assert len(wrong) <= 5, f"{len(wrong)} of 100 misread: {wrong[:3]}"


def test_one_frame_does_not_move():
    batch = clips()
    for clip, text in zip(batch.video[:50, :, :1], batch.captions, strict=False):
        found = read(clip)
        assert not found or [t.colour for t in found] == [t.colour for t in parse(text)]
        assert {thing.motion for thing in found} <= {"stays still"}


@pytest.mark.parametrize("size", [(0, 32, 32), (16, 0, 32), (16, 32, 0)])
def test_no_pixels_hold_nothing(size):
    assert read(torch.zeros(3, *size, dtype=torch.uint8)) == ()
