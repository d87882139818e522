"""How a stage starts: with which weights, or where its state left it.

SemanticGen fine-tunes both stages from a text-to-video model (Sec. 3.1 to 3.3), and trains both
from nothing in Fig. 9. Here all three starts:

| start                 | planner and painter begin as                                            |
|-----------------------|-------------------------------------------------------------------------|
| `--start scratch`     | nothing                                                                 |
| `--start base`        | the run's own trained base, the text-to-video model of the miniature    |
| `--dit WEIGHTS`       | Wan's released transformer (wan.py); the base, too: that is Base-CT     |

What the network that is started from lacks, such as the painter's projection of z_sem, begins as
from scratch; so do the planner's projections in and out, of another space.
"""

import torch
from torch import nn

from chain import check_weights
from optim import build_optimizers, changed_schedule
from plumbing.device import check_compiler
from plumbing.processes import Team
from plumbing.progress import Progress
from plumbing.seeds import text_seed
from run import Run
from settings import StageConfig
from stages import USES, learner, set_up, some_captions, some_features
from wan import ENDS, WanDiT


def begin(
    run: Run, stage: str, source, data: dict, seed: int, state: dict | None, team: Team
) -> Progress:
    """Set a stage up, and return it at its first step, or where its state left it."""
    config: StageConfig = getattr(run.config.stages, stage)
    if config.compile:
        check_compiler(stage)
    if stage in USES and "dit" in run.released_parts:
        check_weights(run, "dit")
    torch.manual_seed(text_seed(f"{seed} {stage}") % 2**63)  # initial weights
    compressor = run.compressor if stage == "semantic" else None
    modules = learner(run.config, stage, some_captions(stage, source), compressor)
    if stage in USES:
        start_network(run, stage, modules["dit"], source)
    modules.to(run.device).train()
    if stage == "latent":
        modules["compressor"].set_feature_statistics(some_features(run, source, 2**15))
    set_up(modules, config)
    wrapped = team.wrap(modules, run.device)
    known = {"of": config.steps, "clips": len(source), "data": data, "made_of": run.made_of(stage)}
    progress = Progress(stage, modules, wrapped, build_optimizers(modules, config), seed, **known)
    if state:
        progress.load(run.state_file(stage), state)
        if state.get("of", config.steps) != config.steps > progress.step:
            team.say(f"{stage}: {changed_schedule(config, progress.step, state['of'])}")
    return progress


def start_network(run: Run, stage: str, dit: nn.Module, source):
    """Give a network that has just been made what it starts from: the base, and the null text."""
    if isinstance(dit, WanDiT):
        dit.null_text.copy_(source.null_text())
    if "base" in run.needs(stage):
        own, base = dit.state_dict(), run.base.state_dict()
        # z_sem's own, even where the shapes are the same.
        new = ("latents_in.", "latents_out.", *ENDS) if stage == "semantic" else ()
        base = {n: x for n, x in base.items() if n in own and not n.startswith(new)}
        alike = {n: x for n, x in base.items() if own[n].shape == x.shape}
        dit.load_state_dict(alike, strict=False)
        run.let_go("base")
