"""A run: its configuration, its folder, and the parts put together from both.

    runs/NAME/config.json            every field, versions and commit
              STAGE.safetensors      EMA weights of a finished (or previewed) stage
              STAGE.state            what training needs to go on: weights, EMA, optimizers, step
              metrics.jsonl loss.png samples/

This is the one place that knows the files of a run and which part needs which. A part is trained
here (its weights are the run's) or released (its weights stay where they are; the run keeps their
place and digest). Weights are safetensors and states are read with `weights_only`: loading never
runs what a file contains.

    python run.py export runs/tiny assets/tiny      # weights alone, in half precision
"""

import argparse
import io
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from config import STAGES, Config, check_values, from_fields
from model import DiT
from plumbing.device import default_device, faster_dtype
from plumbing.fields import field_types, flat_fields
from plumbing.files import UserError, check_target, command, read_json, sweep, write_file
from plumbing.folder import versions
from plumbing.weights import digest
from semantic import (
    ENCODERS,
    Compressor,
    PretrainedEncoderConfig,
    SemanticEncoder,
    describe_encoder,
)
from text import UMT5, TextEncoder, UMT5Config, describe_text
from toy.encoder import TinyEncoder
from toy.text import HashText
from toy.vae import TinyVAE
from vae import VideoVAE, WanVAE, WanVAEConfig, describe_vae

