"""config.py: text to configuration and back, and what happens to settings that cannot be.

The rule for anything a user can type: either a configuration whose parts fit each other, or a
UserError of one line that names the field. Property tests type a great many things.
"""

import dataclasses
import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import PRESETS, attention_window, paper, preset, shapes, tiny
from model import DiT, DiTConfig
from plumbing.fields import build, field_types, flat_fields, parse_value
from plumbing.files import UserError
from semantic import Compressor
from settings import Config, check_fit, override
from stages import ORDER
from toy.encoder import TinyEncoder
from toy.text import HashText
from toy.vae import TinyVAE

TINY = tiny()
FIELDS = flat_fields(TINY)
presets = pytest.mark.parametrize("preset", PRESETS)


def refusal(*settings: str, config: Config = TINY) -> str:
    """Return the one line that these settings are refused with."""
    with pytest.raises(UserError) as error:
        override(config, list(settings))
    assert str(error.value) and "\n" not in str(error.value), str(error.value)
    return str(error.value)


# --- presets -----------------------------------------------------------------------------------


@presets
def test_a_preset_names_itself_and_fits(preset):
    config = PRESETS[preset]()
    assert config.preset == preset
    check_fit(config)
    assert config == PRESETS[preset]()  # nothing of it is drawn or shared


@presets
def test_the_tokens_line_up(preset):
    """By hand: both streams last as long as the clip; a wave spans two tokens at the finest."""
    config = PRESETS[preset]()
    data, vae = config.data, config.vae
    frames = data.frames - vae.first  # a causal VAE's first frame is a latent frame by itself
    T, height, _ = vae.grid(data.frames, data.height, data.width)
    S, plan_height, _ = config.encoder.grid(
        data.semantic_frames, data.semantic_height, data.semantic_width
    )
    assert (T - vae.first) / config.latent.rate == frames / data.fps
    assert S / config.semantic.rate == pytest.approx(frames / data.fps)
    if isinstance(config.latent, DiTConfig):
        assert config.latent.space_cycles == height / config.latent.patch / 2
        assert config.semantic.space_cycles == plan_height / 2
    else:
        assert config.latent.rows == config.semantic.rows == height / config.latent.patch


def test_every_stage_has_its_settings():
    assert tuple(field.name for field in dataclasses.fields(TINY.stages)) == ORDER


def test_a_configuration_cannot_be_changed_behind_its_checks():
    for part in (TINY, TINY.data, TINY.latent, TINY.stages, TINY.stages.vae, TINY.sample):
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, getattr(part, name))


# --- to text and back --------------------------------------------------------------------------


@presets
def test_flat_fields_and_build_undo_each_other(preset):
    config = PRESETS[preset]()
    fields = flat_fields(config)
    assert build(Config, fields) == config
    assert list(fields) == list(field_types(Config, fields))
    assert not any(dataclasses.is_dataclass(value) for value in fields.values())
    assert fields["latent.window"] == config.latent.window
    assert fields["stages.vae.lr"] == config.stages.vae.lr


def test_every_value_has_the_type_its_field_declares():
    """Or `--set` would read back another type than the preset has."""
    for name, kind in field_types(Config, flat_fields(tiny())).items():
        assert isinstance(FIELDS[name], kind), f"{name}: {FIELDS[name]!r} is no {kind}"


@presets
def test_setting_every_field_to_what_it_is_changes_nothing(preset):
    config = PRESETS[preset]()
    fields = flat_fields(config).items()
    same = [f"{name}={value}" for name, value in fields if not name.endswith(".class")]
    assert override(config, same) == config


def test_no_settings_change_nothing():
    assert override(TINY, []) == TINY


def test_a_window_that_only_longer_videos_need_is_checked_as_well():
    with pytest.raises(UserError, match=r"a window of 3\.0 s, and half of it, must"):
        override(TINY, ["latent.window=3"])


def test_an_encoder_that_could_not_be_built_is_refused():
    with pytest.raises(UserError, match="dim 100: must divide by 16"):
        override(TINY, ["encoder.dim=100"])


def test_videos_too_short_for_the_events_have_sizes():
    assert shapes(PRESETS["tiny_long"](), 1.0)["video"][1] == 8


