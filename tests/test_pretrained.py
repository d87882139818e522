"""Released parts against the libraries that they come from, on small random checkpoints.

The tests write the checkpoints themselves, in the layout of the released ones. Compared are: the
tower of Qwen2.5-VL with transformers' own image processor and tower, given the weights directly;
V-JEPA 2, umT5 and BERT with transformers' models on the same pixels and padded batches; Wan's VAE
with diffusers' own; a repository in the hub's cache with the same one as a folder; and memory with
the size of the tower. Loaders with their own order of tokens, own normalisation or a part left at
random fail here. All that is missing, damaged or foreign gives one line.
"""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, memory_of, randn
from released import (
    FIRST_WORD,
    MEAN,
    QWEN,
    SHARDS,
    STD,
    VISION,
    VJEPA2,
    WAN,
    WORDS,
    bert_model,
    fill,
    library_tower,
    transformers,
    umt5_model,
    vjepa2_model,
    write_hub,
    write_index,
    write_json,
    write_qwen,
    write_settings,
    write_t5_tokenizer,
    write_wan,
    write_word_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import chain
import semantic
import text as text_module
import vae as vae_module
from data import to_float, to_uint8
from plumbing.files import UserError, require
from plumbing.weights import locate, read_settings, read_tensor, tensor_files
from semantic import ENCODERS, PretrainedEncoderConfig, QwenVisionTower, describe_encoder
from text import UMT5, UMT5Config, describe_text
from vae import WanVAE, WanVAEConfig, describe_vae

ROOT = Path(__file__).parents[1]


def random_video(B: int, frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return video (B, 3, F, H, W) uint8: noise, so that no two places look alike."""
    generator = torch.Generator().manual_seed(seed)
    size = (B, 3, frames, height, width)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8)


@contextlib.contextmanager
def refused(*words: str):
    """Check that a UserError of one line is raised, with these words."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert message and "\n" not in message, message
    assert all(word in message for word in words), message


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edit_json(file: Path, change: Callable[[dict], object]):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(file: Path, change: Callable[[dict], object]):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def cut(file: Path):
    """Damage a file: its second half is lost."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# --- the tower of Qwen2.5-VL --------------------------------------------------------------------


def load_tower(folder: Path | str, dtype: str = "float32", **changes) -> QwenVisionTower:
    return QwenVisionTower(replace(describe_encoder(str(folder)), dtype=dtype, **changes))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Return the tower's tensors as a checkpoint has them, without their prefix."""
    return fill(library_tower().state_dict())


@pytest.fixture(scope="module")
def reference(weights) -> torch.nn.Module:
    tower = library_tower()
    tower.load_state_dict(weights)
    return tower


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen"), weights)


@pytest.fixture(scope="module")
def tower(checkpoint) -> QwenVisionTower:
    return load_tower(checkpoint)


def library_patches(video: Tensor) -> Tensor:
    """Cut one video (3, F, H, W) uint8 with transformers' processor: (S h w, 1176).

    Its video processor needs torchvision. Its image processor sees each image as two equal frames:
    of an image's patch, half are the pixels that the frame has in its pair's patch.
    """
    processor = transformers.Qwen2VLImageProcessorPil(do_resize=False)
    images = [np.ascontiguousarray(frame) for frame in video.permute(1, 2, 3, 0).numpy()]
    cut = processor(images=images, return_tensors="pt").pixel_values
    frames = cut.view(len(images) // 2, 2, -1, 3, 2, 14, 14)  # (S, two, h w, C, equal, 14, 14)
    assert frames[..., 0, :, :].equal(frames[..., 1, :, :])
    return frames[..., 0, :, :].permute(0, 2, 3, 1, 4, 5).flatten(2).flatten(0, 1)


@torch.no_grad()
def library_features(reference, video: Tensor) -> Tensor:
    """Return what transformers makes of videos (B, 3, F, H, W) uint8, each a whole."""
    _, _, frames, height, width = video.shape
    features = []
    for one in video:
        grid = torch.tensor([[frames // 2, height // 14, width // 14]])
        out = reference(library_patches(one), grid_thw=grid).pooler_output
        features.append(out.view(frames // 2, height // 28, width // 28, -1).movedim(-1, 0))
    return torch.stack(features)


@pytest.mark.parametrize(
    "size", [(2, 6, 84, 140), (1, 2, 28, 28), (1, 4, 252, 140)], ids=lambda x: "x".join(map(str, x))
)
def test_the_tower_is_that_of_transformers(tower, reference, size):
    """On its own patches, for windows that do not fill the frame, several pairs and videos."""
    video = random_video(*size)
    features = tower.encode(to_float(video))
    B, frames, height, width = size
    assert features.shape == (B, 48, *tower.config.grid(frames, height, width))
    assert features.dtype == torch.float32 and features.std() > 0.1
    assert_close(features, library_features(reference, video), 1e-4)


def test_patches_are_those_of_transformers_processor(tower):
    video = random_video(1, 4, 84, 140)
    pairs = to_float(video)[0].unflatten(1, (2, 2)).transpose(0, 1)  # (S, 3, 2, H, W)
    rows, sizes = tower.patches(pairs)
    assert_close(rows, library_patches(video[0]), 1e-5)
    assert sizes.tolist() == [[1, 6, 10], [1, 6, 10]]


def test_patches_by_plain_loops(tower):
    """Rows: blocks of 2 x 2 patches, then the patches of a block; columns: RGB, frame, y, x."""
    pair = randn(1, 3, 2, 56, 84)
    rows, expected = tower.patches(pair)[0], []
    for top, left in [(a, b) for a in range(0, 56, 28) for b in range(0, 84, 28)]:
        for y, x in [(top + a, left + b) for a in (0, 14) for b in (0, 14)]:
            patch = (pair[0, :, :, y : y + 14, x : x + 14] + 1) / 2
            means, stds = (torch.tensor(v).view(3, 1, 1, 1) for v in (tower.mean, tower.std))
            expected.append(((patch - means) / stds).flatten())
    assert_close(rows, torch.stack(expected), 1e-5)


def test_the_tower_of_a_checkpoint_that_transformers_saved(tmp_path):
    """Not our layout but the one of save_pretrained, and the whole model's own path to features."""
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=32)
    text |= dict(num_attention_heads=2, num_key_value_heads=1)
    vision = {**VISION, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    inside = model.model.visual
    inside.load_state_dict(fill(inside.state_dict()))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    video = random_video(1, 4, 84, 56)
    with torch.no_grad():
        out = model.get_video_features(library_patches(video[0]), torch.tensor([[2, 6, 4]]))
    expected = out.pooler_output[0].view(2, 3, 2, 32).movedim(-1, 0)[None]
    assert_close(load_tower(tmp_path).encode(to_float(video)), expected, 1e-4)


@pytest.mark.parametrize("layout", ["other prefix", "one file", "one file, other prefix"])
def test_other_layouts_give_the_same_features(tmp_path, weights, tower, layout):
    prefix = "model.visual." if "other prefix" in layout else "visual."
    write_qwen(tmp_path, weights, prefix)
    if "one file" in layout:
        tensors = {}
        for shard in SHARDS:
            tensors |= load_file(tmp_path / shard)
            (tmp_path / shard).unlink()
        (tmp_path / "model.safetensors.index.json").unlink()
        save_file(tensors, tmp_path / "model.safetensors")
    video = to_float(random_video(1, 2, 84, 140))
    assert load_tower(tmp_path).encode(video).equal(tower.encode(video))


def test_settings_with_a_model_type_of_their_own(tmp_path, checkpoint, tower):
    """As later revisions of the released config.json have it."""
    copied(checkpoint, tmp_path / "x")
    write_settings(tmp_path / "x", {**VISION, "model_type": "qwen2_5_vl"})
    video = to_float(random_video(1, 2, 28, 56))
    assert load_tower(tmp_path / "x").encode(video).equal(tower.encode(video))


def test_transformers_4_returns_a_tensor(checkpoint, reference):
    mine = load_tower(checkpoint)
    forward = mine.tower.forward
    mine.tower.forward = lambda *args, **options: forward(*args, **options).pooler_output
    video = random_video(2, 4, 84, 140)
    assert_close(mine.encode(to_float(video)), library_features(reference, video), 1e-4)


def test_a_feature_stands_where_its_pixels_are(tower):
    video = to_float(random_video(2, 6, 84, 140))
    before = tower.encode(video)
    for b, s, i, j in [(0, 0, 0, 0), (1, 2, 2, 4), (0, 1, 1, 3), (1, 0, 2, 0), (0, 2, 0, 4)]:
        changed = video.clone()
        changed[b, :, 2 * s : 2 * s + 2, 28 * i : 28 * i + 28, 28 * j : 28 * j + 28] *= -1
        change = (tower.encode(changed) - before).norm(dim=1)  # (B, S, hs, ws)
        place = torch.unravel_index(change.argmax(), change.shape)
        assert tuple(map(int, place)) == (b, s, i, j)
        assert change[b, s].all()  # it spreads within the pair,
        change[b, s] = 0
        assert not change.any()  # and nowhere else, not by a bit


def test_both_frames_of_a_pair_count_and_their_order(tower):
    video = to_float(random_video(1, 2, 56, 56))
    features = tower.encode(video)
    assert (tower.encode(video.flip(2)) - features).abs().max() > 0.1
    assert (tower.encode(video.flip(1)) - features).abs().max() > 0.1  # and that of RGB


@pytest.mark.parametrize("size", [(84, 140), (56, 28)], ids=["84x140", "56x28"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_chunks_change_nothing(checkpoint, dtype, size):
    """In float32, kernels for larger products may sum in another order; in float64 it is unseen."""
    tolerance = {"float64": 0, "float32": 1e-5}[dtype]
    video = to_float(random_video(2, 10, *size))
    alone, *chunked = (
        load_tower(checkpoint, dtype, chunk=chunk).encode(video) for chunk in (1, 2, 3, 1000)
    )
    for features in chunked:
        assert_close(features, alone, tolerance)
    tower = load_tower(checkpoint, dtype)
    pairs = [tower.encode(video[:, :, k : k + 2]) for k in range(0, 10, 2)]
    assert_close(torch.cat(pairs, 2), alone, tolerance)
    assert_close(torch.cat([tower.encode(clip[None]) for clip in video]), alone, tolerance)


def test_bfloat16_keeps_the_positions_of_float32(checkpoint, tower):
    """Weights are rounded, frequencies are not: errors of rounding, none of place."""
    mine = load_tower(checkpoint, "bfloat16")
    assert {x.dtype for x in mine.tower.state_dict().values()} == {torch.bfloat16}
    ours, exact = (dict(t.tower.rotary_pos_emb.named_buffers()) for t in (mine, tower))
    assert "inv_freq" in ours and ours.keys() == exact.keys()
    assert all(x.dtype == torch.float32 and x.equal(exact[name]) for name, x in ours.items())
    video = to_float(random_video(1, 4, 84, 140))
    features, expected = mine.encode(video), tower.encode(video)
    assert features.dtype == torch.float32
    error = (features - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.03  # measured: 0.0045


def test_weights_kept_in_bfloat16_are_read_as_they_are(tmp_path, weights):
    """As the released ones are: a tower in float32 computes with the values of bfloat16."""
    rounded = {name: x.bfloat16() for name, x in weights.items()}
    write_qwen(tmp_path, rounded)
    reference = library_tower()
    reference.load_state_dict({name: x.float() for name, x in rounded.items()})
    video = random_video(1, 2, 84, 140)
    mine = load_tower(tmp_path)
    assert_close(mine.encode(to_float(video)), library_features(reference, video), 1e-4)


def test_the_tower_is_frozen(checkpoint, tower):
    mine = load_tower(checkpoint)
    assert not any(module.training for module in mine.modules())
    assert not any(parameter.requires_grad for parameter in mine.parameters())
    video = to_float(random_video(1, 2, 56, 84)).requires_grad_()
    features = mine.encode(video)
    assert not features.requires_grad and features.equal(mine.train().encode(video))


@pytest.mark.parametrize("size", [(3, 56, 56), (0, 56, 56), (2, 54, 56), (2, 56, 70)])
def test_a_size_that_does_not_divide_is_refused(tower, size):
    for attempt in (tower.config.grid, lambda *size: tower.encode(torch.zeros(1, 3, *size))):
        with pytest.raises(ValueError, match="pairs of frames and multiples of 28 pixels"):
            attempt(*size)


def test_describe_reads_sizes_and_tells_weights_apart(tmp_path, checkpoint, weights):
    config = describe_encoder(str(checkpoint))
    assert config == PretrainedEncoderConfig(
        weights=str(checkpoint), digest=config.digest, dim=48, patch=28, kind="qwen2_5_vl"
    )
    assert describe_encoder(str(copied(checkpoint, tmp_path / "same"))).digest == config.digest
    other = copied(checkpoint, tmp_path / "other")
    edit_tensors(other / SHARDS[0], lambda x: x["visual.patch_embed.proj.weight"].mul_(2))
    assert describe_encoder(str(other)).digest != config.digest
    shutil.copytree(other, tmp_path / "same", dirs_exist_ok=True)  # in the place of the first
    assert describe_encoder(str(tmp_path / "same")).digest != config.digest


# What is read of a checkpoint, and what is wrong with one.


@pytest.mark.parametrize("language", ["absent", "rubbish"])
def test_shards_of_the_language_model_are_not_opened(tmp_path, checkpoint, tower, language):
    folder = copied(checkpoint, tmp_path / "x")
    for shard in SHARDS[2:]:
        if language == "absent":
            (folder / shard).unlink()
        else:
            (folder / shard).write_bytes(b"rubbish")
    video = to_float(random_video(1, 2, 28, 84))
    assert load_tower(folder).encode(video).equal(tower.encode(video))


FIRST = "visual.patch_embed.proj.weight"  # in shard 1


def drop(folder: Path, name: str):
    """Remove a tensor from its shard and from the index."""
    edit_tensors(folder / SHARDS[0], lambda tensors: tensors.pop(name))
    edit_json(folder / "model.safetensors.index.json", lambda x: x["weight_map"].pop(name))


def add(folder: Path, name: str):
    edit_tensors(folder / SHARDS[0], lambda tensors: tensors.update({name: randn(4)}))
    edit_json(
        folder / "model.safetensors.index.json", lambda x: x["weight_map"].update({name: SHARDS[0]})
    )


def to_fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


def quantise(name: str, scale: str) -> Callable[[dict], None]:
    """Put a tensor at 8 bits, a tenth of it, beside its scale."""
    return lambda x: x.update({name: to_fp8(x[name] * 10), scale: torch.tensor(0.1)})


def point_to(shard: str) -> Callable[[Path], None]:
    """Let the index name another file for a tensor of the tower."""
    return lambda folder: edit_json(
        folder / "model.safetensors.index.json", lambda x: x["weight_map"].update({FIRST: shard})
    )


def set_vision(**changes) -> Callable[[Path], None]:
    return lambda folder: write_settings(
        folder, {k: v for k, v in {**VISION, **changes}.items() if v is not None}
    )


WRONG = {  # what is done to the checkpoint, and the words that name it
    "a shard is missing": (lambda f: (f / SHARDS[1]).unlink(), [SHARDS[1]]),
    "a tensor is missing": (lambda f: drop(f, FIRST), ["lacks patch_embed.proj.weight"]),
    "its shard lacks a tensor": (
        lambda f: edit_tensors(f / SHARDS[0], lambda x: x.pop(FIRST)),
        [SHARDS[0], FIRST],
    ),
    "a tensor is foreign": (lambda f: add(f, "visual.odd"), ["should not", "odd"]),
    "a shape is wrong": (
        lambda f: edit_tensors(f / SHARDS[0], lambda x: x.update({FIRST: randn(64, 5)})),
        [SHARDS[0], FIRST, "(64, 5)", "(64, 3, 2, 14, 14)"],
    ),
    "a shard is cut": (lambda f: cut(f / SHARDS[0]), [SHARDS[0]]),
    "a shard is empty": (lambda f: (f / SHARDS[1]).write_bytes(b""), [SHARDS[1]]),
    "a shard is rubbish": (lambda f: (f / SHARDS[1]).write_bytes(b"rubbish" * 99), [SHARDS[1]]),
    "a tensor that the index does not name": (
        lambda f: edit_tensors(f / SHARDS[1], lambda x: x.update({"visual.odd": randn(4)})),
        ["should not", "odd"],
    ),
    "a tensor under two names": (
        lambda f: edit_tensors(f / SHARDS[0], lambda x: x.update({f"model.{FIRST}": x[FIRST] + 1})),
        ["twice"],
    ),
    "weights of 8 bits": (
        lambda f: edit_tensors(f / SHARDS[0], lambda x: x.update({FIRST: to_fp8(x[FIRST])})),
        [FIRST, "float8_e4m3fn", "quantised"],
    ),
    "weights of 8 bits and their scales": (
        lambda f: edit_tensors(f / SHARDS[0], quantise(FIRST, f"{FIRST}_scale_inv")),
        ["should not", "patch_embed.proj.weight_scale_inv"],
    ),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), ["no index"]),
    "the index names no safetensors": (point_to("pytorch_model.bin"), ["names pytorch_model.bin"]),
    "the index names another folder": (
        point_to(f"../other/{SHARDS[0]}"),
        [f"names ../other/{SHARDS[0]}", "beside it"],
    ),
    "the index names a file of the machine": (point_to("/x.safetensors"), ["beside it"]),
    "the index is no index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        ["model.safetensors.index.json"],
    ),
    "the index has no tower": (
        lambda f: edit_json(
            f / "model.safetensors.index.json",
            lambda x: x.update(weight_map={"lm_head.weight": SHARDS[3]}),
        ),
        ["lacks blocks.0.attn.proj.bias"],
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config.json is cut": (lambda f: cut(f / "config.json"), ["config.json"]),
    "no vision_config": (
        lambda f: edit_json(f / "config.json", lambda x: x.pop("vision_config")),
        ["vision_config"],
    ),
    "vision_config is no object": (
        lambda f: edit_json(f / "config.json", lambda x: x.update(vision_config=3)),
        ["vision tower"],
    ),
    "another model": (
        lambda f: edit_json(f / "config.json", lambda x: x.update(model_type="qwen3")),
        ["'qwen3'", "qwen2_5_vl"],
    ),
    "no model_type": (
        lambda f: edit_json(f / "config.json", lambda x: x.pop("model_type")),
        ["None", "qwen2_5_vl"],
    ),
    "no hidden_size": (set_vision(hidden_size=None), ["vision tower", "hidden_size"]),
    "no out_hidden_size": (set_vision(out_hidden_size=None), ["out_hidden_size"]),
    "a size is a word": (set_vision(depth="four"), ["depth"]),
    "a described size is a word": (set_vision(patch_size="14"), ["whole number patch_size"]),
    "another depth": (set_vision(depth=5), ["lacks blocks.4.attn.proj.bias"]),
    "another width": (set_vision(hidden_size=32), [SHARDS[0], "(64,", "(32,"]),
}


@pytest.mark.parametrize(("spoil", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_checkpoint_is_one_line(tmp_path, checkpoint, spoil, words):
    folder = copied(checkpoint, tmp_path / "x")
    spoil(folder)
    with refused(*words):
        load_tower(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with refused(str(tmp_path / "x"), "neither a folder"):
        describe_encoder(str(tmp_path / "x"))


def test_a_quantised_language_model_does_not_matter(tmp_path, checkpoint, tower):
    """As in the repositories whose names end in -AWQ: their tower is not quantised."""
    folder = copied(checkpoint, tmp_path / "x")
    edit_json(folder / "config.json", lambda x: x.update(quantization_config={"bits": 4}))
    for shard in SHARDS[2:]:
        save_file({"model.layers.0.mlp.qweight": torch.ones(8, dtype=torch.int32)}, folder / shard)
    video = to_float(random_video(1, 2, 28, 84))
    assert load_tower(folder).encode(video).equal(tower.encode(video))


def test_of_a_tensor_in_two_shards_the_index_names_the_one(tmp_path, checkpoint, tower):
    folder = copied(checkpoint, tmp_path / "x")
    other = load_file(folder / SHARDS[0])[FIRST] + 1
    edit_tensors(folder / SHARDS[1], lambda x: x.update({FIRST: other}))
    video = to_float(random_video(1, 2, 28, 84))
    assert load_tower(folder).encode(video).equal(tower.encode(video))


def test_an_index_of_shards_that_are_not_there_is_a_leftover(tmp_path, checkpoint, tower):
    """A file of all tensors beside it is read; beside the shards it is not needed."""
    folder = copied(checkpoint, tmp_path / "x")
    tensors = {}
    for shard in SHARDS:
        tensors |= load_file(folder / shard)
    (folder / "model.safetensors").write_bytes(b"rubbish")
    video = to_float(random_video(1, 2, 28, 84))
    assert load_tower(folder).encode(video).equal(tower.encode(video))
    save_file(tensors, folder / "model.safetensors")
    (folder / SHARDS[0]).unlink()
    assert load_tower(folder).encode(video).equal(tower.encode(video))


LOAD = """
from dataclasses import replace
from semantic import QwenVisionTower, describe_encoder

def load(folder):
    return QwenVisionTower(replace(describe_encoder(folder), dtype="float32")).tower
"""
LARGE = {**VISION, "depth": 16, "hidden_size": 256, "intermediate_size": 768}


def write_interleaved(path: Path, tensors: dict[str, Tensor]):
    """Write safetensors in the given order (save_file would sort them by name)."""
    header, end = {}, 0
    for name, x in tensors.items():
        start, end = end, end + x.nbytes
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.numpy())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("layout", ["own shards", "interleaved"])
def test_memory_is_that_of_the_tower(tmp_path, checkpoint, layout):
    """Of a model eleven times as large, in files that the tower has to itself or shares."""
    with torch.device("meta"):
        shapes = library_tower(LARGE).state_dict()
    tower = {f"visual.{name}": torch.ones(x.shape) for name, x in shapes.items()}
    size = sum(x.nbytes for x in tower.values())
    block = torch.zeros(10 * size // len(tower) // 4)  # a language model of ten times its size
    language = {f"model.layers.{k}.weight": block for k in range(len(tower))}
    write_settings(tmp_path, LARGE)
    if layout == "interleaved":  # in two shards: one of the tower, one of the others, ...
        pairs = list(zip(language.items(), tower.items(), strict=True))
        half = len(pairs) // 2
        parts = [dict(x for pair in some for x in pair) for some in (pairs[:half], pairs[half:])]
    else:
        parts = [tower, language]
    shards = dict(zip(SHARDS, parts, strict=False))
    for shard, tensors in shards.items():
        write_interleaved(tmp_path / shard, tensors)
    write_index(tmp_path, shards)
    growth, counted = memory_of(LOAD, checkpoint, tmp_path)
    assert counted == size > 5e7
    assert 0.9 * size < growth < 1.3 * size, f"{growth / size:.2f} times the tower"


# --- V-JEPA 2 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vjepa2(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    folder, model = tmp_path_factory.mktemp("vjepa2"), vjepa2_model()
    model.save_pretrained(folder)
    return folder, model


def load_vjepa2(folder: Path | str, **changes) -> torch.nn.Module:
    return ENCODERS["vjepa2"](replace(describe_encoder(str(folder)), dtype="float32", **changes))


def test_vjepa2_is_that_of_transformers(vjepa2):
    folder, model = vjepa2
    video = random_video(2, 6, 64, 64)
    imagenet = (
        torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    mean, std = imagenet
    frames = (video.transpose(1, 2) / 255 - mean) / std  # (B, F, 3, H, W)
    with torch.no_grad():
        tokens = model(pixel_values_videos=frames, skip_predictor=True).last_hidden_state
    expected = tokens.view(2, 3, 4, 4, 48).movedim(-1, 1)
    encoder = load_vjepa2(folder)
    features = encoder.encode(to_float(video))
    assert features.shape[2:] == encoder.config.grid(6, 64, 64)
    assert_close(features, expected, 1e-4)
    assert_close(load_vjepa2(folder, chunk=8).encode(to_float(video)), expected, 1e-4)


def test_a_feature_of_vjepa2_stands_where_its_pixels_are(vjepa2):
    encoder, video = load_vjepa2(vjepa2[0]), to_float(random_video(2, 6, 64, 64))
    before = encoder.encode(video)
    for b, s, i, j in [(0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 2, 3)]:
        changed = video.clone()
        changed[b, :, 2 * s : 2 * s + 2, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16] *= -1
        change = (encoder.encode(changed) - before).norm(dim=1)
        assert tuple(map(int, torch.unravel_index(change.argmax(), change.shape))) == (b, s, i, j)
        assert not change[1 - b].any() and change[b].all()  # across time, not across videos


def test_vjepa2_is_frozen(vjepa2):
    encoder = load_vjepa2(vjepa2[0])
    assert not any(x.training for x in encoder.modules())
    assert not any(x.requires_grad for x in encoder.parameters())


def test_describe_reads_the_sizes_of_vjepa2(vjepa2):
    config = describe_encoder(str(vjepa2[0]))
    assert (config.kind, config.dim, config.patch, config.side) == ("vjepa2", 48, 16, 64)
    assert config.grid(4, 64, 64) == (2, 4, 4)


@pytest.mark.parametrize("size", [(4, 64, 32), (4, 128, 128)])
def test_vjepa2_names_the_one_size_that_it_reads(vjepa2, size):
    for attempt in (
        describe_encoder(str(vjepa2[0])).grid,
        lambda *size: load_vjepa2(vjepa2[0]).encode(torch.zeros(1, 3, *size)),
    ):
        with pytest.raises(ValueError, match="reads 64 x 64 alone"):
            attempt(*size)


def test_vjepa2_reads_pairs(vjepa2):
    with pytest.raises(ValueError, match="pairs of frames"):
        load_vjepa2(vjepa2[0]).encode(torch.zeros(1, 3, 3, 64, 64))


def test_vjepa2_of_a_classifier_has_parts_that_are_not_needed(tmp_path, vjepa2):
    """Its names begin otherwise, its head is not the encoder's, and it may lack the predictor."""
    encoder = {k: x for k, x in vjepa2[1].state_dict().items() if k.startswith("encoder.")}
    other = {"vjepa2.predictor.proj.bias": randn(3), "pooler.layer.bias": randn(3)}
    tensors = {f"vjepa2.{k}": x for k, x in encoder.items()} | other
    save_file(tensors | {"classifier.weight": randn(4, 3)}, tmp_path / "model.safetensors")
    shutil.copy(vjepa2[0] / "config.json", tmp_path)
    video = to_float(random_video(1, 4, 64, 64))
    assert load_vjepa2(tmp_path).encode(video).equal(load_vjepa2(vjepa2[0]).encode(video))


PROJECTION = "encoder.embeddings.patch_embeddings.proj.weight"


def spoil_vjepa2(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / "model.safetensors", change)


WRONG_VJEPA2 = {
    "scales of quantised weights": (
        spoil_vjepa2(lambda x: x.update({f"{PROJECTION}_scale": randn(1)})),
        ["should not", f"{PROJECTION}_scale"],
    ),
    "weights of 8 bits": (
        spoil_vjepa2(lambda x: x.update({PROJECTION: to_fp8(x[PROJECTION])})),
        [PROJECTION, "float8_e4m3fn", "quantised"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "cut": (lambda f: cut(f / "model.safetensors"), ["model.safetensors"]),
    "a tensor is missing": (spoil_vjepa2(lambda x: x.pop(PROJECTION)), ["lacks", PROJECTION]),
    "a shape is wrong": (
        spoil_vjepa2(lambda x: x.update({PROJECTION: randn(3)})),
        [f"{PROJECTION} is (3,), expected (48, 3, 2, 16, 16)"],
    ),
    "foreign weights": (
        lambda f: save_file({"a.weight": randn(3)}, f / "model.safetensors"),
        ["lacks encoder."],
    ),
    "no hidden_size": (
        lambda f: edit_json(f / "config.json", lambda x: x.pop("hidden_size")),
        ["hidden_size"],
    ),
    "a size is a word": (
        lambda f: edit_json(f / "config.json", lambda x: x.update(num_hidden_layers="three")),
        ["V-JEPA 2", "num_hidden_layers"],
    ),
}


@pytest.mark.parametrize(("spoil", "words"), WRONG_VJEPA2.values(), ids=WRONG_VJEPA2)
def test_what_is_wrong_with_vjepa2_is_one_line(tmp_path, vjepa2, spoil, words):
    folder = copied(vjepa2[0], tmp_path / "x")
    spoil(folder)
    with refused(*words):
        load_vjepa2(folder)


def test_a_damaged_shard_of_vjepa2_is_one_line(tmp_path, vjepa2):
    vjepa2[1].save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    assert load_vjepa2(tmp_path).config.dim == 48
    cut(shard)
    with refused(str(tmp_path)):
        load_vjepa2(tmp_path)


# --- Wan's VAE ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, dict[str, torch.nn.Module]]:
    """Return Wan's whole repository, and the library's own model of each of its folders."""
    folder = tmp_path_factory.mktemp("wan")
    return folder, write_wan(folder)


@pytest.fixture(scope="module")
def wan(release) -> tuple[Path, torch.nn.Module]:
    """Return the repository that holds the VAE, and diffusers' own model."""
    return release[0], release[1]["vae"]


@pytest.fixture(scope="module")
def vae(wan) -> WanVAE:
    return WanVAE(describe_vae(str(wan[0])))


def per_channel(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


@torch.no_grad()
def test_latents_are_those_of_diffusers_normalised(wan, vae):
    video = to_float(random_video(2, 9, 32, 48))
    latents = vae.encode(video)
    expected = (wan[1].encode(video).latent_dist.mode() - per_channel(MEAN)) / per_channel(STD)
    assert latents.shape == (2, 4, *vae.config.grid(9, 32, 48)) == (2, 4, 3, 4, 6)
    assert_close(latents, expected, 1e-5)


@torch.no_grad()
def test_decoding_undoes_the_normalisation(wan, vae):
    latents = randn(2, 4, 3, 4, 6)
    video = vae.decode(latents)
    expected = wan[1].decode(latents * per_channel(STD) + per_channel(MEAN)).sample
    assert video.shape == (2, 3, 9, 32, 48) and video.abs().max() <= 1
    assert_close(video, expected, 1e-5)


def test_pieces_are_the_video(vae):
    """A latent frame at a time, so that a long video is never in memory as a whole."""
    latents = randn(2, 4, 5, 4, 6)
    pieces = list(vae.decode_pieces(latents))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(pieces, 2), vae.decode(latents))
    assert not pieces[0].requires_grad
    tiled = WanVAE(replace(vae.config, tile=16))
    (whole,) = tiled.decode_pieces(latents)
    assert torch.equal(whole, tiled.decode(latents))


@torch.no_grad()
def test_the_posterior_is_that_of_diffusers_samples(wan, vae):
    """One draw, normalised, is ours with the same noise: mean and deviation are both right."""
    video = to_float(random_video(1, 5, 32, 32))
    mean, log_variance = vae.posterior(video)
    sample = wan[1].encode(video).latent_dist.sample(torch.Generator().manual_seed(3))
    noise = randn(*mean.shape, seed=3)
    expected = (sample - per_channel(MEAN)) / per_channel(STD)
    assert_close(mean + noise * (0.5 * log_variance).exp(), expected, 1e-5)
    assert mean.dtype == log_variance.dtype == torch.float32


def test_a_vae_in_a_folder_of_its_own(tmp_path, wan, vae):
    config = describe_vae(str(copied(wan[0] / "vae", tmp_path / "x")))
    assert config == replace(vae.config, weights=str(tmp_path / "x"))
    video = to_float(random_video(1, 5, 16, 16))
    assert WanVAE(config).encode(video).equal(vae.encode(video))


def test_a_vae_in_shards(tmp_path, wan, vae):
    wan[1].save_pretrained(tmp_path / "vae", max_shard_size="1MB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    video = to_float(random_video(1, 5, 16, 16))
    assert WanVAE(describe_vae(str(tmp_path))).encode(video).equal(vae.encode(video))


def test_other_statistics_of_latents_are_another_vae(tmp_path, wan):
    """They stand in config.json, not among the tensors, and decide what latents are."""
    folder = copied(wan[0] / "vae", tmp_path / "x")
    before = describe_vae(str(folder))
    edit_json(folder / "config.json", lambda x: x["latents_std"].reverse())
    assert describe_vae(str(folder)).digest != before.digest


def test_describe_reads_the_vaes_sizes(wan):
    config = describe_vae(str(wan[0]))
    assert (config.channels, config.time_patch, config.space_patch) == (4, 4, 8)
    assert config.dtype == "float32" and config.tile is None


def test_the_vae_looks_back_alone(vae):
    """Longer clips begin with the latents of shorter ones, and no end changes a beginning."""
    video = to_float(random_video(1, 13, 16, 24))
    latents = vae.encode(video)
    for frames, T in [(1, 1), (5, 2), (9, 3)]:
        assert_close(vae.encode(video[:, :, :frames]), latents[:, :, :T], 1e-5)
        changed = video.clone()
        changed[:, :, frames:] *= -1
        after = vae.encode(changed)
        assert after[:, :, :T].equal(latents[:, :, :T])
        assert (after[:, :, T:] - latents[:, :, T:]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("size", "near"),
    [((8, 16, 16), 9), ((4, 16, 16), 5), ((2, 16, 16), 1), ((0, 16, 16), 1)],
    ids=lambda x: str(x),
)
def test_frames_that_would_be_dropped_are_refused(vae, size, near):
    for attempt in (vae.config.grid, lambda *size: vae.encode(torch.zeros(1, 3, *size))):
        with pytest.raises(ValueError, match=rf"4k \+ 1 frames \(such as {near}\)"):
            attempt(*size)


@pytest.mark.parametrize("size", [(5, 20, 16), (5, 16, 60)], ids=["height", "width"])
def test_pixels_that_would_be_dropped_are_refused(vae, size):
    for attempt in (vae.config.grid, lambda *size: vae.encode(torch.zeros(1, 3, *size))):
        with pytest.raises(ValueError, match="multiples of 8 pixels"):
            attempt(*size)


@pytest.mark.parametrize("tile", [64, 40, 32])
def test_tiles_are_the_codes_of_crops(vae, tile):
    """Each tile's own places, those that are not blended, are those of the crop coded alone."""
    tiled = WanVAE(replace(vae.config, tile=tile))
    height, width = 96, 72
    video = to_float(random_video(1, 5, height, width))
    latents = vae.encode(video)
    parts, painted = tiled.encode(video), tiled.decode(latents)
    step = {64: 48, 40: 24, 32: 24}[tile]  # three quarters, in whole latents
    for code, whole, crop_of, once, unit in (
        (parts, latents, video, vae.encode, 8),
        (painted, vae.decode(latents), latents, vae.decode, 1),
    ):
        assert code.shape == whole.shape
        error = (code - whole).abs().mean() / whole.std()  # layers reach across the borders
        assert 0 < error < (0.3 if tile == 64 else 0.7), error
        source = crop_of.shape[-2] / height
        for top in range(0, height, step):
            for left in range(0, width, step):
                y, x, side = (round(source * n) for n in (top, left, tile))
                crop = once(crop_of[..., y : y + side, x : x + side])
                skip = [(tile - step if start else 0) // unit for start in (top, left)]
                own = crop[..., skip[0] : step // unit, skip[1] : step // unit]
                y, x = top // unit + skip[0], left // unit + skip[1]
                place = code[..., y : y + own.shape[-2], x : x + own.shape[-1]]
                assert_close(place, own, 1e-5)


@pytest.mark.parametrize("tile", [0, 8, 60, -16])
def test_a_tile_that_does_not_divide_is_refused(vae, tile):
    with pytest.raises(ValueError, match=f"tile {tile}: must be a multiple of 8, at least 16"):
        replace(vae.config, tile=tile)


def test_a_frame_within_one_tile_is_coded_as_without(vae):
    video = to_float(random_video(1, 5, 48, 64))
    tiled = WanVAE(replace(vae.config, tile=64))
    assert tiled.encode(video).equal(vae.encode(video))
    latents = vae.encode(video)
    assert tiled.decode(latents).equal(vae.decode(latents))


def test_the_vae_in_bfloat16(vae):
    half = WanVAE(replace(vae.config, dtype="bfloat16"))
    video = to_float(random_video(1, 5, 16, 16))
    latents, expected = half.encode(video), vae.encode(video)
    assert latents.dtype == half.decode(latents).dtype == torch.float32
    assert 0 < (latents - expected).norm() / expected.norm() < 0.05
    assert not any(x.requires_grad for x in half.parameters())


VAE_FILE = "diffusion_pytorch_model.safetensors"


def spoil_vae(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / VAE_FILE, change)


def rename(file: Path, name: str):
    file.rename(file.with_name(name))


WRONG_VAE = {
    "only a variant": (
        lambda f: rename(f / VAE_FILE, "diffusion_pytorch_model.fp16.safetensors"),
        ["no index of its shards; diffusion_pytorch_model.fp16.safetensors cannot be read"],
    ),
    "only a pickle": (
        lambda f: rename(f / VAE_FILE, "diffusion_pytorch_model.bin"),
        [VAE_FILE, "diffusion_pytorch_model.bin cannot be read"],
    ),
    "scales of quantised weights": (
        spoil_vae(quantise("quant_conv.weight", "quant_conv.scale_weight")),
        ["should not", "quant_conv.scale_weight"],
    ),
    "weights of 8 bits": (
        spoil_vae(lambda x: x.update({"quant_conv.weight": to_fp8(x["quant_conv.weight"])})),
        ["quant_conv.weight", "float8_e4m3fn", "quantised"],
    ),
    "no weights": (lambda f: (f / VAE_FILE).unlink(), [VAE_FILE]),
    "cut": (lambda f: cut(f / VAE_FILE), [VAE_FILE]),
    "a tensor is missing": (
        spoil_vae(lambda x: x.pop("quant_conv.weight")),
        ["quant_conv.weight"],
    ),
    "a tensor is foreign": (spoil_vae(lambda x: x.update({"odd": randn(3)})), ["odd"]),
    "a shape is wrong": (
        spoil_vae(lambda x: x.update({"quant_conv.bias": randn(3)})),
        ["quant_conv.bias is (3,), expected (8,)"],
    ),
    "foreign weights": (
        lambda f: save_file({"a.weight": randn(3), "b.weight": randn(3)}, f / VAE_FILE),
        ["lacks"],
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "a size is a word": (
        lambda f: edit_json(f / "config.json", lambda x: x.update(z_dim="four")),
        ["a whole number z_dim, not 'four'"],
    ),
    "a size is zero": (
        lambda f: edit_json(f / "config.json", lambda x: x.update(scale_factor_spatial=0)),
        ["a whole number scale_factor_spatial, not 0"],
    ),
    "another class": (
        lambda f: edit_json(f / "config.json", lambda x: x.update(_class_name="AutoencoderKL")),
        ["'AutoencoderKL'", "AutoencoderKLWan"],
    ),
    "no class": (
        lambda f: edit_json(f / "config.json", lambda x: x.pop("_class_name")),
        ["AutoencoderKLWan"],
    ),
    "another width": (
        lambda f: edit_json(f / "config.json", lambda x: x.update(base_dim=16)),
        ["is (", "expected ("],
    ),
}


@pytest.mark.parametrize("subfolder", ["", "vae"], ids=["root", "pipeline"])
@pytest.mark.parametrize(("spoil", "words"), WRONG_VAE.values(), ids=WRONG_VAE)
def test_what_is_wrong_with_a_vae_is_one_line(tmp_path, wan, spoil, words, subfolder):
    folder = copied(wan[0] / "vae", tmp_path / "x" / subfolder)
    spoil(folder)
    with refused(*words):
        WanVAE(describe_vae(str(tmp_path / "x")))


def test_weights_that_vanish_after_they_were_described(tmp_path, wan):
    folder = copied(wan[0] / "vae", tmp_path / "x")
    config = describe_vae(str(folder))
    cut(folder / VAE_FILE)
    with refused(str(folder)):
        WanVAE(config)
    (folder / VAE_FILE).unlink()
    with refused(str(folder)):
        WanVAE(config)


# --- text encoders ------------------------------------------------------------------------------

SENTENCES = [
    "a red circle moves left",
    "",
    "a blue square",
    "blue",
    " \n",
    "and a red square grows up",
]


TEXTS = ["umt5, pipeline", "umt5, one folder", "bert, one folder"]


@pytest.fixture(scope="module", params=TEXTS)
def text(request, tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """Return a folder with encoder and tokenizer, and transformers' own encoder."""
    if request.param == "umt5, pipeline":
        folder, models = request.getfixturevalue("release")
        return folder, models["text_encoder"]
    folder = tmp_path_factory.mktemp("text")
    if request.param == "umt5, one folder":
        write_t5_tokenizer(folder)
        model = umt5_model()
    else:
        write_word_tokenizer(folder)
        model = bert_model()
    model.save_pretrained(folder)
    return folder, model


def load_text(folder: Path | str, **changes) -> UMT5:
    changes = {"dtype": "float32", "words": 12, **changes}
    return UMT5(replace(describe_text(str(folder)), **changes))


@torch.no_grad()
def test_tokens_are_those_of_transformers_on_a_padded_batch(text):
    folder, model = text
    encoder = load_text(folder)
    tokens = encoder.encode(SENTENCES)
    batch = encoder.tokenizer(
        SENTENCES, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    mask = batch["attention_mask"]
    hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    expected = hidden * mask[:, :, None]
    expected[[1, 4]] = 0  # the null text of guidance, whatever the library makes of it
    assert tokens.shape == (6, 12, 32) and tokens.dtype == torch.float32
    assert_close(tokens, expected, 1e-5)
    lengths = mask.sum(1) * torch.tensor([1, 0, 1, 1, 0, 1])
    assert tokens.any(-1).sum(1).tolist() == lengths.tolist()
    assert lengths.max() < 12


def test_a_text_does_not_depend_on_its_company(text):
    encoder = load_text(text[0])
    together = encoder.encode(SENTENCES)
    for sentence, tokens in zip(SENTENCES, together, strict=True):
        assert encoder.encode([sentence])[0].equal(tokens)
    assert encoder.encode(SENTENCES[::-1]).flip(0).equal(together)


@torch.no_grad()
def test_longer_texts_are_cut(text):
    folder, model = text
    encoder = load_text(folder, words=5)
    tokens = encoder.encode(["red " * 40, "red"])
    assert tokens.shape == (2, 5, 32) and tokens[0].any(-1).all()
    end = [1] if "umt5" in type(model).__name__.lower() else []  # </s> is kept
    red = FIRST_WORD + WORDS.index("red")
    ids = torch.tensor([[red] * (5 - len(end)) + end])
    assert_close(tokens[:1], model(input_ids=ids).last_hidden_state, 1e-5)


def test_words_matter_and_their_order(text):
    encoder = load_text(text[0])
    a, b, c = encoder.encode(["red circle", "circle red", "blue circle"])
    assert (a - b).abs().max() > 0.1 and (a - c).abs().max() > 0.1


def test_text_in_bfloat16_is_near_and_frozen(text):
    encoder, half = load_text(text[0]), load_text(text[0], dtype="bfloat16")
    expected, tokens = encoder.encode(SENTENCES), half.encode(SENTENCES)
    assert tokens.dtype == torch.float32
    assert 0 < (tokens - expected).norm() / expected.norm() < 0.05
    assert not any(x.training for x in half.modules())
    assert not any(x.requires_grad for x in half.parameters())


def test_describe_reads_the_width_and_length_of_a_text_encoder(text):
    folder, model = text
    config = describe_text(str(folder))
    assert config.dim == 32 and config.words == (24 if "Bert" in type(model).__name__ else 512)


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """Return a pipeline's repository whose text encoder is one file, easy to spoil."""
    write_t5_tokenizer(tmp_path / "tokenizer")
    umt5_model().save_pretrained(tmp_path / "text_encoder")
    return tmp_path


TEXT_FILE = "text_encoder/model.safetensors"
TEXT_SETTINGS = "text_encoder/config.json"


def scaled(end: str) -> Callable[[Path], None]:
    """As quantised weights are: without their scales they mean something else."""
    name = "encoder.block.0.layer.0.SelfAttention.q"
    return lambda f: edit_tensors(f / TEXT_FILE, quantise(f"{name}.weight", f"{name}.{end}"))


def run_code(folder: Path):
    """Let the settings name code of their own, which nothing here may run or ask about."""
    (folder / "text_encoder/code.py").write_text("raise SystemExit('it was run')")
    auto = {"AutoConfig": "code.Config", "AutoModelForTextEncoding": "code.Model"}
    edit_json(folder / TEXT_SETTINGS, lambda x: x.update(model_type="mine", auto_map=auto))


WRONG_TEXT = {
    "weight_scale": (scaled("weight_scale"), ["should not", "q.weight_scale"]),
    "scale_weight": (scaled("scale_weight"), ["should not", "q.scale_weight"]),
    "weight_scale_inv": (scaled("weight_scale_inv"), ["should not", "q.weight_scale_inv"]),
    "weights of 8 bits": (
        lambda f: edit_tensors(
            f / TEXT_FILE, lambda x: x.update({k: to_fp8(v) for k, v in x.items() if "wo" in k})
        ),
        ["wo.weight is stored as torch.float8_e4m3fn", "quantised"],
    ),
    "settings of quantised weights": (
        lambda f: edit_json(f / TEXT_SETTINGS, lambda x: x.update(quantization_config={})),
        ["quantization_config"],
    ),
    "code of its own": (run_code, ["text encoder"]),
    "only a pickle": (
        lambda f: rename(f / TEXT_FILE, "pytorch_model.bin"),
        [TEXT_FILE, "pytorch_model.bin cannot be read"],
    ),
    "a mark of quantised weights": (
        lambda f: edit_tensors(f / TEXT_FILE, lambda x: x.update(scaled_fp8=randn(0))),
        ["scaled_fp8"],
    ),
    "no weights": (lambda f: (f / TEXT_FILE).unlink(), [TEXT_FILE]),
    "cut": (lambda f: cut(f / TEXT_FILE), [TEXT_FILE]),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ["tokenizer"]),
    "the tokenizer is cut": (lambda f: cut(f / "tokenizer/tokenizer.json"), ["text encoder"]),
    "a tensor is missing": (
        lambda f: edit_tensors(f / TEXT_FILE, lambda x: x.pop("encoder.final_layer_norm.weight")),
        ["lacks encoder.final_layer_norm.weight"],
    ),
    "a shape is wrong": (
        lambda f: edit_tensors(
            f / TEXT_FILE, lambda x: x.update({"encoder.final_layer_norm.weight": randn(3)})
        ),
        ["final_layer_norm.weight is (3,), expected (32,)"],
    ),
    "foreign weights": (lambda f: save_file({"a": randn(3)}, f / TEXT_FILE), ["lacks"]),
    "no config.json": (lambda f: (f / TEXT_SETTINGS).unlink(), ["config.json"]),
    "no width": (
        lambda f: edit_json(f / TEXT_SETTINGS, lambda x: x.pop("d_model")),
        ["d_model or hidden_size"],
    ),
    "a length that is no number": (
        lambda f: edit_json(f / TEXT_SETTINGS, lambda x: x.update(max_position_embeddings="all")),
        ["a whole number max_position_embeddings, not 'all'"],
    ),
    "an unknown model": (
        lambda f: edit_json(f / TEXT_SETTINGS, lambda x: x.update(model_type="nobody")),
        ["text encoder"],
    ),
}


@pytest.mark.parametrize(("spoil", "words"), WRONG_TEXT.values(), ids=WRONG_TEXT)
def test_what_is_wrong_with_a_text_encoder_is_one_line(pipeline, spoil, words):
    assert load_text(pipeline).config.dim == 32
    spoil(pipeline)
    with refused(str(pipeline), *words):
        load_text(pipeline)


def test_another_tokenizer_is_another_text_encoder(pipeline):
    before = describe_text(str(pipeline))
    edit_json(pipeline / "tokenizer/tokenizer.json", lambda x: x["model"]["vocab"].reverse())
    assert describe_text(str(pipeline)).digest != before.digest


@torch.no_grad()
def test_embeddings_apart_from_the_shared_ones_are_those_that_count(tmp_path):
    """As in the released umT5: both are there, and differ once `tie_word_embeddings` is false."""
    config = umt5_model().config
    config.tie_word_embeddings = False
    with torch.random.fork_rng():
        model = transformers.UMT5EncoderModel(config).eval()
    model.load_state_dict(fill(model.state_dict()))
    write_t5_tokenizer(tmp_path)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[FIRST_WORD, FIRST_WORD + 1, 1]])
    encoder = load_text(tmp_path)
    expected = model(input_ids=ids).last_hidden_state
    assert_close(encoder.encode([" ".join(WORDS[:2])])[:, :3], expected, 1e-5)


def test_a_text_encoder_of_older_versions(tmp_path):
    """A BERT with the head of its training, its names' beginning, and the places as a buffer."""
    model = bert_model()
    tensors = {f"bert.{k}": x for k, x in model.state_dict().items() if "pooler" not in k}
    tensors |= {"cls.predictions.bias": randn(14), "cls.seq_relationship.bias": randn(2)}
    tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
    write_word_tokenizer(tmp_path)
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.tensor([[FIRST_WORD, FIRST_WORD + 1]])
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    assert_close(load_text(tmp_path).encode([" ".join(WORDS[:2])])[:, :2], expected, 1e-5)


def test_count_tells_how_much_of_a_text_is_read(text):
    encoder = load_text(text[0], words=6)
    for sentence in [*SENTENCES, "red " * 40, "a\ud800 red"]:
        count = encoder.count(sentence)
        assert min(count, 6) == encoder.encode([sentence])[0].any(-1).sum()
    end = "umt5" in type(text[1]).__name__.lower()
    assert encoder.count("red " * 40) == 40 + end and encoder.count(" ") == 0


def test_a_missing_shard_is_named_with_its_folder(tmp_path, release):
    folder = copied(release[0], tmp_path / "x")
    (folder / "text_encoder/model-00002-of-00005.safetensors").unlink()
    with refused("lacks text_encoder/model-00002-of-00005.safetensors"):
        load_text(folder)


def test_a_whole_t5_has_a_decoder_that_is_not_needed(tmp_path):
    """The encoder of a checkpoint that holds encoder, decoder and head."""
    write_t5_tokenizer(tmp_path)
    config = umt5_model().config
    config.is_encoder_decoder, config.decoder_start_token_id = True, 0
    with torch.random.fork_rng():
        model = transformers.UMT5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 1]])
    with torch.no_grad():
        expected = model.encoder(input_ids=ids).last_hidden_state
    words = " ".join(WORDS[k - FIRST_WORD] for k in (5, 6))
    assert_close(load_text(tmp_path).encode([words])[:, :3], expected, 1e-5)


# --- all of them --------------------------------------------------------------------------------


def test_loading_draws_no_random_numbers(checkpoint, vjepa2, wan, text):
    """A part is loaded when it is first needed: that must not change what training draws next."""
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    for load in (
        lambda: load_tower(checkpoint),
        lambda: load_vjepa2(vjepa2[0]),
        lambda: WanVAE(describe_vae(str(wan[0]))),
        lambda: load_text(text[0]),
    ):
        load()
        assert torch.random.get_rng_state().equal(state)


PARTS = ["tower", "vjepa2", "vae", "text"]


def part(name: str, request) -> tuple[str, Path, Callable, Callable, object]:
    """Return a part's hub id, folder, how it is described and loaded, and something to encode."""
    if name == "tower":
        video = to_float(random_video(1, 2, 28, 56))
        return QWEN, request.getfixturevalue("checkpoint"), describe_encoder, load_tower, video
    if name == "vjepa2":
        video = to_float(random_video(1, 4, 64, 64))
        return VJEPA2, request.getfixturevalue("vjepa2")[0], describe_encoder, load_vjepa2, video
    folder = request.getfixturevalue("release")[0]
    if name == "vae":
        video = to_float(random_video(1, 5, 16, 16))
        return WAN, folder, describe_vae, lambda x: WanVAE(describe_vae(str(x))), video
    return WAN, folder, describe_text, load_text, SENTENCES


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_let_go_with_its_last_name(request, name):
    """Nothing of it stays: no cache, hook or closure of ours or of a library's holds it."""
    _, folder, _, load, content = part(name, request)
    made = load(folder)
    made.encode(content)
    kept = [weakref.ref(x) for x in (made, *made.modules(), *made.parameters())]
    del made
    gc.collect()
    assert len(kept) > 10 and not any(x() is not None for x in kept)


def real_vision(dim: int, inside: int) -> dict:
    """Return the vision_config of a released Qwen2.5-VL."""
    vision = {**VISION, "depth": 32, "hidden_size": 1280, "num_heads": 16}
    vision |= {"out_hidden_size": dim, "intermediate_size": inside}
    return vision | {"fullatt_block_indexes": [7, 15, 23, 31]}


def parameters(part: torch.nn.Module) -> int:
    return sum(x.numel() for x in part.parameters())


@pytest.fixture
def weightless(monkeypatch):
    """Build parts as their settings say, on the meta device: no weights are looked for."""

    def build(weights: str, folder: str, *_) -> torch.nn.Module:
        settings = transformers.UMT5Config.from_pretrained(Path(weights, folder))
        with torch.device("meta"):
            return transformers.UMT5EncoderModel(settings)

    for module in (semantic, vae_module, text_module):
        monkeypatch.setattr(module, "tensor_files", lambda *_, **__: {})
    for module in (semantic, vae_module):
        monkeypatch.setattr(module, "fill", lambda *_: None)
    monkeypatch.setattr(text_module, "load_text_model", build)


@pytest.mark.parametrize(
    ("dim", "inside", "count"),
    [(2048, 3420, 668_684_288), (3584, 3420, 676_550_144), (8192, 3456, 704_573_696)],
    ids=["3B", "7B", "72B"],
)
def test_the_towers_real_sizes(tmp_path, weightless, dim, inside, count):
    write_settings(tmp_path, real_vision(dim, inside))
    config = describe_encoder(str(tmp_path))
    assert config.dim == dim and config.grid(8, 476, 840) == (4, 17, 30)
    assert parameters(QwenVisionTower(config, "meta")) == count


def test_the_vaes_real_size(tmp_path, weightless):
    settings = {"_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16}
    settings |= {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    write_json(tmp_path / "vae/config.json", settings)
    config = describe_vae(str(tmp_path))
    made = WanVAE(config, "meta")
    assert parameters(made) == 126_892_531
    latents = made.encode(torch.zeros(1, 3, 5, 480, 832, device="meta"))
    assert latents.shape == (1, config.channels, *config.grid(5, 480, 832)) == (1, 16, 2, 60, 104)
    assert made.decode(latents).shape == (1, 3, 5, 480, 832)


def test_umt5s_real_size(tmp_path, weightless):
    settings = {"model_type": "umt5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64}
    settings |= {"num_layers": 24, "vocab_size": 256384, "tie_word_embeddings": False}
    write_json(tmp_path / "text_encoder/config.json", settings)
    write_t5_tokenizer(tmp_path / "tokenizer")
    config = describe_text(str(tmp_path))
    made = UMT5(config, "meta")
    assert parameters(made) == 5_680_910_336
    assert made.encode([""]).shape == (1, config.words, config.dim) == (1, 512, 4096)


# --- the hub and the libraries ------------------------------------------------------------------

HUB = "nobody/nothing"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Return the folder of the hub's cache, still empty. The library itself reads it, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", PARTS)
def test_a_repository_in_the_hubs_cache_is_the_same_as_a_folder(request, hub, name):
    repository, folder, describe, load, content = part(name, request)
    snapshot = write_hub(hub, repository, folder)
    config = describe(repository)
    assert config == replace(describe(str(folder)), weights=repository)
    expected = load(folder).encode(content)
    assert load(repository).encode(content).equal(expected)
    assert load(snapshot).encode(content).equal(expected)  # its files are links


def test_the_libraries_read_the_same_of_the_hubs_cache(hub, release):
    write_hub(hub, WAN, release[0])
    options = dict(subfolder="text_encoder", cache_dir=hub, local_files_only=True)
    theirs = transformers.UMT5EncoderModel.from_pretrained(WAN, **options).state_dict()
    ours = load_text(WAN).model.state_dict()
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_the_transformer_lies_in_two_shards_beside_its_index(hub, release, place):
    folder, models = release
    weights = str(folder) if place == "folder" else WAN
    write_hub(hub, WAN, folder)
    files = tensor_files(weights, stem="transformer/diffusion_pytorch_model")
    expected = models["transformer"].state_dict()
    assert files.keys() == expected.keys() and len(set(files.values())) == 2
    assert all(read_tensor(file, name).equal(expected[name]) for name, file in files.items())
    assert {file.parent.name for file in files.values()} == {"transformer"}


def test_what_of_a_repository_is_not_in_the_cache_is_named(hub, tmp_path, release, checkpoint):
    """Offline: a part that was never fetched, a shard that was not, and a broken link."""
    partial = copied(release[0], tmp_path / "x")
    shutil.rmtree(partial / "vae")
    shard = "text_encoder/model-00004-of-00005.safetensors"
    (partial / shard).unlink()
    write_hub(hub, WAN, partial)
    with refused(WAN, "has no config.json"):
        describe_vae(WAN)
    with refused(WAN, f"lacks {shard}"):
        describe_text(WAN)
    snapshot = write_hub(hub, QWEN, checkpoint)
    (snapshot / SHARDS[2]).resolve().unlink()  # of the language model
    assert load_tower(QWEN).config.dim == 48
    (snapshot / SHARDS[1]).resolve().unlink()
    with refused(QWEN, f"lacks {SHARDS[1]}"):
        describe_encoder(QWEN)


def test_what_is_in_the_cache_is_not_asked_for(hub, monkeypatch, release):
    """With a network, too: no request for a file that is there, or is known not to exist."""
    snapshot = write_hub(hub, WAN, release[0])
    gone = snapshot.parents[1] / ".no_exist" / snapshot.name / "config.json"
    gone.parent.mkdir(parents=True)
    gone.touch()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse(AssertionError("asked")))
    assert locate(WAN, "vae/config.json") == snapshot / "vae/config.json"
    assert locate(WAN, "config.json") is None


def test_all_files_are_fetched_at_the_commit_of_the_first(hub, monkeypatch, release):
    """Even if the repository has changed since, and its shards are no longer those of its index."""
    snapshot, asked = write_hub(hub, WAN, release[0]), []
    (snapshot / "vae/config.json").unlink()

    def hf_hub_download(repository: str, name: str, revision: str = "main") -> str:
        asked.append((repository, name, revision))
        return str(release[0] / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    assert locate(WAN, "vae/config.json") == release[0] / "vae/config.json"
    assert locate("other/name", "config.json") == release[0] / "config.json"
    assert asked == [
        (WAN, "vae/config.json", snapshot.name),
        ("other/name", "config.json", "main"),
    ]


def refuse(error: Exception) -> Callable:
    def hf_hub_download(*args, **options):
        raise error

    return hf_hub_download


def hub_errors() -> dict[str, Exception]:
    errors = sys.modules["huggingface_hub"].errors
    response = types.SimpleNamespace(headers={}, request=None)
    return {
        "no such repository": errors.RepositoryNotFoundError("401\n\nno such", response=response),
        "gated": errors.GatedRepoError("403\nask for access", response=response),
        "offline": errors.LocalEntryNotFoundError("no connection\nand not in the cache"),
        "no network": ConnectionError("no route\nto host"),
        "time out": TimeoutError(),
        "disk full": OSError(28, "No space left on device"),
        "a bad id": errors.HFValidationError("no id\nat all"),
    }


@pytest.mark.parametrize("name", hub_errors())
def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse(hub_errors()[name]))
    attempts = describe_encoder, describe_vae, describe_text, lambda x: tensor_files(x, bool)
    for attempt in attempts:
        with refused(HUB, "cannot be had"):
            attempt(HUB)


def test_offline_what_the_cache_lacks_is_not_there(tmp_path, monkeypatch):
    """With the library's own code: a repository in the cache is taken as it is, no other is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refused(HUB, "cannot be had"):
        locate(HUB, "config.json")
    repository = tmp_path / "models--nobody--nothing"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text('{"a": 1}')
    assert read_settings(HUB) == {"a": 1}
    with refused(HUB, "no model.safetensors"):
        tensor_files(HUB, bool)


def test_only_the_files_that_are_needed_are_fetched(monkeypatch, checkpoint, tower):
    asked = []

    def hf_hub_download(repository: str, name: str) -> str:
        assert repository == HUB
        asked.append(name)
        if not (checkpoint / name).is_file():
            raise sys.modules["huggingface_hub"].errors.EntryNotFoundError(name)
        return str(checkpoint / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    config = describe_encoder(HUB)
    assert config == replace(describe_encoder(str(checkpoint)), weights=HUB)
    mine = QwenVisionTower(replace(config, dtype="float32"))
    assert set(asked) == {"config.json", "model.safetensors.index.json", *SHARDS[:2]}
    video = to_float(random_video(1, 2, 28, 28))
    assert mine.encode(video).equal(tower.encode(video))
    assert locate(HUB, "nothing.json") is None


@pytest.mark.parametrize("weights", ["a--b/c", "a/b.git", "a/..", "-a/b"])
def test_an_id_that_the_hub_does_not_allow_is_one_line(hub, weights):
    with refused(weights, "cannot be had"):
        locate(weights, "config.json")


@pytest.mark.parametrize("weights", ["a/b/c", "nothing", "/x", "https://host/a", "a b/c"])
def test_what_is_neither_folder_nor_hub_id_is_not_asked_for(monkeypatch, weights):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse(AssertionError("asked")))
    with refused("neither a folder"):
        locate(weights, "config.json")


@pytest.mark.parametrize(
    ("library", "extra", "build"),
    [
        ("transformers", "qwen", lambda: QwenVisionTower(PretrainedEncoderConfig(weights="x"))),
        ("transformers", "qwen", lambda: ENCODERS["vjepa2"](PretrainedEncoderConfig(weights="x"))),
        ("transformers", "text", lambda: UMT5(UMT5Config(weights="x"))),
        ("diffusers", "wan", lambda: WanVAE(WanVAEConfig(weights="x"))),
        ("huggingface_hub", "qwen", lambda: locate(HUB, "config.json")),
    ],
    ids=["tower", "vjepa2", "text", "vae", "hub"],
)
def test_a_missing_library_names_its_extra(monkeypatch, library, extra, build):
    monkeypatch.setitem(sys.modules, library, None)
    with refused(f'{library} is missing: pip install "semanticgen[{extra}]"'):
        build()


def write_broken_torchvision(folder: Path):
    """Write what pip leaves behind where torchvision does not fit torch: it is there, and dies."""
    (folder / "torchvision").mkdir()
    message = "operator torchvision::nms does not exist"
    (folder / "torchvision/__init__.py").write_text(f"raise RuntimeError({message!r})")
    about = folder / "torchvision-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    (about / "RECORD").write_text("torchvision/__init__.py,,\n")


BROKEN = """
import sys
from plumbing.files import UserError, require
for library in sys.argv[1:]:
    try:
        require(library, "extra")
    except UserError as error:
        print(error)
"""


def test_a_broken_torchvision_is_named(tmp_path):
    write_broken_torchvision(tmp_path)
    command = [sys.executable, "-c", BROKEN, "transformers", "diffusers"]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path}
    out = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["transformers", "diffusers"]
    for line in lines:
        assert "cannot be imported: operator torchvision::nms does not exist" in line
        assert "pip uninstall torchvision" in line


@pytest.mark.parametrize(
    "error", [ImportError("a name\nof it"), RuntimeError("an operator\nof it"), OSError("a .so")]
)
def test_a_library_that_cannot_be_imported_says_why(monkeypatch, error):
    def import_module(name: str) -> types.ModuleType:
        raise ImportError(f"could not import {name}\nsee above") from error

    monkeypatch.setattr("plumbing.files.importlib.import_module", import_module)
    with refused("some_library cannot be imported", str(error).split("\n")[0]):
        require("some_library", "extra")


def test_the_commands_import_no_extras():
    """They start without them: what is optional is imported when it is first needed."""
    code = "import train, sample, evaluate, prepare, sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    names = set(out.stdout.split())
    assert {"train", "torch", "safetensors"} <= names
    assert not names & {"transformers", "diffusers", "av", "matplotlib", "huggingface_hub"}


# --- the whole recipe ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["umt5, pipeline"], indirect=True)
def test_training_and_sampling_with_released_parts(
    tmp_path, checkpoint, wan, text, monkeypatch, capsys
):
    """The paper's preset, made small: by the command line alone, from a folder of videos."""
    from PIL import Image
    from test_run import call, one_line

    import sample
    import train
    from plumbing.cache import Cache
    from run import Run

    videos, run = tmp_path / "videos", tmp_path / "run"
    videos.mkdir()
    for k in range(3):
        frames = [Image.new("RGB", (40, 30), (60 * k, 9 * i, 100)) for i in range(25)]
        frames[0].save(videos / f"{k}.webp", save_all=True, append_images=frames[1:], duration=125)
        (videos / f"{k}.txt").write_text("a red circle")
    sizes = ["frames=9", "fps=8", "semantic_fps=2", "height=16", "width=32"]
    sizes += ["semantic_height=28", "semantic_width=56"]
    small = [f"{dit}.{x}" for dit in ("latent", "semantic") for x in ("width=32", "depth=1")]
    small += ["latent.heads=2", "semantic.heads=2", "sample.steps=2"]
    small += [f"stages.{s}.{x}" for s in ("latent", "semantic") for x in ("steps=2", "batch=8")]
    small += [f"stages.{s}.compile=false" for s in ("latent", "semantic")]  # it takes a minute
    settings = ["--set", *(f"data.{x}" for x in sizes), *small]
    common = ["--data", videos, "--out", run]
    flags = ["--qwen", checkpoint, "--vae", wan[0], "--text", text[0]]

    assert call(train.main, "--stage", "latent", *common, *settings, *flags[2:]) == 2
    one_line(capsys, "--qwen", "Qwen/Qwen2.5-VL-3B-Instruct", "72B")
    assert not run.exists()
    assert call(train.main, "--stage", "latent", *common, *settings, *flags) == 0
    assert call(train.main, "--stage", "semantic", *common, *settings) == 0  # it knows its parts
    assert {p.stem for p in run.glob("*.safetensors")} == {"latent", "semantic"}
    made = Cache(run / "cache")
    assert len(made) == 6 and made.features([0]).shape == (1, 48, 1, 1, 2)
    assert made.latents([0])[0].shape[1:] == (wan[1].config.z_dim, 3, 2, 4)
    capsys.readouterr()
    assert call(train.main, "--stage", "vae", *common, *settings) == 2
    one_line(capsys, "released weights")

    out, opened = tmp_path / "out.webp", Run.open(run)
    opened.config = replace(opened.config, dtype="bfloat16")  # not what released parts compute in
    latents = torch.randn(1, wan[1].config.z_dim, 3, 2, 4)
    plain = to_uint8(opened.vae.decode(latents)).int()
    assert (sample.decode(opened, latents).int() - plain).abs().max() <= 1
    assert call(sample.main, "--run", run, "a red circle", "--out", out) == 0
    with Image.open(out) as video:
        assert video.n_frames == 9
    reference = ["--run", run, "--reference", videos / "1.webp", "--out", out]
    assert call(sample.main, *reference) == 0
    assert call(sample.main, "--run", run, "x", "--seconds", 2, "--out", out) == 0
    with Image.open(out) as video:
        assert video.n_frames == 17  # 4k + 1

    moved = copied(checkpoint, tmp_path / "moved")
    monkeypatch.setattr(Run, "has", lambda *_: True)
    opened = Run.open(run)
    chain.point_to(opened, {"encoder": describe_encoder(str(moved))})
    assert opened.encoder.config.weights == str(moved)
    edit_tensors(next(moved.glob("*1-of*.safetensors")), lambda x: x[min(x)].add_(1))
    capsys.readouterr()
    assert call(sample.main, *reference, "--qwen", moved) == 2
    one_line(capsys, "was made with another encoder")
    away = Run.open(run)
    encoder = replace(away.config.encoder, weights=str(tmp_path / "away"))
    away.config = replace(away.config, encoder=encoder)
    with refused("away", "--qwen says where"):
        _ = away.encoder
