"""run.py: what is read from a run folder against what was written, and files that are not ours.

A file that is damaged, foreign, of another version or hostile gives one line that a user can act on
(UserError) and nothing else: no traceback, no code run, no half-written file in its place.
`micro` and `random_run` (a run of random weights: no training) serve the other tests as well.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import run as run_module
from config import tiny
from plumbing.device import computing, faster_dtype
from plumbing.fields import flat_fields
from plumbing.files import UserError, command, sweep, write_file
from plumbing.folder import write_state
from run import HELD, Run, export
from semantic import Compressor
from settings import Config, override
from stages import ORDER, learner

PIXELS = ("data.height", "data.width", "data.semantic_height", "data.semantic_width")
MICRO = [  # one second of 16 x 16 pixels, the smallest of everything; 6 steps on 8 clips
    "dtype=float32",
    "data.frames=8",
    *(f"{name}=16" for name in PIXELS),
    *("vae.width=8", "vae.blocks=1", "compressor.hidden=16", "compressor.channels=4"),
    *("encoder.dim=32", "encoder.blocks=1", "encoder.heads=2", "encoder.caption_blocks=1"),
    *(f"{dit}.{field}" for dit in ("latent", "semantic") for field in ("width=32", "heads=2")),
    *("latent.context_channels=4", "semantic.channels=4", "latent.depth=1", "semantic.depth=1"),
    *(f"stages.{s}.{f}" for s in ORDER for f in ("steps=6", "batch=3", "clips=8", "warmup=2")),
    *("sample.steps=2",),
]


def micro(*settings: str) -> Config:
    """Return the tiny preset, made smaller, with a test's own settings on top."""
    return override(tiny(), [*MICRO, *settings])


def modules_of(run: Run, stage: str) -> torch.nn.ModuleDict:
    """Return what a stage's weights file holds, freshly initialised."""
    compressor = Compressor(run.config.encoder.dim, run.config.compressor)
    modules = learner(run.config, stage, ["a red circle"], compressor)
    return torch.nn.ModuleDict({name: modules[name] for name in HELD[stage]})


