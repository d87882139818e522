"""Two processes against one, for every engine, from the same weights and seeds.

Processes are real (gloo on the CPU) and started as torchrun starts them. What they must agree on is
what a user sees: the losses of every step, the gradient's norm and the weights that are written.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_run import micro, random_run
from test_train import few, metrics, source_for, weights
from torch._dynamo.testing import CompileCounterWithBackend

import train
from plumbing.device import computing
from plumbing.files import UserError
from plumbing.metrics import Metrics
from plumbing.processes import Team
from plumbing.seeds import Rows
from run import Run
from stages import NEEDS, learner, set_up

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "torch._dynamo", "diffusers.models.transformers", "peft"])
BATCH = [f"stages.{stage}.batch=4" for stage in ("vae", "encoder", "latent", "semantic", "base")]


def member(environment, path, stage, shard, stop):
    """Train a stage in a process of a team; stop: the step at which rank 0 gets a SIGTERM."""
    os.environ.update(environment)
    train.LOG_EVERY, train.preview = 1, lambda *_: None
    train.work = lambda *_: dict.fromkeys(("clips_s", "tokens_s", "mfu"), 1.0)  # takes a second
    Metrics.plot = lambda _: None
    if stop and environment.get("RANK", "0") == "0":
        one_step = train.one_step

        def stopped(run, progress, *others):
            if progress.step + 1 == stop:
                signal.raise_signal(signal.SIGTERM)
            return one_step(run, progress, *others)

        train.one_step = stopped
    team = Team(shard)
    run = Run.open(path)
    run.device = torch.device("cpu")
    train.train(run, [stage], few(run), 0, team)
    team.leave()


def train_as(size: int, path: Path, stage: str, shard=False, stop=0) -> Run:
    """Train a stage of a run that is there as `size` processes; return the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = []
    for rank in range(size):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        environment |= {"WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        arguments = (environment if size > 1 else {}, path, stage, shard, stop)
        team.append(CONTEXT.Process(target=member, args=arguments, daemon=True))
        team[-1].start()
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [130 if stop else 0] * size
    return Run.open(path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Run:
    """A run with random weights of all stages, which the stage under test is trained on."""
    return random_run(tmp_path_factory.mktemp("begun") / "run", *BATCH)


def copy_of(begun: Run, path: Path, stage: str, *settings: str) -> Path:
    """Return a new run folder with the weights that a stage needs."""
    Run.create(path, micro(*BATCH, *settings))
    for need in NEEDS[stage]:
        shutil.copy(begun.weights_file(need), path)
    return path


@lru_cache
def alone(begun: Run, stage: str, *settings: str) -> Run:
    """Return a run whose stage was trained by one process, once for all tests."""
    folder = Path(tempfile.mkdtemp(dir=begun.path.parent))
    return train_as(1, copy_of(begun, folder / "one", stage, *settings), stage)


def assert_same(one: Run, other: Run, stage: str, tolerance: float):
    """Compare what two runs logged at every step, and the weights they wrote."""
    for mine, yours in zip(metrics(one, stage), metrics(other, stage), strict=True):
        assert mine.keys() == yours.keys()
        for name in mine:
            if name not in ("stage", "psnr"):  # the latter is no mean over samples
                within = pytest.approx(yours[name], rel=tolerance, abs=tolerance)
                assert mine[name] == within, (mine, yours, name)
    found, expected = weights(one, stage), weights(other, stage)
    for name, x in expected.items():
        difference = (found[name] - x).abs().max().item()
        assert difference < 20 * tolerance, f"{name}: {difference:.1e}"


# --- who takes what -----------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_rows_of_all_processes_are_the_batch(size, accumulate, piece):
    taken = []
    for rank in range(size):
        team = Team()
        team.rank, team.size = rank, size
        rows = team.rows(size * accumulate * piece, accumulate)
        assert len(rows) == accumulate
        taken += [i for row in rows for i in row]
    assert taken == list(range(size * accumulate * piece))


@pytest.mark.parametrize("size, accumulate, batch", [(2, 1, 3), (1, 2, 5), (4, 2, 4)])
def test_an_uneven_batch_is_refused(size, accumulate, batch):
    team = Team()
    team.size = size
    with pytest.raises(UserError, match=f"batch {batch} cannot be shared evenly"):
        team.rows(batch, accumulate)


def test_the_mean_over_processes_leaves_out_what_is_no_number():
    found = Team().mean({"a": torch.tensor([1.0, 3.0, torch.nan]), "b": torch.tensor(torch.inf)})
    assert found == {"a": 2.0, "b": torch.inf}


# --- one process against two --------------------------------------------------------------------


@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("optimizer, tolerance", [("adamw", 1e-5), ("muon", 1e-3)])
def test_two_processes_train_as_one_does(begun, tmp_path, shard, optimizer, tolerance):
    """Twenty steps of the painter and its compressor."""
    settings = ["stages.latent.steps=20", f"stages.latent.optimizer={optimizer}"]
    one = alone(begun, "latent", *settings)
    two = copy_of(begun, tmp_path / "two", "latent", *settings)
    two = train_as(2, two, "latent", shard=shard)
    assert len(metrics(one, "latent")) == 20
    assert_same(two, one, "latent", tolerance)


@pytest.mark.parametrize("stage", ["vae", "encoder", "semantic"])
def test_the_other_stages_in_two_processes(begun, tmp_path, stage):
    """Captions differ in length: a row's loss must not depend on its company."""
    settings = [f"stages.{stage}.optimizer=adamw", f"stages.{stage}.lr=1e-4"]
    one = alone(begun, stage, *settings)
    two = train_as(2, copy_of(begun, tmp_path / "two", stage, *settings), stage)
    assert_same(two, one, stage, 1e-5)


@pytest.mark.parametrize("before, after", [("DDP", "one"), ("FSDP2", "one"), ("one", "FSDP2")])
def test_a_run_stops_with_some_processes_and_goes_on_with_others(begun, tmp_path, before, after):
    settings = ["stages.base.optimizer=adamw", "stages.base.lr=1e-4"]
    whole = alone(begun, "base", *settings)
    path = copy_of(begun, tmp_path / "parts", "base", *settings)
    kinds = {"one": (1, False), "DDP": (2, False), "FSDP2": (2, True)}
    for kind, stop in ((before, 3), (after, 0)):
        size, shard = kinds[kind]
        parts = train_as(size, path, "base", shard=shard, stop=stop)
        if stop:
            assert parts.load_state("base")["step"] == 3 and not parts.has("base")
    assert_same(parts, whole, "base", 1e-5)


# --- in one process: pieces, recomputation, compilation -----------------------------------------


def gradients(
    run: Run, stage: str, pieces: int, dtype: str = "float32", **changes
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one batch, computed in pieces."""
    source = source_for(run, stage)
    torch.manual_seed(0)
    modules = learner(run.config, stage, few(run).captions(range(8)), run.compressor).train()
    for parameter in modules.parameters():
        if not parameter.any():  # a block begins as the identity, which would hide much
            torch.nn.init.normal_(parameter, std=0.1)
    config = getattr(run.config.stages, stage)
    set_up(modules, type(config)(**{**vars(config), **changes}))
    total = 0.0
    for rows in Team().rows(config.batch, pieces):
        with computing(run.device, dtype):
            loss, _ = modules(**modules.draw(source, Rows(rows, 0, stage, 0)))
        (loss / pieces).backward()
        total += loss.item() / pieces
    return total, {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, accuracy=1e-5):
    (loss, mine), (reference, yours) = found, expected
    assert loss == pytest.approx(reference, rel=accuracy)
    assert mine.keys() == yours.keys()
    for name, x in yours.items():
        assert (mine[name] - x).abs().max() <= accuracy * max(1, x.abs().max()), name


@pytest.mark.parametrize("stage", ["vae", "encoder", "latent", "semantic", "base"])
def test_pieces_of_a_batch_give_its_gradient(begun, stage):
    assert_same_gradients(gradients(begun, stage, 4), gradients(begun, stage, 1))
    assert_same_gradients(gradients(begun, stage, 2), gradients(begun, stage, 1))


def test_recomputed_blocks_give_the_same_gradient(begun, monkeypatch):
    expected = gradients(begun, "latent", 1)
    calls = []
    forward = train.nn.Linear.forward
    monkeypatch.setattr(
        train.nn.Linear, "forward", lambda self, x: calls.append(1) or forward(self, x)
    )
    gradients(begun, "latent", 1)
    usual = len(calls)
    assert_same_gradients(gradients(begun, "latent", 1, checkpoint=True), expected)
    assert len(calls) - usual > usual  # blocks ran twice


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
@pytest.mark.parametrize(("dtype", "accuracy"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_a_compiled_network_gives_the_same_gradient(begun, dtype, accuracy):
    """In bfloat16 too, where the compiler once failed and float32 went well."""
    found = gradients(begun, "base", 1, dtype, compile=True)
    assert_same_gradients(found, gradients(begun, "base", 1, dtype), accuracy)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_recomputed_blocks_are_compiled_in_shares_too(begun, monkeypatch):
    """FSDP's hooks are not compiled: inside of what is recomputed they would be the end of it."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=counter))
    modules = learner(begun.config, "base", (), None).train()
    config = replace(begun.config.stages.base, compile=True, checkpoint=True)
    set_up(modules, config)
    team = Team(shard=True)
    wrapped = team.wrap(modules, begun.device)
    inputs = modules.draw(source_for(begun, "base"), Rows(range(2), 0, "base", 0))
    wrapped(**inputs)[0].backward()
    team.leave()
    assert counter.frame_count == 1  # of all blocks


def test_accumulation_is_a_field_of_a_stage(begun, tmp_path):
    settings = ["stages.base.optimizer=adamw", "stages.base.lr=1e-4"]
    one = alone(begun, "base", *settings)
    settings.append("stages.base.accumulate=2")
    two = train_as(2, copy_of(begun, tmp_path / "two", "base", *settings), "base")
    assert_same(two, one, "base", 1e-5)


def test_states_hold_whole_tensors_and_nothing_that_runs(begun, tmp_path):
    """A sharded run's state is that of a run in one piece: plain tensors by parameter names."""
    settings = ["stages.base.optimizer=adamw", "stages.base.lr=1e-4"]
    runs = []
    for name, size in (("one", 1), ("two", 2)):
        path = copy_of(begun, tmp_path / name, "base", *settings)
        runs.append(train_as(size, path, "base", shard=size > 1, stop=2))
    one, two = (run.load_state("base") for run in runs)
    for kind in ("modules", "ema"):
        assert {n: x.shape for n, x in two[kind].items()} == {
            n: x.shape for n, x in one[kind].items()
        }
    moments = {n: x["exp_avg"].shape for n, x in one["optimizers"]["state"].items()}
    assert {n: x["exp_avg"].shape for n, x in two["optimizers"]["state"].items()} == moments
    assert not load_file(begun.weights_file("base")).keys() - one["modules"].keys()