# --- settings that fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, name, value",
    [
        ("latent.width=192", "latent.width", 192),
        ("stages.vae.steps=7", "stages.vae.steps", 7),
        ("stages.latent.lr=3e-4", "stages.latent.lr", 3e-4),
        ("sample.guidance=3", "sample.guidance", 3.0),
        ("latent.time_features=False", "latent.time_features", False),
        ("latent.time_features=true", "latent.time_features", True),
        ("semantic.window=4.0", "semantic.window", 4.0),
        ("semantic.window=None", "semantic.window", None),
        ("stages.latent.optimizer=adamw", "stages.latent.optimizer", "adamw"),
        ("dtype=float32", "dtype", "float32"),
        ("preset=mine", "preset", "mine"),
        ("preset=a=b", "preset", "a=b"),
        ("words=8", "text.words", 8),  # the last part alone, where only one has it
        ("compressor.noise=0.5", "compressor.noise", 0.5),
        ("latent_guidance=1", "sample.latent_guidance", 1.0),
        ("vae.steps=9", "stages.vae.steps", 9),
    ],
)
def test_a_setting_changes_its_field_alone(setting, name, value):
    found = flat_fields(override(TINY, [setting]))
    changed = {field for field in found if found[field] != FIELDS[field]}
    assert found[name] == value and type(found[name]) is type(value)
    assert changed <= {name}, f"{setting} changed {changed}"
    assert type(found[name]) is type(value)


def test_settings_that_fit_only_together_are_taken_together_and_the_last_one_wins():
    assert "latent.rate is 3.0, but the other parts need 2.0" in refusal("latent.rate=3")
    assert override(TINY, ["vae.time_patch=2"]).latent.rate == 4  # follows
    assert override(TINY, ["vae.time_patch=2", "latent.rate=4"]).latent.rate == 4
    both = ["data.semantic_fps=4", "data.fps=16", "compressor.channels=5"]
    made = override(TINY, both)
    assert made == override(TINY, both[::-1])
    assert made.latent.context_rate == made.semantic.rate == made.encoder.rate == 2
    assert made.latent.context_channels == made.semantic.channels == 5
    assert override(TINY, ["latent.width=64", "latent.width=192"]).latent.width == 192


def test_false_is_false():
    """bool("False") is True."""
    for text in ("False", "false", "FALSE"):
        assert parse_value(text, bool, "x") is False
    for text in ("True", "true"):
        assert parse_value(text, bool, "x") is True


# --- settings that do not ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, near",
    [
        ("latent.widht=64", "latent.width"),
        ("latnet.depth=4", "latent.depth"),
        ("sample.guidence=2", "sample.guidance"),
        ("compresor.noise=1", "compressor.noise"),
        ("stages.vae.leraning=1", "stages.vae."),
    ],
)
def test_an_unknown_field_names_the_near_ones(setting, near):
    message = refusal(setting)
    name = setting.partition("=")[0]
    assert message.startswith(f"--set {name}: no such field; near ones: ")
    assert near in message.partition("near ones: ")[2], message


def test_a_name_that_several_parts_have_names_them():
    message = refusal("lr=1e-3")
    assert "could be any of" in message
    for stage in ORDER:
        assert f"stages.{stage}.lr" in message


@pytest.mark.parametrize(
    "setting, kind",
    [
        ("latent.width=wide", "int"),
        ("latent.width=1.5", "int"),
        ("latent.width=", "int"),
        ("latent.width=none", "int"),
        ("sample.guidance=two", "float"),
        ("latent.window=two", "float"),
        ("latent.time_features=maybe", "bool"),
        ("latent.time_features=1", "bool"),
    ],
)
def test_a_value_of_another_type_is_refused(setting, kind):
    assert refusal(setting) == f"{setting}: expected {kind}"


def test_a_setting_without_a_value_is_refused():
    assert "expected field=value" in refusal("latent.width")


@pytest.mark.parametrize(
    "name, value, fits",
    [
        ("latent.channels", 5, 8),
        ("latent.rate", 3.0, 2.0),
        ("latent.context_channels", 5, 8),
        ("latent.context_rate", 2.0, 1.0),
        ("latent.text_dim", 32, 64),
        ("semantic.channels", 5, 8),
        ("semantic.rate", 2.0, 1.0),
        ("semantic.text_dim", 32, 64),
        ("encoder.rate", 2.0, 1.0),
    ],
)
def test_parts_that_do_not_fit_are_refused(name, value, fits):
    assert refusal(f"{name}={value}") == f"{name} is {value}, but the other parts need {fits}"