def random_run(path: Path, *settings: str, stages=ORDER) -> Run:
    """Return a run with random weights: as if trained, and every condition matters in it."""
    run = Run.create(path, micro(*settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for stage in stages:
            modules = modules_of(run, stage)
            for parameter in modules.parameters():
                if not parameter.any():  # what starts at zero would hide what feeds it
                    torch.nn.init.normal_(parameter, std=0.2)
            run.save(stage, modules.state_dict(), {})
    return run


def call(main, *argv) -> int:
    """Run a command line's main in this process; return its exit code."""
    before, sys.argv = sys.argv, [main.__module__, *map(str, argv)]
    try:
        command(main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def one_line(capsys, *words: str):
    """Check that all of stderr is one line with these words."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert all(word in error for word in words), error


def loaded(run: Run, stage: str) -> torch.nn.ModuleDict:
    """Return a stage's parts as a run loads them, under the names that its weights file has."""
    parts = {name: getattr(run, part) for name, part in HELD[stage].items()}
    return torch.nn.ModuleDict(parts)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", micro())


def edit(run: Run, **changes):
    """Change the top level of a run's config.json; None removes."""
    file = run.path / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# --- the folder and its configuration -----------------------------------------------------------


def test_a_created_run_opens_as_itself(run):
    opened = Run.open(run.path)
    assert opened.config == run.config
    assert [type(x) for x in flat_fields(opened.config).values()] == [
        type(x) for x in flat_fields(run.config).values()
    ]
    content = json.loads((run.path / "config.json").read_text())
    assert content["versions"]["torch"] == torch.__version__ and content["versions"]["commit"]


def test_creating_twice_with_the_same_settings_is_opening(run):
    assert Run.create(run.path, micro()).config == run.config


def test_creating_over_other_settings_names_them(run):
    other = micro("latent.width=64", "stages.latent.batch=5", "sample.steps=7")
    with pytest.raises(UserError) as error:
        Run.create(run.path, other)
    assert "latent.width 32 -> 64" in str(error.value)
    assert "stages.latent.batch 3 -> 5" in str(error.value)
    assert "sample.steps" not in str(error.value) and "\n" not in str(error.value)
    assert Run.open(run.path).config == run.config  # nothing was changed


def test_steps_and_sampling_defaults_may_change(run):
    other = micro("stages.vae.steps=9", "sample.steps=7", "sample.guidance=1.5")
    other = override(other, ["stages.vae.compile=true", "stages.base.accumulate=3"])
    assert Run.create(run.path, other).config == other
    assert Run.open(run.path).config == other


def test_auto_dtype_is_settled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "faster_dtype", lambda device: "bfloat16")
    assert Run.create(tmp_path, micro("dtype=auto")).config.dtype == "bfloat16"
    monkeypatch.setattr(run_module, "faster_dtype", lambda device: "float32")
    assert Run.create(tmp_path, micro("dtype=auto")).config.dtype == "bfloat16"
    with pytest.raises(UserError, match="dtype bfloat16 -> float32"):
        Run.create(tmp_path, micro("dtype=float32"))


def test_faster_dtype_is_one_that_computing_takes():
    device = torch.device("cpu")
    dtype = faster_dtype(device)
    assert dtype in ("bfloat16", "float32")
    with computing(device, dtype):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert str(product.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("content", [None, "foreign"])
def test_a_folder_that_is_no_run(tmp_path, content):
    if content:
        (tmp_path / "notes.txt").write_text(content)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"is no run.* train one: python train\.py"):
            Run.open(path)


BROKEN = {
    "empty": b"",
    "cut off": b'{"format": 2, "conf',
    "a list": b"[]",
    "a foreign object": b'{"name": "another project"}',
    "no fields": b'{"format": 2, "config": {}}',
    "fields in a list": b'{"format": 2, "config": []}',
    "no text": b"\xff\xfe\x00\x80",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_configuration(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        Run.open(tmp_path)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_configuration_of_another_format(run):
    edit(run, format=99)
    with pytest.raises(UserError, match="format 99, this version reads 3"):
        Run.open(run.path)


def test_a_configuration_with_other_fields(run):
    fields = flat_fields(run.config)
    edit(run, config={**fields, "latent.colour": 3})
    with pytest.raises(UserError, match=r"another version.*latent\.colour"):
        Run.open(run.path)
    without = {name: x for name, x in fields.items() if name != "latent.channels"}
    edit(run, config=without)
    with pytest.raises(UserError, match=r"latent\.channels"):
        Run.open(run.path)


def test_a_field_newer_than_the_run_has_its_default(run):
    fields = flat_fields(run.config)
    del fields["stages.vae.accumulate"]
    edit(run, config=fields)
    assert Run.open(run.path).config == run.config


@pytest.mark.parametrize("change", [{"latent.width": 30}, {"latent.width": "wide"}])
def test_a_configuration_with_impossible_values(run, change):
    edit(run, config=flat_fields(run.config) | change)
    with pytest.raises(UserError):
        Run.open(run.path)


def test_forgetting_a_stage_forgets_what_was_trained_on_it(tmp_path):
    run = random_run(tmp_path)
    for stage in ORDER:
        write_state(run.state_file(stage), {"step": 1})
    run.forget("encoder")
    assert [s for s in ORDER if run.has(s)] == ["vae", "base"]
    assert [s for s in ORDER if run.state_file(s).exists()] == ["vae", "base"]


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ORDER)
def test_weights_come_back_exactly(run, stage):
    tensors = modules_of(run, stage).state_dict()
    run.save(stage, tensors, {"steps": 7, "of": 9})
    assert run.steps_of(stage) == 7 and run.has(stage) and not run.finished(stage)
    found = loaded(run, stage)
    assert found.state_dict().keys() == tensors.keys()
    assert all(torch.equal(x, tensors[name]) for name, x in found.state_dict().items())
    assert not any(module.training for module in found.children())
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_parts_are_the_saved_ones_and_kept(tmp_path):
    run = random_run(tmp_path)
    parts = {"vae": run.vae, "encoder": run.encoder, "semantic": run.planner, "base": run.base}
    for stage, part in parts.items():
        saved = load_file(run.weights_file(stage))
        found = {f"{next(iter(HELD[stage]))}.{name}": x for name, x in part.state_dict().items()}
        assert all(torch.equal(found[name], x) for name, x in saved.items())
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert run.painter is run.painter and run.compressor is run.compressor
    before = run.planner
    run.let_go("planner")
    assert run.planner is not before and run.painter is run.painter


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    run = random_run(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    _ = run.vae, run.encoder, run.compressor, run.painter, run.planner, run.base
    assert torch.equal(torch.rand(4), expected)


def test_missing_weights_say_how_to_get_them(run):
    with pytest.raises(UserError, match=r"has no semantic\.safetensors yet: python train\.py"):
        _ = run.planner


def foreign_weights(run: Run) -> dict[str, bytes]:
    file = run.weights_file("vae")
    whole = file.read_bytes()
    tensors = load_file(file)
    out = {"empty": b"", "text": b"not weights at all", "zeros": bytes(100)}
    out |= {"header cut off": whole[:50], "data cut off": whole[:-10], "longer": whole + b"1234"}
    out["a pickle"] = pickle.dumps({"vae": 1})
    name = next(iter(tensors))
    changes = {
        "a tensor missing": {k: x for k, x in tensors.items() if k != name},
        "a tensor more": {**tensors, "vae.more": torch.zeros(1)},
        "another shape": {**tensors, name: torch.zeros(3, 3)},
        "other keys": {f"model.{k}": x for k, x in tensors.items()},
    }
    for label, changed in changes.items():
        save_file(changed, file)
        out[label] = file.read_bytes()
    return out


def test_weights_that_do_not_fit_are_refused(run):
    run.save("vae", modules_of(run, "vae").state_dict(), {})
    foreign = foreign_weights(run)
    for label, content in foreign.items():
        run.weights_file("vae").write_bytes(content)
        with pytest.raises(UserError, match=r"vae\.safetensors does not fit") as error:
            _ = run.vae
        assert "\n" not in str(error.value), label


def test_weights_of_another_configuration_are_refused(run, tmp_path):
    wider = Run.create(tmp_path / "wider", micro("vae.width=16"))
    wider.save("vae", modules_of(wider, "vae").state_dict(), {})
    run.weights_file("vae").write_bytes(wider.weights_file("vae").read_bytes())
    with pytest.raises(UserError, match="size mismatch"):
        _ = run.vae


def test_exported_weights_are_half_as_large_and_load(tmp_path, capsys):
    run = random_run(tmp_path / "run")
    target = tmp_path / "out"
    export(run.path, target)
    assert "vae, encoder, latent, semantic" in capsys.readouterr().out
    small = Run.open(target)
    assert small.config == run.config
    assert [s for s in ORDER if small.has(s)] == ["vae", "encoder", "latent", "semantic"]
    for stage in ("vae", "encoder", "latent", "semantic"):
        tensors = load_file(small.weights_file(stage))
        assert {x.dtype for x in tensors.values()} == {torch.float16}
        found, original = loaded(small, stage).state_dict(), load_file(run.weights_file(stage))
        for name, x in original.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], x.half().float()), name
    assert not [path for path in target.iterdir() if path.suffix == ".state"]


def test_parts_are_read_without_initial_values(tmp_path, monkeypatch):
    """Which take minutes at the paper's sizes; what no file holds is there nevertheless."""
    run = random_run(tmp_path / "run")
    expected = {stage: modules_of(run, stage) for stage in ORDER}
    drawn = []
    for name in ("normal_", "uniform_"):
        fill = getattr(torch.Tensor, name)
        watched = lambda x, *a, fill=fill, **k: drawn.append(x) or fill(x, *a, **k)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, watched)
    for stage in ORDER:
        found = dict(loaded(run, stage).named_buffers())
        for name, part in expected[stage].items():
            for buffer, value in part.named_buffers():
                assert found[f"{name}.{buffer}"].device == run.device
                if f"{name}.{buffer}" not in part.state_dict(prefix=f"{name}."):
                    assert torch.equal(found[f"{name}.{buffer}"], value), buffer
    assert all(x.is_meta for x in drawn)


def test_exporting_nothing_or_onto_itself_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="no weights"):
        export(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run.save("vae", modules_of(run, "vae").state_dict(), {})
    with pytest.raises(UserError, match="another folder"):
        export(run.path, run.path)
    assert {x.dtype for x in load_file(run.weights_file("vae")).values()} == {torch.float32}


def test_exporting_over_anothers_settings_is_refused(tmp_path):
    run = random_run(tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "thumbnails"}')
    with pytest.raises(UserError, match="is not a run's configuration"):
        export(run.path, tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.json"]


def test_what_is_exported_does_not_ask_for_a_base(tmp_path):
    """The control of an older VAE, which is not exported, stops nothing."""
    run = random_run(tmp_path / "run")
    run.save("base", load_file(run.weights_file("base")), {"made_of": {"vae": "another"}})
    export(run.path, tmp_path / "out")
    assert Run.open(tmp_path / "out").has("vae") and not Run.open(tmp_path / "out").has("base")


# --- training states ----------------------------------------------------------------------------


def test_states_come_back_exactly(run):
    assert run.load_state("vae") is None
    tensors = {"a": torch.randn(3), "b": [torch.arange(4), torch.zeros(2, dtype=torch.bfloat16)]}
    write_state(run.state_file("vae"), {"step": 7, "seconds": 1.5, **tensors})
    state = run.load_state("vae")
    assert (state["step"], state["seconds"]) == (7, 1.5)
    assert torch.equal(state["a"], tensors["a"])
    assert all(torch.equal(x, y) for x, y in zip(state["b"], tensors["b"], strict=True))


class Payload:
    """What an attacker would put into a state: unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch.save", "torch.save, old format", "pickle"])
def test_a_state_never_runs_what_it_carries(run, tmp_path, how):
    made = tmp_path / "made by the payload"
    state = {"step": 1, "modules": Payload(made)}
    file = run.state_file("vae")
    if how == "pickle":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(UserError, match=r"is not a training state .*--fresh starts over") as error:
        run.load_state("vae")
    assert "\n" not in str(error.value)
    assert not made.exists()
    if how == "pickle":  # the payload is a real one
        pickle.loads(file.read_bytes())
        assert made.exists()


def test_too_little_memory_is_no_damage(run, monkeypatch):
    """Nobody is told to throw a good file away."""

    def greedy(*_, **__):
        torch.empty(2**60, dtype=torch.uint8)

    run.state_file("vae").write_bytes(b"good")
    run.save("vae", {}, {})
    monkeypatch.setattr(torch, "load", greedy)
    monkeypatch.setattr(run_module, "read_weights", greedy)
    for read in (lambda: run.load_state("vae"), lambda: run.vae):
        with pytest.raises(RuntimeError, match="allocate memory"):
            read()


@pytest.mark.parametrize("keep", [0, 10, 500, -20])
def test_a_state_cut_off_is_refused(run, keep):
    write_state(run.state_file("vae"), {"step": 7, "modules": {"x": torch.zeros(1000)}})
    whole = run.state_file("vae").read_bytes()
    run.state_file("vae").write_bytes(whole[:keep])
    with pytest.raises(UserError, match="is not a training state"):
        run.load_state("vae")


# --- writing ------------------------------------------------------------------------------------


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_file(path, b"first")
    write_file(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_killed_writers_left_is_swept_away(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = tmp_path / f".file.{process.pid}.tmp", tmp_path / f".file.{os.getpid()}.tmp"
    names = ("file", "file.1.tmp", ".file", ".notes.tmp", ".my.notes.tmp")  # others' files
    others = [tmp_path / name for name in names]
    for path in (dead, alive, *others):
        path.touch()
    sweep(tmp_path)
    assert not dead.exists() and alive.exists() and all(path.exists() for path in others)


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    write_file(tmp_path / ("n" * 255), b"x")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"x"


def test_what_starts_over_takes_its_own_cache_alone(run):
    """A folder of that name may be the user's."""
    ours, theirs = run.path / "cache" / "cache.json", run.path / "cache" / "notes"
    theirs.parent.mkdir()
    theirs.touch()
    run.forget("vae")
    assert theirs.exists()
    ours.touch()
    run.forget("vae")
    assert not theirs.exists()


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    write_file(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UserError, FileNotFoundError])
def test_what_a_user_can_put_right_is_one_line_and_exit_code_2(capsys, kind):
    def main():
        raise kind("the width is odd: choose an even one")

    with pytest.raises(SystemExit) as stop:
        command(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the width is odd: choose an even one\n"


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError])
def test_what_is_our_own_fault_shows_where(kind):
    def main():
        raise kind("a bug")

    with pytest.raises(kind, match="a bug"):
        command(main)


def test_export_on_the_command_line(tmp_path, capsys):
    run = random_run(tmp_path / "run", stages=["vae"])
    assert call(run_module.main, "export", run.path, tmp_path / "out") == 0
    assert Run.open(tmp_path / "out").has("vae")
    capsys.readouterr()
    assert call(run_module.main, "export", tmp_path / "nothing", tmp_path / "out") == 2
    one_line(capsys, "is no run")
