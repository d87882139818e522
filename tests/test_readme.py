"""README against the code: every symbol, file and field that it names exists."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
from test_run import MICRO

import semantic
from config import Config, override, tiny
from plumbing.fields import field_types, flat_fields

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SYMBOLS = sorted(set(re.findall(r"`([\w/]+)\.py::([\w.]+)`", README)))
FILES = sorted(
    set(re.findall(r"[\w/]+\.(?:py|txt|png|toml)\b", README)) - {"one.txt", "thumbnails.py"}
)
FIELDS = sorted(set(re.findall(r"`((?:stages|sample|compressor|latent)\.(?!py)[\w.*]+)`", README)))


def test_the_map_is_not_empty():
    assert len(SYMBOLS) > 20 and len(FIELDS) > 5


@pytest.mark.parametrize(("module", "symbol"), SYMBOLS)
def test_symbol_exists(module, symbol):
    found = importlib.import_module(module.replace("/", "."))
    for name in symbol.split("."):
        found = getattr(found, name)


@pytest.mark.parametrize("name", FILES)
def test_file_exists(name):
    if not name.startswith(("clips/", "samples/", "runs/")):
        assert (ROOT / name).exists(), f"README names {name}"


@pytest.mark.parametrize("name", FIELDS)
def test_field_exists(name):
    pattern = re.escape(name).replace(r"\*", r"\w+")
    assert any(re.match(pattern, field) for field in flat_fields(tiny())), name


def test_every_module_of_the_project_is_in_the_file_list():
    listed = README[README.index("## Files") :]
    for file in ROOT.glob("*.py"):
        assert f"`{file.name}`" in listed, f"{file.name} is missing from README's list of files"


def test_overrides_shown_in_the_quick_start_are_valid():
    shown = re.search(r"`--set ([^`]+)`", README).group(1).split()
    changed = flat_fields(override(tiny(), shown))
    for setting in shown:
        name, value = setting.split("=")
        assert name in field_types(Config, changed) and str(changed[name]) == value


def test_the_shown_encoder_is_complete(tmp_path, monkeypatch):
    """The README's own file, run as it says, trains and paints from a reference."""
    (code,) = re.findall(r"```python\n(# thumbnails.*?)```", README, re.DOTALL)
    script, run = tmp_path / "thumbnails.py", tmp_path / "run"
    script.write_text(code)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text('{"model_type": "thumbnails"}')
    monkeypatch.setitem(semantic.ENCODERS, "thumbnails", None)  # undone in the end
    settings = [x for x in MICRO if not x.startswith("encoder.")]
    train = ["train.py", "--stage", "latent", "--tiny", "--encoder", tmp_path / "weights"]
    sample = ["sample.py", "--run", run, "--reference", ROOT / "assets" / "samples.png"]
    for command in (
        [*train, "--out", run, "--set", *settings],
        [*sample, "--out", tmp_path / "out.png"],
    ):
        command[0] = ROOT / command[0]
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, command)])
        runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "out.png").exists() and not (run / "encoder.safetensors").exists()