FORMAT = 1  # of the run folder; raised when older folders can no longer be read
NEEDS = {  # the stages whose weights a stage is trained on, in the order of training
    "vae": (),
    "encoder": (),
    "latent": ("vae", "encoder"),
    "semantic": ("vae", "encoder", "latent"),
    "base": ("vae",),
}
FREE = (  # ends of fields that may change while a run is trained
    *(".steps", ".weights", ".chunk"),
    *(".accumulate", ".compile", ".checkpoint", ".preview_every"),  # how, not what
)
RELEASED = (PretrainedEncoderConfig, WanVAEConfig, UMT5Config)  # not trained here
FLAGS = {  # part -> (flags that name its weights, how to describe them, what fits)
    "encoder": (
        ("--qwen", "--encoder"),
        describe_encoder,
        "Qwen/Qwen2.5-VL-3B-Instruct, -7B-Instruct or -72B-Instruct",
    ),
    "vae": (("--vae",), describe_vae, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "text": (("--text",), describe_text, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
}
ASSETS = Path(__file__).parent / "assets" / "tiny"  # the shipped tiny weights, themselves a run


# --- the machine --------------------------------------------------------------------------------


# --- released parts -----------------------------------------------------------------------------


def add_part_flags(parser: argparse.ArgumentParser):
    """Add the flags that name released weights."""
    for part, (flags, _, fits) in FLAGS.items():
        parser.add_argument(
            *flags, dest=part, metavar="PATH_OR_ID", help=f"released weights, such as {fits}"
        )


def parts_from_flags(args: argparse.Namespace) -> dict[str, object]:
    """Return {part: configuration} of the parts whose weights the flags name."""
    named = {part: getattr(args, part) for part in FLAGS if getattr(args, part) is not None}
    if empty := [FLAGS[part][0][0] for part, weights in named.items() if not weights]:
        raise UserError(f"{empty[0]}: the name is empty; a folder of weights or a hub id")
    return {part: FLAGS[part][1](weights) for part, weights in named.items()}


def check_weights_named(config: Config):
    """Raise UserError, naming flags and what fits them, where released weights are not named."""
    missing = []
    for part, (flags, _, fits) in FLAGS.items():
        chosen = getattr(config, part)
        if isinstance(chosen, RELEASED) and not chosen.weights:
            missing.append(f"{flags[0]} PATH_OR_ID ({fits})")
    if missing:
        names = ", ".join(missing)
        raise UserError(f"preset {config.preset} needs weights: {names}; --tiny needs none")


# --- the folder ---------------------------------------------------------------------------------


class Run:
    """A run folder and its parts, loaded when first asked for, frozen and in eval mode."""

    def __init__(self, path: Path, config: Config, device: torch.device | None = None):
        self.path, self.config = Path(path), config
        self.device = device or default_device()
        self.board = None  # a SummaryWriter of TensorBoard, if asked for

    @classmethod
    def create(cls, path: Path, config: Config) -> "Run":
        """Start a run folder, or open it if it is there with the same configuration.

        Raises UserError, naming the fields, where the folder's own configuration differs.
        """
        if (Path(path) / "config.json").exists():
            run = cls.open(path)
            new = config if config.dtype != "auto" else replace(config, dtype=run.config.dtype)
            old, new = flat_fields(run.config), flat_fields(new)
            changed = [
                f"{name} {old.get(name)} -> {new.get(name)}"
                for name in {**old, **new}
                if old.get(name) != new.get(name)
                and not name.startswith("sample.")  # free to change, as are these:
                and not name.endswith(FREE)
            ]
            if changed:
                raise UserError(
                    f"{path} was made with other settings ({', '.join(changed[:4])}): "
                    f"give another --out, or remove it"
                )
            run.config = from_fields(new)
        else:
            run = cls(path, config)
            if config.dtype == "auto":
                run.config = replace(config, dtype=faster_dtype(run.device))
        sweep(run.path)
        content = {"format": FORMAT, "versions": versions(), "config": flat_fields(run.config)}
        write_file(run.path / "config.json", json.dumps(content, indent=1).encode())
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open a run folder; UserError if it is not one, or one of another version."""
        file = Path(path) / "config.json"
        try:
            content = read_json(file)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path} is no run; train one: python train.py --stage all --tiny --out {path}"
            ) from None
        values = content.get("config") if isinstance(content, dict) else None
        if not isinstance(values, dict) or "format" not in content:
            raise UserError(f"{file} is not a run's configuration: no format and fields in it")
        if content["format"] != FORMAT:
            raise UserError(f"{file}: format {content['format']!r}, this version reads {FORMAT}")
        try:
            if unknown := sorted(values.keys() - field_types(Config, values).keys()):
                raise UserError(f"made by another version; unknown fields: {unknown[:4]}")
            check_values(values)
            config = from_fields(values)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        if config.dtype == "auto":
            config = replace(config, dtype=faster_dtype(default_device()))
        return cls(Path(path), config)

    # Parts by stage, as they are trained and saved together.

    def build(self, stage: str) -> nn.ModuleDict:
        """Return a stage's modules, freshly initialised."""
        config = self.config
        if stage == "vae":
            return nn.ModuleDict({"vae": TinyVAE(config.vae)})
        if stage == "encoder":
            return nn.ModuleDict({"encoder": TinyEncoder(config.encoder)})
        if stage == "latent":
            compressor = Compressor(config.encoder.dim, config.compressor)
            return nn.ModuleDict({"compressor": compressor, "dit": DiT(config.latent)})
        if stage == "semantic":
            return nn.ModuleDict({"dit": DiT(config.semantic)})
        # The base's windows have no plan to tell them when they are: it needs absolute time.
        base = replace(config.latent, context_channels=0, time_features=True)
        return nn.ModuleDict({"dit": DiT(base)})

    def released(self, part: str) -> bool:
        """Return whether a part ("vae", "encoder", "text") comes with released weights."""
        return isinstance(getattr(self.config, part, None), RELEASED)

    def needs(self, stage: str) -> list[str]:
        """Return the stages to train before a stage."""
        return [need for need in NEEDS[stage] if not self.released(need)]

    def weights_file(self, stage: str) -> Path:
        return self.path / f"{stage}.safetensors"

    def state_file(self, stage: str) -> Path:
        return self.path / f"{stage}.state"

    def forget(self, stage: str):
        """Remove a stage's weights and state, and those of the stages trained on it."""
        for name in [stage, *(s for s in STAGES if stage in NEEDS[s])]:
            self.weights_file(name).unlink(missing_ok=True)
            self.state_file(name).unlink(missing_ok=True)

    def has(self, stage: str) -> bool:
        """Return whether a stage's weights are there; UserError if something else is."""
        for file in (self.weights_file(stage), self.state_file(stage)):
            if file.exists() and not file.is_file():
                raise UserError(f"{file} is not a file: remove it")
        return self.weights_file(stage).exists()

    def steps_of(self, stage: str) -> int:
        """Return for how many steps a stage's weights were trained; 0 if they do not say."""
        try:
            with safetensors.safe_open(self.weights_file(stage), "pt") as file:
                return int((file.metadata() or {}).get("steps", 0))
        except (safetensors.SafetensorError, ValueError):
            return 0

    def save(self, stage: str, tensors: dict[str, Tensor], note: dict[str, str]):
        """Write a stage's weights; note: strings kept in the file's header."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        write_file(self.weights_file(stage), save(tensors, {"stage": stage, **note}))

    def load(self, stage: str) -> nn.ModuleDict:
        """Return a stage's trained modules, frozen; UserError if they are missing or do not fit."""
        file = self.weights_file(stage)
        if not self.has(stage):
            raise UserError(
                f"{self.path} has no {file.name} yet: python train.py --stage {stage} "
                f"--preset {self.config.preset} --out {self.path}"
            )
        with torch.random.fork_rng():  # initial values do not touch the caller's random numbers
            modules = self.build(stage)
        try:
            tensors = {name: x.float() for name, x in load_file(file).items()}
            modules.load_state_dict(tensors)
        except (safetensors.SafetensorError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise UserError(f"{file} does not fit this run's configuration: {reason}") from None
        return modules.to(self.device).eval().requires_grad_(False)

    def point_to(self, parts: dict[str, object]):
        """Take released weights from other places than the run names; UserError if they differ."""
        for part, found in parts.items():
            mine = getattr(self.config, part)
            if not self.released(part) or mine.digest != found.digest:
                raise UserError(f"{found.weights}: {self.path} was made with another {part}")
            self.config = replace(self.config, **{part: replace(mine, weights=found.weights)})

    def _load_released(self, part: str, kind: type[nn.Module]) -> nn.Module:
        """Return a released part; UserError if its weights are not those of this run."""
        config = getattr(self.config, part)
        if not config.weights:
            raise UserError(f"{self.path} names no weights: give {FLAGS[part][0][0]} PATH_OR_ID")
        if FLAGS[part][1](config.weights).digest != config.digest:
            raise UserError(f"{config.weights} has other weights than {self.path} was made with")
        return kind(config, self.device)

    @cached_property
    def vae(self) -> VideoVAE:
        if self.released("vae"):
            return self._load_released("vae", WanVAE)
        return self.load("vae")["vae"]

    @cached_property
    def encoder(self) -> SemanticEncoder:
        if self.released("encoder"):
            kind = self.config.encoder.kind
            if kind not in ENCODERS:
                raise UserError(f"{self.path} was made with an encoder {kind!r}, not known here")
            return self._load_released("encoder", ENCODERS[kind])
        return self.load("encoder")["encoder"]

    @cached_property
    def text(self) -> TextEncoder:
        if self.released("text"):
            return self._load_released("text", UMT5)
        return HashText(self.config.text)

    @cached_property
    def painter(self) -> nn.ModuleDict:
        """Stage 2: {"compressor", "dit"}."""
        return self.load("latent")

    @cached_property
    def planner(self) -> DiT:
        return self.load("semantic")["dit"]

    @cached_property
    def base(self) -> DiT:
        return self.load("base")["dit"]

    def unload(self):
        """Let go of all parts: they are loaded anew when asked for."""
        for part in ("vae", "encoder", "text", "painter", "planner", "base"):
            vars(self).pop(part, None)

    def identity(self) -> dict[str, object]:
        """Return all that decides how a clip is encoded: fields of data and parts, and digests."""
        found = {}
        for name, value in flat_fields(self.config).items():
            part, field = name.split(".")[0], name.split(".")[-1]
            if part in ("data", *FLAGS) and field not in ("weights", "chunk", "objects"):
                found[name] = value
        for stage in ("vae", "encoder"):
            if not self.released(stage):
                trained = self.has(stage)
                found[f"{stage}.digest"] = (
                    digest([self.weights_file(stage)]) if trained else "not trained yet"
                )
        return found

    def save_state(self, stage: str, state: dict):
        """Write a training state; the old one stays until the new one is complete."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(self.state_file(stage), buffer.getvalue())

    def load_state(self, stage: str) -> dict | None:
        """Return a stage's training state, or None if there is none."""
        file = self.state_file(stage)
        if not file.exists():
            return None
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # of many classes; what torch says is how to run what is in the file
            state = None
        if not isinstance(state, dict) or not state:
            raise UserError(
                f"{file} is not a training state (damaged, or another kind of file): "
                "--fresh starts over"
            )
        return state


def export(source: Path, target: Path):
    """Copy a run's configuration and finished weights, in half precision, to another folder."""
    run = Run.open(source)
    found = [stage for stage in STAGES if run.has(stage) and stage != "base"]
    if not found:
        raise UserError(f"{source} has no weights to export")
    if Path(target).resolve() == Path(source).resolve():
        raise UserError(f"{target} is the run itself: name another folder")
    copy = Run(target, run.config)
    if any(copy.state_file(stage).exists() for stage in STAGES):
        raise UserError(f"{target} is a run in training, whose weights would be lost: name another")
    check_target(Path(target), folder=True)
    weights = {stage: run.load(stage).state_dict() for stage in found}  # all, before any is written
    for stage, tensors in weights.items():
        with safetensors.safe_open(run.weights_file(stage), "pt") as file:
            note = file.metadata() or {}
        copy.save(stage, {name: x.half() for name, x in tensors.items()}, note)
    write_file(Path(target) / "config.json", (run.path / "config.json").read_bytes())
    print(f"{', '.join(found)} -> {target}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["export"])
    parser.add_argument("source", type=Path, help="a run folder")
    parser.add_argument("target", type=Path, help="where its weights go")
    args = parser.parse_args()
    export(args.source, args.target)


if __name__ == "__main__":
    command(main)
