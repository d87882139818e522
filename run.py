"""A run: its configuration, its folder, and the parts put together from both.

    runs/NAME/config.json            every field, versions and commit
              STAGE.safetensors      EMA weights of a finished (or previewed) stage
              STAGE.state            what training needs to go on: weights, EMA, optimizers, step
              metrics.jsonl loss.png samples/

A part is trained here (its weights are the run's) or released (its weights stay where they are; the
run keeps their place and digest). Parts that do not belong together are never used together.

    python run.py export runs/tiny assets/tiny      # weights alone, in half precision
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from chain import again, check_chain, check_weights
from parts import FLAGS, RELEASED, load_released, networks
from plumbing.device import default_device, faster_dtype
from plumbing.fields import command_line, differences, field_types, flat_fields
from plumbing.files import UserError, check_target, command, read_json, sweep, to_path, write_file
from plumbing.folder import misfit, read_note, read_state, read_weights, versions, write_weights
from semantic import Compressor, SemanticEncoder
from settings import Config, Network, check_values, from_fields
from stages import ORDER, RECIPE, needs_of
from text import TextEncoder
from toy.encoder import LatentEncoder, LatentEncoderConfig, TinyEncoder
from toy.text import HashText
from toy.vae import TinyVAE
from vae import VideoVAE
from wan import WanDiTConfig, build_dit, write_released

FORMAT = 3  # of the run folder; raised when older folders can no longer be read
HELD = {  # the modules that a stage's weights file holds -> the parts of a run that they are
    "vae": {"vae": "vae"},
    "encoder": {"encoder": "encoder"},
    "latent": {"compressor": "compressor", "dit": "painter"},
    "semantic": {"dit": "planner"},
    "base": {"dit": "base"},
}
FREE = (  # ends of fields that may change while a run is trained: how, not what
    *(".steps", ".weights", ".chunk", ".accumulate", ".compile", ".checkpoint", ".preview_every"),
)
ASSETS = Path(__file__).parent / "assets" / "tiny"  # the shipped tiny weights, themselves a run


class Run:
    """A run folder and its parts, loaded when first asked for, frozen and in eval mode."""

    def __init__(self, path: Path, config: Config, device: torch.device | None = None):
        self.path, self.config = Path(path), config
        self.device = device or default_device()

    @classmethod
    def create(cls, path: Path, config: Config) -> "Run":
        """Start a run folder, or open it if it is there with the same configuration.

        Raises UserError, naming the fields, where the folder's own configuration differs.
        """
        if (Path(path) / "config.json").exists():
            run = cls.open(path)
            new = config if config.dtype != "auto" else replace(config, dtype=run.config.dtype)
            changed = differences(flat_fields(run.config), flat_fields(new))
            free = [x for x in changed if x.startswith("sample.") or x.split()[0].endswith(FREE)]
            if changed := [x for x in changed if x not in free]:
                raise UserError(
                    f"{path} was made with other settings ({', '.join(changed[:4])}): "
                    f"give another --out, or remove it"
                )
            run.config = new
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

    def weights_file(self, stage: str) -> Path:
        return self.path / f"{stage}.safetensors"

    def state_file(self, stage: str) -> Path:
        return self.path / f"{stage}.state"

    def forget(self, stage: str):
        """Remove a stage's weights and state, and those of the stages trained on it."""
        for name in [stage, *(s for s in ORDER if stage in self.needs(s))]:
            self.weights_file(name).unlink(missing_ok=True)
            self.state_file(name).unlink(missing_ok=True)
        if stage in ("vae", "encoder") and (self.path / "cache/cache.json").exists():
            shutil.rmtree(self.path / "cache", ignore_errors=True)  # what they have encoded

    def save(self, stage: str, tensors: dict[str, Tensor], note: dict):
        """Write a stage's weights; note: their steps, their data, and what else is to be known."""
        note = {"stage": stage, "made_of": self.made_of(stage), **note}
        write_weights(self.weights_file(stage), tensors, note)

    def load_state(self, stage: str) -> dict | None:
        """Return a stage's training state, None if there is none; UserError if it is damaged."""
        return read_state(self.state_file(stage))

    # What belongs together: the chain of stages.

    def released(self, part: str) -> bool:
        """Return whether a part ("vae", "encoder", "text") comes ready-made, as released ones."""
        return isinstance(getattr(self.config, part, None), (*RELEASED, LatentEncoderConfig))

    @property
    def released_parts(self) -> dict[str, object]:
        """The configurations of all parts with released weights, what the DiTs start from too."""
        found = {part: getattr(self.config, part) for part in FLAGS if self.released(part)}
        for dit in networks(self.config).values():
            found |= {"dit": dit.wan} if dit.wan.weights else {}
        return found

    def needs(self, stage: str) -> list[str]:
        """Return the stages to train before a stage."""
        return [need for need in needs_of(self.config, stage) if not self.released(need)]

    def has(self, stage: str) -> bool:
        """Return whether a stage's weights are there; UserError if something else is."""
        for file in (self.weights_file(stage), self.state_file(stage)):
            if file.exists() and not file.is_file():
                raise UserError(f"{file} is not a file: remove it")
        return self.weights_file(stage).exists()

    def note(self, stage: str) -> dict:
        """Return what a stage's weights file says of itself; {} if it is not there or damaged."""
        return read_note(self.weights_file(stage)) if self.has(stage) else {}

    def steps_of(self, stage: str) -> int:
        """Return for how many steps a stage's weights were trained; 0 if they do not say."""
        return self.note(stage).get("steps", 0)

    def finished(self, stage: str) -> bool:
        """Return whether a stage's weights are there and are no preview of a stage in training."""
        note = self.note(stage)
        return self.has(stage) and note.get("steps", 0) >= note.get("of", 0)

    def made_of(self, stage: str) -> dict[str, str]:
        """Return {need: digest its weights have now} for the stages that a stage is trained on."""
        return {need: self.note(need).get("digest", "") for need in self.needs(stage)}

    def check_there(self, stage: str):
        """Raise UserError if a trained stage has no weights, or ones that do not belong here."""
        if self.released(stage):
            return
        if not self.has(stage):
            raise UserError(f"{self.path} has no {stage}.safetensors yet: {again(self, stage)}")
        check_chain(self, stage)

    # The parts.

    @cached_property
    def vae(self) -> VideoVAE:
        if self.released("vae"):
            return self._load_released("vae")
        return self._load("vae", "vae", TinyVAE, self.config.vae)

    @cached_property
    def encoder(self) -> SemanticEncoder:
        if isinstance(self.config.encoder, LatentEncoderConfig):
            return LatentEncoder(self.config.encoder, self.vae)
        if self.released("encoder"):
            return self._load_released("encoder")
        return self._load("encoder", "encoder", TinyEncoder, self.config.encoder)

    @cached_property
    def text(self) -> TextEncoder:
        if self.released("text"):
            return self._load_released("text")
        return HashText(self.config.text)

    @cached_property
    def compressor(self) -> Compressor:
        config = self.config
        return self._load("latent", "compressor", Compressor, config.encoder.dim, config.compressor)

    @cached_property
    def painter(self) -> nn.Module:
        return self._dit("latent", self.config.latent)

    @cached_property
    def planner(self) -> nn.Module:
        return self._dit("semantic", self.config.semantic)

    @cached_property
    def base(self) -> nn.Module:
        return self._dit("base", self.config.base)

    def let_go(self, *parts: str):
        """Drop parts from memory, all if none is named: they are loaded anew when asked for."""
        for part in parts or ("vae", "encoder", "text", "compressor", "painter", "planner", "base"):
            vars(self).pop(part, None)

    def _dit(self, stage: str, config: Network) -> nn.Module:
        """Return a network. What of a released one was not trained is loaded from there."""
        whole = not isinstance(config, WanDiTConfig) or config.train == "all"
        if not whole and config.wan.weights:  # the rest is not in the run's own file
            check_weights(self, "dit")
        return self._load(stage, "dit", build_dit, config, device="meta" if whole else "cpu")

    def _load(self, stage: str, module: str, kind: Callable, *configs, device="meta") -> nn.Module:
        """Return a trained part, frozen; UserError if its weights are missing or do not fit."""
        file = self.weights_file(stage)
        self.check_there(stage)
        with torch.random.fork_rng(devices=[]), torch.device(device):  # the caller's stay
            part = kind(*configs)  # on "meta" without initial values, as its file holds all of it
        frozen = {name: p for name, p in part.named_parameters() if not p.requires_grad}
        try:
            tensors = read_weights(file, module, HELD[stage])
            part.load_state_dict(frozen | tensors, assign=device == "meta")
        except (safetensors.SafetensorError, RuntimeError, KeyError) as error:
            reason = misfit(error)
            raise UserError(f"{file} does not fit this run's configuration: {reason}") from None
        part.frozen = frozen.keys()  # what the file does not hold
        return part.to(self.device).eval().requires_grad_(False)

    def _load_released(self, part: str) -> nn.Module:
        """Return a released part; UserError if its weights are not those of this run."""
        check_weights(self, part)
        return load_released(getattr(self.config, part), self.device)