@pytest.mark.parametrize(
    "setting, named",
    [
        ("data.frames=18", "video of 18 frames"),
        ("data.height=30", "video of 16 frames, 30 x 32"),
        ("data.semantic_width=30", "semantic video of 4 frames, 32 x 30"),
        ("latent.patch=3", "patches of 3"),
        ("latent.heads=3", "width 128 over 3 heads"),
        ("semantic.width=101", "width 101 over 2 heads"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(setting, named):
    assert named in refusal(setting)


def test_a_part_that_does_not_fit_is_refused_however_it_came():
    with pytest.raises(UserError, match=r"latent\.channels is 9"):
        replace(TINY, latent=replace(TINY.latent, channels=9))


# --- anything at all ---------------------------------------------------------------------------

numbers = [0, 1, 2, 3, 5, 7, -1, -4, 0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf]
texts = [
    "",
    "none",
    "None",
    "true",
    "x",
    "1e",
    "0x10",
    "1_0",
    "\u0663",
    "=",
    "a=b",
    " 4 ",
    "\ud800",
]
odd = st.sampled_from(numbers + texts)
some_field = st.sampled_from(sorted(FIELDS))
settings_of_a_field = st.builds("{}={}".format, some_field, odd)
settings_of_a_part = st.builds(
    "{}={}".format,
    st.sampled_from([name for name in sorted(FIELDS) if not name.startswith("stages.")]),
    odd,
)


def accepted(junk: list[str]) -> Config | None:
    """Return the configuration, None if it is refused in one line; anything else is raised."""
    try:
        return override(TINY, junk)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), repr(str(error))
        return None


@lru_cache(maxsize=4096)
def built(kind: type, *sizes) -> torch.nn.Module:
    with torch.device("meta"):  # no memory, no arithmetic: shapes alone
        return kind(*sizes).to("meta")  # also buffers that are in no file


@lru_cache(maxsize=4096)
def try_dit(config, grid: tuple[int, ...], context: tuple[int, ...] | None):
    with torch.device("meta"):
        z, text = torch.empty(1, config.channels, *grid), torch.empty(1, 2, config.text_dim)
        plan = None if context is None else torch.empty(1, config.context_channels, *context)
        built(DiT, config)(z, torch.empty(1), text, plan)


def try_all(config: Config):
    """Build every part, and show the DiTs what they will see."""
    data = config.data
    vae, encoder = built(TinyVAE, config.vae), built(TinyEncoder, config.encoder)
    built(Compressor, config.encoder.dim, config.compressor)
    HashText(config.text)
    latents = vae.config.grid(data.frames, data.height, data.width)
    plan = encoder.config.grid(data.semantic_frames, data.semantic_height, data.semantic_width)
    try_dit(config.latent, latents, plan)
    try_dit(replace(config.latent, context_channels=0), latents, None)
    try_dit(config.semantic, plan, None)


# Without line ends, which the refusal of a name repeats.
junk = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=9)


@settings(max_examples=60)
@given(st.lists(junk | st.builds("{}={}".format, junk, odd), max_size=3))
def test_junk_names_raise_nothing_but_user_errors(junk):
    accepted(junk)


@settings(max_examples=40)
@given(st.lists(settings_of_a_field | settings_of_a_part, min_size=1, max_size=2))
def test_junk_values_raise_nothing_but_user_errors(junk):
    config = accepted(junk)
    if config is not None:  # what is taken can be written down and read back, and run
        assert build(Config, flat_fields(config)) == config
        try_all(config)


PARTS = ("data", "vae", "text", "encoder", "compressor", "latent", "semantic")


@pytest.mark.parametrize(
    "name",
    [name for name in FIELDS if name.startswith(PARTS)],
)
def test_a_field_of_a_part_takes_what_can_be_run_and_refuses_the_rest(name):
    for value in (0, -1, 3, 1e300, "nan", "inf", "x", ""):
        config = accepted([f"{name}={value}"])
        if config is not None:
            try_all(config)


@pytest.mark.parametrize(
    "setting",
    [
        "data.objects=0",
        "data.objects=3",
        "stages.latent.optimizer=sgd",
        "stages.base.time=normal",
        "dtype=float8",
    ],
)
def test_a_choice_that_is_none_is_refused_before_anything_is_trained(setting):
    assert setting.partition("=")[2] in refusal(setting)


@pytest.mark.parametrize("preset", ["tiny", "small"])  # paper needs weights
def test_a_preset_can_be_run(preset):
    try_all(PRESETS[preset]())


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("paper", ["encoder.dtype=flaot32"], "encoder.dtype=flaot32: choose float32, bfloat16"),
        ("paper", ["vae.dtype=auto"], "vae.dtype=auto: choose float32, bfloat16"),
        ("tiny", ["stages.vae.pieces=8"], "multiples of 4 frames"),
        ("tiny", ["stages.encoder.pieces=3"], "do not divide by it"),
        ("tiny", ["stages.base.pieces=3"], "2 equal stretches, which do not divide by it"),
        ("wan", ["stages.latent.pieces=2"], "1 equal stretches, which do not divide by it"),
        ("tiny", ["data.height=1000000", "data.width=1000000"], "fills any memory"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(name, changes, words):
    with pytest.raises(UserError, match=words):
        override(preset(name), changes)


def test_a_window_of_many_clips_is_checked_in_little_time():
    """By frames alone: of so many clips the tokens would not fit into memory."""
    assert override(paper(), ["latent.window=100000.0"]).latent.window == 100000.0


@pytest.mark.parametrize("name, full", [("paper", True), ("tiny", True), ("wan", False)])
def test_a_window_that_holds_the_clip_is_told(name, full, capsys):
    attention_window(preset(name))
    assert ("attention is full" in capsys.readouterr().out) == full
