"""What commands that use a trained run share: their flags, and what these stand for."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from chain import point_to
from config import clip_frames
from parts import add_part_flags, parts_from_flags
from plumbing.files import UserError, one_line, to_path
from run import ASSETS, HELD, Run
from settings import SampleConfig, check_number


def add_run_flags(parser: argparse.ArgumentParser):
    """Add the flags that say which run is used, and how it samples."""
    parser.add_argument("--run", type=to_path, default=ASSETS, help="run folder; else assets/tiny")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    parser.add_argument("--steps", type=int, help="Euler steps of each stage; else the run's")
    parser.add_argument("--seconds", type=float, help="length; the trained one if not given")
    add_part_flags(parser)


def open_run(args: argparse.Namespace, stages: Sequence[str]) -> Run:
    """Open a run, and say in one line each which of these stages are previews.

    UserError if one of them has no weights, or if they do not belong together.
    """
    run = Run.open(args.run)
    point_to(run, parts_from_flags(args))
    for stage in stages:
        run.check_there(stage)
        if not (run.released(stage) or run.finished(stage)):
            name = HELD[stage].get("dit", stage)
            print("{}: a preview at step {steps} of {of}".format(name, **run.note(stage)))
    return run


def options_of(run: Run, steps: int | None, guidance: Sequence[float] = ()) -> SampleConfig:
    """Return the run's options, changed as the command line says.

    guidance: up to three numbers, for planner, painter towards the text, painter towards the plan;
    of fewer, the last counts for the rest. UserError for impossible numbers.
    """
    if len(guidance) > 3:
        raise UserError(f"--guidance: one to three numbers, not {len(guidance)}")
    changed: dict[str, float] = {} if steps is None else {"steps": steps}
    if guidance:
        planner, painter, plan = [*guidance, guidance[-1], guidance[-1]][:3]
        changed |= {"guidance": planner, "latent_guidance": painter, "context_guidance": plan}
        changed["base_guidance"] = painter
    for name, value in changed.items():
        check_number(f"sample.{name}", value, f"--{name.split('_')[-1]} {value}")
    return replace(run.config.sample, **changed)


def frames_of(run: Run, seconds: float | None) -> int:
    """Return the frames of a video of about that length; say so if it is not exactly that long."""
    if seconds is None:
        return run.config.data.frames
    frames, fps = clip_frames(run.config, seconds), run.config.data.fps
    if abs(frames - seconds * fps) > 1e-6:
        print(f"--seconds {seconds:g}: {frames} frames are made, {frames / fps:g} s")
    if frames > run.config.data.frames:
        known = run.config.data.seconds
        print(f"it has learned clips of {known:g} s: what is told may not happen later than that")
    return frames


def encode_prompts(run: Run, prompts: Sequence[str], negative: str | None) -> list[Tensor]:
    """Return each prompt's tokens (1, L, dim), (2, 1, L, dim) with the negative one's.

    Say which texts are longer than is read.
    """
    words = run.text.config.words
    for prompt in (*prompts, negative or ""):
        if (count := run.text.count(prompt)) > words:
            print(f"{one_line(prompt, 60)}: the first {words} of its {count} words are read")
    tokens = [run.text.encode([prompt]) for prompt in prompts]
    return [torch.stack([x, run.text.encode([negative])]) for x in tokens] if negative else tokens