def export(source: Path, target: Path):
    """Copy a run's configuration and finished weights, in half precision, to another folder.

    Without the base; but one on Wan's transformer is written, in full precision, as released ones.
    """
    run = Run.open(source)
    found = [stage for stage in RECIPE if run.finished(stage)]
    base = run.base if isinstance(run.config.base, WanDiTConfig) and run.finished("base") else None
    if not found and not base:
        raise UserError(f"{source} has no weights to export")
    if Path(target).resolve() == Path(source).resolve():
        raise UserError(f"{target} is the run itself: name another folder")
    if (Path(target) / "config.json").exists():
        Run.open(target)  # or it is refused: not ours
    copy = Run(target, run.config)
    if any(copy.state_file(stage).exists() for stage in ORDER):
        raise UserError(f"{target} is a run in training, whose weights would be lost: name another")
    check_target(Path(target), folder=True)
    weights = {}
    for stage in found:  # all, before any is written
        weights[stage] = {
            f"{name}.{n}": x.half()
            for name, part in HELD[stage].items()
            for n, x in getattr(run, part).state_dict().items()
            if n not in getattr(run, part).frozen
        }
    for stage, tensors in weights.items():  # in the order of training: notes name what is there
        copy.save(stage, tensors, {**run.note(stage), "made_of": copy.made_of(stage)})
    write_file(Path(target) / "config.json", (run.path / "config.json").read_bytes())
    if base:
        write_released(base, Path(target))  # what --dit starts from
    print(f"{', '.join([*found, *(['transformer'] if base else [])])} -> {target}")


def main():
    parser = command_line(__doc__)
    parser.add_argument("action", choices=["export"])
    parser.add_argument("source", type=to_path, help="a run folder")
    parser.add_argument("target", type=to_path, help="where its weights go")
    args = parser.parse_args()
    export(args.source, args.target)


if __name__ == "__main__":
    command(main)
