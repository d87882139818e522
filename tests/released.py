"""Small random checkpoints in the layout of released ones, for the tests that load them.

`write_wan` writes a whole repository as Wan-AI/Wan2.1-T2V-1.3B-Diffusers is, `write_qwen` one as
Qwen2.5-VL is; `write_hub` puts either into a cache as the hub's own library does. All values are
random and none is zero, so that a part that is left out or read twice shows.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import randn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plumbing.files import require

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
diffusers = pytest.importorskip("diffusers")
require("transformers", "qwen")  # without its bars
require("diffusers", "wan")

QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
VJEPA2 = "facebook/vjepa2-vitl-fpc64-256"
COMMIT = "0fad780a534b6463e45facd96134c9f345acfa5b"


def fill(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors of the same names and shapes, under which every layer matters."""
    found = {}
    for k, (name, x) in enumerate(tensors.items()):
        found[name] = randn(*x.shape, seed=1000 * seed + k)
        if x.ndim == 1 and name.endswith("weight"):  # gains
            found[name] = 1 + 0.2 * found[name]
        elif x.ndim > 1:
            found[name] /= x[0].numel() ** 0.5
    return found


def filled(model: nn.Module) -> nn.Module:
    model.load_state_dict(fill(model.state_dict()))
    return model.eval()


# --- files --------------------------------------------------------------------------------------


def write_json(file: Path, content: object):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2))


def write_index(folder: Path, shards: dict[str, dict], stem: str = "model"):
    places = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], stem: str = "model"):
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    write_index(folder, shards, stem)


def split(tensors: dict[str, Tensor], count: int, stem: str) -> dict[str, dict[str, Tensor]]:
    """Return {file name: tensors} of that many shards."""
    items = list(tensors.items())
    names = [f"{stem}-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    return {name: dict(items[k::count]) for k, name in enumerate(names)}


def write_hub(cache: Path, name: str, folder: Path) -> Path:
    """Write a repository into the hub's cache: blobs, links to them in a snapshot, and its name."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    return snapshot


# --- Qwen2.5-VL ---------------------------------------------------------------------------------

VISION = {  # config.json of the released 3B model, smaller; windows of 4 x 4 features
    "depth": 4,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "in_chans": 3,
    "out_hidden_size": 48,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
LANGUAGE = {  # names of the language model's tensors, which nothing here may need
    "model.embed_tokens.weight": (11, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.down_proj.weight": (8, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}
SHARDS = [f"model-{k:05d}-of-00004.safetensors" for k in (1, 2, 3, 4)]  # the tower: in 1 and 2


def library_tower(vision: dict = VISION) -> nn.Module:
    config = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig
    with torch.random.fork_rng():
        return transformers.Qwen2_5_VisionTransformerPretrainedModel(config(**vision)).eval()


def write_settings(folder: Path, vision: dict = VISION):
    settings = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": 8}
    settings |= {"model_type": "qwen2_5_vl", "vision_config": vision, "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", settings)


def write_qwen(folder: Path, tower: dict[str, Tensor], prefix: str = "visual.") -> Path:
    """Write a Qwen2.5-VL: the tower in shards 1 and 2, the language model in 2, 3 and 4."""
    write_settings(folder)
    visual = {prefix + name: x for name, x in tower.items()}
    names, half = list(visual), len(visual) // 2
    language = {name: randn(*shape) for name, shape in LANGUAGE.items()}
    first, second, third, fourth = (
        {name: visual[name] for name in names[:half]},
        {name: visual[name] for name in names[half:]},
        {name: language.pop(name) for name in list(language)[1:3]},
        {"lm_head.weight": language.pop("lm_head.weight")},
    )
    parts = (first, second | language, third, fourth)
    write_shards(folder, dict(zip(SHARDS, parts, strict=True)))
    return folder


# --- V-JEPA 2 -----------------------------------------------------------------------------------


def vjepa2_model() -> nn.Module:
    config = transformers.VJEPA2Config(
        crop_size=64,
        frames_per_clip=8,
        hidden_size=48,
        num_attention_heads=4,
        num_hidden_layers=3,
        mlp_ratio=2.0,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    with torch.random.fork_rng():
        return filled(transformers.VJEPA2Model(config))


# --- text encoders ------------------------------------------------------------------------------

WORDS = ["a", "red", "blue", "circle", "square", "moves", "left", "right", "up", "and", "grows"]
FIRST_WORD = 3  # its id, in both tokenizers


def write_t5_tokenizer(folder: Path):
    """Write a tokenizer of whole words in the files of T5's, which puts </s> after each text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{x}", -1.0) for x in WORDS)]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    (folder / "spiece.model").write_bytes(b"the same in another form, read where the first is not")


def write_word_tokenizer(folder: Path):
    """Write a tokenizer of whole words that puts nothing after a text."""
    vocabulary = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inside = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inside.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=inside, **special).save_pretrained(folder)


def umt5_model() -> nn.Module:
    config = transformers.UMT5Config(
        vocab_size=FIRST_WORD + len(WORDS),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.UMT5EncoderModel(config).eval()


def bert_model() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=FIRST_WORD + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertModel(config).eval()


# --- Wan2.1 -------------------------------------------------------------------------------------

MEAN, STD = [0.3, -0.5, 0.1, 0.9], [0.5, 2.0, 1.5, 0.8]  # of the VAE's latents


def wan_vae() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=MEAN,
            latents_std=STD,
        ).eval()


def wan_transformer() -> nn.Module:
    with torch.random.fork_rng():
        model = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=32,
        )
    return filled(model)


def write_wan(folder: Path) -> dict[str, nn.Module]:
    """Write the whole repository; return the library's own model of each of its folders."""
    models = {"text_encoder": umt5_model(), "transformer": wan_transformer(), "vae": wan_vae()}
    library = {"text_encoder": ["transformers", "UMT5EncoderModel"]}
    library |= {"tokenizer": ["transformers", "T5TokenizerFast"]}
    library |= {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    library |= {name: ["diffusers", type(models[name]).__name__] for name in ("transformer", "vae")}
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline", **library})
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    write_t5_tokenizer(folder / "tokenizer")
    for name, stem, count in (
        ("text_encoder", "model", 5),
        ("transformer", "diffusion_pytorch_model", 2),
        ("vae", "diffusion_pytorch_model", 1),
    ):
        models[name].save_pretrained(folder / name)
        if count > 1:
            single = folder / name / f"{stem}.safetensors"
            tensors = load_file(single)
            single.unlink()
            write_shards(folder / name, split(tensors, count, stem), stem)
    return models
