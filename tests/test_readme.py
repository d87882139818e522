"""README and docs against the code: what they name exists, and what they show runs."""

import argparse
import importlib
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from test_run import MICRO

import semantic
import train
from config import main, shapes, tiny, wan_tiny
from plumbing.fields import field_types, flat_fields
from plumbing.files import read_json
from settings import Config, override

ROOT = Path(__file__).parent.parent
PAGES = {
    str(p.relative_to(ROOT)): p.read_text() for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
}
TEXT = "\n".join(PAGES.values())
DRAWING = (ROOT / "assets" / "stages.svg").read_text()
MODULES = [p for folder in (".", "toy", "plumbing") for p in (ROOT / folder).glob("[!_]*.py")]
# Files of a reader's own.
THEIRS = ("clips/", "samples/", "runs/", "one.txt", "thumbnails.py", "loss.png")

SYMBOLS = sorted(set(re.findall(r"\b([\w/]+)\.py::([\w.]+)", TEXT + DRAWING)))
FILES = sorted(set(re.findall(r"(?:\.\./)*\w[\w/-]*\.(?:py|txt|png|svg|toml)\b", TEXT)))
FIELDS = sorted(set(re.findall(rf"`((?:{'|'.join(vars(tiny()))})\.(?!py\b)[\w.*]+)`", TEXT)))
LINKS = [
    (page, target)
    for page, content in PAGES.items()
    for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', content)
    for target in target
    if target and not target.startswith("https://")
]
PROTOCOLS = [
    found
    for module in map(importlib.import_module, ("vae", "semantic", "text"))
    for found in vars(module).values()
    if getattr(found, "_is_protocol", False) and found.__module__ == module.__name__
]


def shown_commands() -> list[str]:
    """Return the project's own commands that the pages show, in blocks and in the text."""
    text = TEXT.replace("\\\n", " ")
    lines = re.findall(r"^(?:python|torchrun .*?(?=\w+\.py)).*", text, re.MULTILINE)
    lines += re.findall(r"`(python [^`]+)`", text)
    return sorted({line for line in lines if ".py" in line})


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_is_something_to_check():
    assert len(SYMBOLS) > 30 and len(FIELDS) > 15 and len(LINKS) > 15 and len(FILES) > 25
    assert len(shown_commands()) > 20 and len(PROTOCOLS) == 6


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


@pytest.mark.parametrize(("module", "symbol"), SYMBOLS)
def test_symbol_exists(module, symbol):
    found = importlib.import_module(module.replace("/", "."))
    for name in symbol.split("."):
        assert hasattr(found, name), f"{module}.py has no {symbol}"
        found = getattr(found, name)


@pytest.mark.parametrize("name", FILES)
def test_file_exists(name):
    folders = (ROOT, ROOT / "docs", ROOT / "plumbing")
    assert name.startswith(THEIRS) or any((folder / name).exists() for folder in folders)


@pytest.mark.parametrize("name", FIELDS)
def test_field_exists(name):
    pattern = re.escape(name).replace(r"\*", r"\w+")
    known = flat_fields(tiny()) | flat_fields(wan_tiny())
    assert any(re.fullmatch(pattern, field) for field in known), name


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_link_leads_somewhere(page, target):
    name, _, anchor = target.partition("#")
    file = ((ROOT / page).parent / name).resolve() if name else ROOT / page
    assert file.exists() and file.is_relative_to(ROOT), f"{page}: {target}"
    assert not anchor or anchor in anchors(file.read_text()), f"{page}: {target}"


def test_readme_links_every_page():
    for page in PAGES.keys() - {"README.md"}:
        assert f"]({page})" in PAGES["README.md"]


def test_verdicts_are_those_of_the_results():
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]* \| (\w[\w ]*\w)[:;] ", PAGES["README.md"], re.MULTILINE
    )
    kept = (read_json(file) for file in (ROOT / "results").glob("*/conclusion.json"))
    assert dict(rows) == {found["experiment"]: found["verdict"] for found in kept}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_contracts_name_all_that_a_protocol_asks_for(protocol):
    page, module = PAGES["docs/contracts.md"], protocol.__module__
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{module}.py::"))
    members = {*protocol.__annotations__, *vars(protocol)}
    for name in (name for name in members if not name.startswith("_")):
        assert re.search(rf"\b{name}\b", row), f"{protocol.__name__}.{name}"


def test_every_module_is_in_the_list_of_files():
    listed = PAGES["docs/contracts.md"].partition("## Files")[2]
    for file in MODULES:
        assert f"`{file.relative_to(ROOT)}`" in listed


