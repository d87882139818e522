"""Where a stage of training is, and what it has by then: all that a training state holds."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from plumbing.files import UserError
from plumbing.folder import misfit, write_state
from plumbing.processes import Team, get_state, local, set_state, shared_like, whole
from plumbing.seeds import Rows

# What torch and our own checks raise where a state is not one of this stage.
WRONG = (LookupError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
PATIENCE = 5  # steps in a row that may be skipped for a loss or gradient that is not finite
KEPT = ("step", "bad", "seconds", "seed", "of", "pending", "data", "made_of")


@dataclass(eq=False)
class Progress:
    """A stage in training."""

    stage: str
    modules: nn.ModuleDict  # what learns
    wrapped: nn.Module  # the same, shared among processes
    optimizers: list[torch.optim.Optimizer]
    seed: int
    of: int  # the steps it is to have
    clips: int  # of which it draws
    data: dict  # what they are
    made_of: dict  # the weights it is trained on

    def __post_init__(self):
        frozen = {name for name, p in self.modules.named_parameters() if not p.requires_grad}
        self.ema = {n: x.clone() for n, x in self.modules.state_dict().items() if n not in frozen}
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.step = self.bad = 0  # steps done; of these the last so many were skipped
        self.seconds = 0.0  # of training, over all sittings
        self.pending: list[dict] = []  # logs of steps that have no line in metrics.jsonl yet

    def __str__(self) -> str:
        return f"{self.stage}: {sum(p.numel() for p in self.parameters) / 1e6:.2f} M parameters"

    def rows(self, rows: range, step: int) -> Rows:
        """Return the random numbers of some rows of a step's batch."""
        return Rows(rows, self.seed, self.stage, step)

    def skip(self, batch: list[dict[str, Tensor]], values: dict) -> dict[str, float]:
        """Count a step that is skipped; UserError, saying where, after PATIENCE of them in a row.

        batch: the inputs of its micro-batches; values: its loss and the norm of its gradient.
        """
        self.bad += 1
        if self.bad < PATIENCE:
            return {"skipped": 1.0}
        indices = self.rows(range(8), self.step).indices(self.clips)
        times = [t for inputs in batch for t in inputs.get("t", torch.empty(0)).tolist()]
        at = f"; t from {min(times):.3f} to {max(times):.3f}" if times else ""
        raise UserError(
            f"{self.stage}: loss {values['loss']} and gradient {values['grad_norm']} in "
            f"{self.bad} steps in a row, the last at step {self.step + 1}{at}; clips "
            f"{indices} ...; lower lr or muon_lr, the last saved state is intact"
        )

    def whole_ema(self, team: Team) -> dict[str, Tensor]:
        """Return the EMA weights on the CPU, to the first process; every one must ask."""
        found = ((name, whole(x)) for name, x in self.ema.items())
        return {name: x.cpu() for name, x in found if team.first}

    def save(self, path: Path, team: Team):
        """Write a state; the old one stays until the new one is complete. All wait for that."""
        state = get_state(self.modules, self.optimizers)
        state["ema"] = self.whole_ema(team)
        if team.first:
            write_state(path, state | {name: getattr(self, name) for name in KEPT})
        team.wait()  # torchrun stops all where one has ended

    def load(self, path: Path, state: dict):
        """Go on from a state that was read from path; UserError if it does not fit."""
        try:
            self.step, self.bad = int(state["step"]), int(state["bad"])
            self.seconds, self.pending = float(state["seconds"]), list(state["pending"])
            if not 0 <= self.bad <= self.step or not 0 <= self.seconds < math.inf:
                raise ValueError(f"step {self.step}, {self.bad} skipped, {self.seconds} s")
            if not isinstance(state["seed"], int):
                raise ValueError("its seed is no number")
            if not all(isinstance(x, float) for logs in self.pending for x in logs.values()):
                raise ValueError("its logs are no numbers")
            if odd := sorted(state["modules"].keys() ^ self.ema.keys()):
                raise ValueError(f"it has other weights, of another version or stage: {odd[0]}")
            if not state["optimizers"]["state"]:
                raise ValueError("its optimizers have seen no weights")
            set_state(self.modules, self.optimizers, state)
            for name, x in self.ema.items():
                if state["ema"][name].shape != x.shape:
                    raise ValueError(f"its {name} has another shape")
                local(x).copy_(local(shared_like(state["ema"][name], x)))
        except WRONG as error:
            raise UserError(
                f"{path} does not fit this run ({misfit(error)}): --fresh starts over"
            ) from None