def test_every_module_is_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = [file.relative_to(ROOT).with_suffix("") for file in MODULES]
    assert set(setup["py-modules"]) == {str(m) for m in modules if len(m.parts) == 1}
    assert set(setup["packages"]) == {m.parts[0] for m in modules if len(m.parts) == 2}


@pytest.mark.parametrize("line", shown_commands())
def test_command_is_understood(line, monkeypatch):
    """Each command of the pages, up to the point where its flags have been read."""

    class Understood(Exception):
        pass

    def parse(parser, read=argparse.ArgumentParser.parse_args):
        read(parser, [word for word in sys.argv[1:] if word != "--help"])
        raise Understood

    words = shlex.split(line, comments=True)
    words = words[words.index("thumbnails.py") if "thumbnails.py" in words else 0 :][1:]
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", words[start:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Understood):
        importlib.import_module(words[start].removesuffix(".py").replace("/", ".")).main()


def test_make_has_the_targets_shown():
    targets = set(re.findall(r"^make (\w+)", TEXT, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_overrides_shown_are_valid():
    shown = [
        x for line in re.findall(r"--set ((?:[a-z_.]+=[\w.]+ ?)+)", TEXT) for x in line.split()
    ]
    assert len(shown) > 2
    changed = flat_fields(override(tiny(), shown))
    for setting in shown:
        name, value = setting.split("=")
        assert name in field_types(Config, changed)
        assert str(changed[name]).lower() == value or value == "true"


def test_numbers_of_the_choices_are_those_of_the_code():
    config, page = tiny(), PAGES["docs/choices.md"]
    stage, scales = config.stages.latent, {**vars(config.sample)}
    assert f"{scales.pop('steps')} Euler steps; guidance {scales['guidance']:g}" in page
    assert set(scales.values()) == {scales["guidance"]}
    assert f"{stage.text_dropout:.0%} of texts".replace("%", " %") in page
    assert f"{stage.context_dropout:.0%} of plans".replace("%", " %") in page
    assert f"| {config.compressor.kl_weight:g} on nats".replace("e-0", "e-") in page
    assert f"| {config.compressor.log_variance:g} |" in page
    assert f"| {config.compressor.noise:g} abs(N(0, 1))" in page
    assert f"every {train.MEASURE_EVERY} steps" in page
    assert f"at most {train.SAVE_EVERY} steps back" in PAGES["docs/training.md"]


def test_the_drawing_has_the_shapes_of_tiny():
    made = shapes(tiny(), tiny().data.seconds)
    names = ("video", "low-rate video", "VAE latents", "semantic features", "z_sem")
    wanted = {"×".join(map(str, made[name])) for name in names}
    wanted.add(f"{tiny().text.words}×{tiny().text.dim}")
    assert set(re.findall(r'class="shape"[^>]*>([^<]+)<', DRAWING)) == wanted
    painter, planner = tiny().stages.latent, tiny().stages.semantic
    dropped = [painter.text_dropout, painter.context_dropout, planner.text_dropout]
    assert re.findall(r"(\d+) %", DRAWING) == [f"{100 * share:g}" for share in dropped]


@pytest.mark.parametrize("preset, page", [("paper", "real-weights"), ("wan", "fine-tuning")])
def test_the_table_of_sizes_is_what_its_command_prints(monkeypatch, capsys, preset, page):
    for library in ("diffusers", "peft") if preset == "wan" else ():
        pytest.importorskip(library)
    command, text = f"config.py --preset {preset} --seconds 5 60", PAGES[f"docs/{page}.md"]
    assert f"python {command}" in text
    monkeypatch.setattr(sys, "argv", command.split())
    main()
    assert capsys.readouterr().out in text


def test_the_shown_encoder_is_complete(tmp_path, monkeypatch):
    """The file in the docs, run as it says, trains and paints from a reference."""
    (code,) = re.findall(r"```python\n(# thumbnails.*?)```", TEXT, re.DOTALL)
    script, run = tmp_path / "thumbnails.py", tmp_path / "run"
    script.write_text(code)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text('{"model_type": "thumbnails"}')
    monkeypatch.setitem(semantic.ENCODERS, "thumbnails", None)  # undone in the end
    settings = [x for x in MICRO if not x.startswith("encoder.")]
    train = ["train.py", "--stage", "latent", "--tiny", "--encoder", tmp_path / "weights"]
    sample = ["sample.py", "--run", run, "--reference", ROOT / "assets" / "samples.webp"]
    for command in (
        [*train, "--out", run, "--set", *settings],
        [*sample, "--out", tmp_path / "out.png"],
    ):
        command[0] = ROOT / command[0]
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, command)])
        runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "out.png").exists() and not (run / "encoder.safetensors").exists()
