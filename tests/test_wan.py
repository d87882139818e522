"""wan.py against diffusers' own model, and the stages that start from what is trained already.

The transformer is small and random, and lies on disk as Wan's does: in a pipeline's repository, in
two shards with their index. Our forward, without a plan, has to be diffusers'; positions, windows
and what is trained are compared with formulas, and training with itself: interrupted, shared among
processes, from other starts.
"""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import memory_of, randn
from released import diffusers, filled, umt5_model, write_shards, write_t5_tokenizer, write_wan
from safetensors.torch import load_file, save_file
from test_parallel import assert_same, train_as
from test_run import MICRO, call, micro, modules_of, one_line, random_run
from test_train import few, metrics, source_for, stop_at, weights

import flow
import stages
import train
from benchmarks import finetune, wan_step
from chain import check_chain, point_to
from config import BLOCK, preset, wan_tiny
from encode import clips_in_memory
from optim import build_optimizers
from plumbing.device import computing, recomputed
from plumbing.files import UserError
from plumbing.seeds import Rows, text_seed
from plumbing.weights import tensor_files
from run import Run, export
from sample import guided
from settings import Config, override
from stages import learner
from start import begin
from text import UMT5, describe_text
from toy.text import HashText
from wan import WanConfig, WanDiT, WanDiTConfig, angles, describe_transformer

SIZES = [x for x in MICRO if x.split(".")[0] not in ("latent", "semantic")]
for dit in ("latent", "semantic"):
    SIZES += [f"{dit}.{x}" for x in ("wan.heads=2", "wan.depth=2", "rank=4")]
for stage in ("latent", "semantic", "base"):
    SIZES += [f"stages.{stage}.{x}" for x in ("batch=4", "optimizer=adamw", "lr=1e-4")]
peft = pytest.importorskip("peft")


def micro_wan(*settings: str, **parts) -> Config:
    """Return the preset wan_tiny, made smaller, with a test's own settings on top."""
    config = override(wan_tiny(), [*SIZES, *settings])
    return override(config, **parts)


@pytest.fixture(autouse=True)
def short(monkeypatch, no_curves):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "preview", lambda *_: None)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A released repository, and diffusers' model of its transformer."""
    folder = tmp_path_factory.mktemp("wan")
    return folder, write_wan(folder)["transformer"]


def config_of(folder: Path, **changes) -> WanDiTConfig:
    """Return a painter on that transformer; its plan has 2 x 2 tokens for 3 x 4 of the latents."""
    fields = {"channels": 4, "rate": 4.0, "text_dim": 32, "rows": 3, "columns": 4, "train": "all"}
    fields |= {"context_channels": 8, "context_rate": 0.8, "rank": 4}
    return WanDiTConfig(**{**fields, **changes}, wan=describe_transformer(str(folder)))


def inputs(frames: int = 3) -> dict[str, torch.Tensor]:
    return {
        "z": randn(2, 4, frames, 6, 8),
        "t": torch.tensor([0.3, 0.9]),
        "text": randn(2, 7, 32, seed=1),
    }


# --- the network against diffusers' -------------------------------------------------------------


def test_without_a_plan_it_is_diffusers_own_model(repository):
    """Value and gradients of all weights."""
    folder, library = repository
    given = inputs()
    expected = library(given["z"], 1000 * given["t"], given["text"], return_dict=False)[0]
    library.zero_grad()
    expected.square().mean().backward()
    for changes in ({}, {"context_channels": 0}):
        painter = WanDiT(config_of(folder, **changes))
        found = painter(**given)
        assert (found - expected).abs().max() < 1e-5
        found.square().mean().backward()
        gradients = {n.removeprefix("wan."): p.grad for n, p in painter.named_parameters()}
        for name, parameter in library.named_parameters():
            assert (gradients[name] - parameter.grad).abs().max() < 1e-5, name


def test_recomputed_blocks_give_the_same_gradient(repository):
    painter = WanDiT(config_of(repository[0]))
    given = {**inputs(), "context": randn(2, 8, 2, 2, 2)}
    found = []
    for painter.run_block in (torch.nn.Module.__call__, recomputed):
        painter.zero_grad()
        painter(**given).square().mean().backward()
        found.append([p.grad for p in painter.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_time_and_text_stay_in_float32(repository):
    """Of what they become, bfloat16 would lose t: there it moves in steps of 4 thousandths."""
    painter, seen = WanDiT(config_of(repository[0])), []
    painter.wan.condition_embedder.register_forward_hook(lambda *x: seen.append(x[2]))
    for dtype in ("float32", "bfloat16"):
        with computing(torch.device("cpu"), dtype):
            painter(**inputs())
    for exact, found in zip(*seen, strict=True):
        assert exact is found is None or (found.dtype == torch.float32 and found.equal(exact))


def test_at_whole_places_the_angles_are_those_of_diffusers():
    rope = diffusers.models.transformers.transformer_wan.WanRotaryPosEmbed(128, (1, 2, 2), 64)
    cos, sin = rope(torch.empty(1, 16, 5, 12, 14))  # (1, N, 1, d), each angle twice
    axes = (torch.arange(n, dtype=torch.float64) for n in (5, 6, 7))
    found = angles(torch.cartesian_prod(*axes), 128)
    for mine, its in ((found.cos(), cos), (found.sin(), sin)):
        assert (mine - its[0, :, 0, ::2]).abs().max() < 1e-6
        assert its[..., ::2].equal(its[..., 1::2])


def test_z_sem_lies_between_the_latents_where_its_middle_is():
    """By hand, for the real sizes: pair k at 5 k + 1.625; 17 x 30 tokens over 30 x 52."""
    config = preset("wan").latent
    head, small = config.wan.head_width, replace(config.wan, depth=1, ffn=8)
    with torch.device("meta"):
        painter = WanDiT(replace(config, wan=small, train="all"))
    painter.null_text = torch.zeros(1, 4096)  # the rest has no values
    latents, plan = config.layout((21, 60, 104), (4, 17, 30))
    cos, sin = painter.place([latents, plan], 0.0)
    assert cos.shape == (32_760 + 2_040, 64)
    for k, i, j in ((0, 0, 0), (3, 16, 29), (1, 8, 3)):
        place = (5 * k + 1.625, (i + 0.5) * 30 / 17 - 0.5, (j + 0.5) * 52 / 30 - 0.5)
        widths = (44, 42, 42)
        turns = [
            p * 1e4 ** (-2 * m / n)
            for p, n in zip(place, widths, strict=True)
            for m in range(n // 2)
        ]
        row = 32_760 + (k * 17 + i) * 30 + j
        assert (
            max(abs(math.cos(x) - c) for x, c in zip(turns, cos[row].tolist(), strict=True)) < 1e-6
        )
        assert (
            max(abs(math.sin(x) - s) for x, s in zip(turns, sin[row].tolist(), strict=True)) < 1e-6
        )
    assert head == 128
    later, _ = painter.place([latents], 2.5)  # seconds of video before: ten latent frames
    assert later[:1560].equal(cos[10 * 1560 : 11 * 1560])


@pytest.mark.parametrize("preset_name, middles", [("wan", [1.625, 6.625]), ("wan_tiny", None)])
def test_a_pair_lies_where_the_frames_that_it_shows_are(preset_name, middles):
    """From the frames themselves: a latent frame lies in the middle of the frames it codes."""
    config = preset(preset_name)
    data, vae, dit = config.data, config.vae, config.semantic
    groups, rest = [list(range(vae.first))], list(range(vae.first, data.frames))
    groups += [rest[k : k + vae.time_patch] for k in range(0, len(rest), vae.time_patch)]
    centres = [sum(group) / len(group) for group in groups if group][1:]  # frames
    seconds = data.semantic_times
    for k in range(len(seconds) // 2):
        middle = (seconds[2 * k] + seconds[2 * k + 1]) / 2
        found = (k + 0.25) / dit.rate * dit.latent_rate + dit.latent_zero
        assert found == pytest.approx(1 + (middle * data.fps - centres[0]) / vae.time_patch)
        assert middles is None or k > 1 or found == pytest.approx(middles[k])


def test_windows_are_dense_attention_with_their_rule_as_a_mask(repository, monkeypatch):
    """Both streams, even and odd layers; what latents have beyond the plan's end is in the last."""
    window, T, S = 2.5, 21, 4
    painter = WanDiT(config_of(repository[0], window=window))
    given = {**inputs(T), "context": randn(2, 8, S, 2, 2)}
    found = painter(**given)

    def masked(q, k, v, shifted):
        seconds = [
            torch.arange(T).repeat_interleave(12) / 4,
            torch.arange(S).repeat_interleave(4) / 0.8,
        ]
        last = S / 0.8 - 1e-6
        which = (torch.cat(seconds).clamp(max=last) + shifted * window / 2) // window
        mask = which[:, None] == which
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    both = [partial(masked, shifted=shifted) for shifted in (0, 1)]
    with monkeypatch.context() as patch:
        patch.setattr("wan.attention_over_time", lambda *_: both)
        assert (found - painter(**given)).abs().max() < 1e-5
    full = WanDiT(config_of(repository[0]))
    full.load_state_dict(painter.state_dict())
    assert (found - full(**given)).abs().max() > 1e-3


@torch.no_grad()
def test_tokens_that_are_new_have_the_norm_of_wans(repository):
    folder, library = repository
    patches = library.patch_embedding(randn(64, 4, 1, 2, 2)).norm(dim=1).mean()
    painter = WanDiT(config_of(folder))
    planner = WanDiT(config_of(folder, channels=8, patch=1, of_plans=True, context_channels=0))
    z_sem = randn(500, 8)
    plain = planner.wan.patch_embedding(z_sem.view(1, 8, 1, 20, 25))
    for tokens in (painter.context_in(z_sem).norm(dim=1), plain.norm(dim=1)):
        assert tokens.mean() == pytest.approx(patches, rel=0.25)
    assert painter.null_context.norm() == pytest.approx(patches, rel=0.25)
    assert not planner(randn(2, 8, 2, 2, 2), torch.rand(2), randn(2, 7, 32)).any()


def test_what_is_trained(repository):
    """The choice, by names; what Wan does not have is always trained."""
    with torch.device("meta"):
        for change in ("lora", "attention", "all"):
            painter = WanDiT(config_of(repository[0], train=change))
            planner = config_of(repository[0], train=change, of_plans=True, channels=8, patch=1)
            planner = WanDiT(replace(planner, context_channels=0))
            for dit, new in ((painter, 3), (planner, 4)):
                names = {n for n, p in dit.named_parameters() if p.requires_grad}
                wan = {n for n in names if n.startswith("wan.blocks.")}
                if change == "lora":
                    assert wan == {n for n in wan if ".lora_" in n} and len(wan) == 2 * 10 * 2
                if change == "attention":
                    assert wan == {n for n in wan if ".attn1." in n} and len(wan) == 2 * 10
                if change == "all":
                    assert names == {n for n, _ in dit.named_parameters()}
                else:
                    assert len(names - wan) == new


def test_muon_takes_no_factor_of_lora(repository):
    """It would orthogonalise each; what counts is their product."""
    modules = torch.nn.ModuleDict({"dit": WanDiT(config_of(repository[0], train="lora"))})
    (adamw,) = build_optimizers(modules, replace(wan_tiny().stages.latent, optimizer="muon"))
    assert type(adamw) is torch.optim.AdamW
    held = {p for group in adamw.param_groups for p in group["params"]}
    assert held == {p for p in modules.parameters() if p.requires_grad}


# --- loading ------------------------------------------------------------------------------------


def copy_with(folder: Path, target: Path, change) -> Path:
    """Copy the transformer alone, in one file, with its tensors changed."""
    shutil.copytree(folder / "transformer", target)
    files = tensor_files(str(folder), stem="transformer/diffusion_pytorch_model")
    tensors = {name: load_file(file)[name] for name, file in files.items()}
    change(tensors)
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, target / "diffusion_pytorch_model.safetensors")
    return target


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x.pop("proj_out.bias"), "lacks proj_out.bias"),
        (lambda x: x.update({"proj_out.weight_scale": torch.ones(1)}), "proj_out.weight_scale"),
        (lambda x: x.update({"proj_out.bias": torch.ones(3)}), r"proj_out.bias is \(3,\)"),
    ],
)
@pytest.mark.parametrize("of_plans", [False, True])
def test_every_tensor_is_used(repository, tmp_path, change, words, of_plans):
    """Also those that the planner replaces."""
    folder = copy_with(repository[0], tmp_path / "other", change)
    with pytest.raises(UserError, match=words):
        WanDiT(config_of(folder, of_plans=of_plans))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"_class_name": "HunyuanVideoTransformer3DModel"}, "HunyuanVideo"),
        ({"image_dim": 1280}, "image_dim"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"num_layers": "2"}, "num_layers"),
    ],
)
def test_other_models_are_refused(repository, tmp_path, settings, words):
    shutil.copytree(repository[0] / "transformer", tmp_path / "other")
    file = tmp_path / "other/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match=words):
        describe_transformer(str(tmp_path / "other"))


LOAD = """
from wan import WanDiT, WanDiTConfig, describe_transformer

def load(folder):
    wan = describe_transformer(folder)
    return WanDiT(WanDiTConfig(channels=wan.channels, rate=4.0, text_dim=wan.text_dim, wan=wan))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_memory_while_loading(repository, tmp_path):
    sizes = dict(num_attention_heads=8, attention_head_dim=64, in_channels=4, out_channels=4)
    with torch.device("meta"):
        large = diffusers.WanTransformer3DModel(**sizes, text_dim=32, ffn_dim=2048, num_layers=4)
    tensors = {name: torch.ones(x.shape) for name, x in large.state_dict().items()}
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-{k}.safetensors": {} for k in (1, 2)}
    for k, name in enumerate(names):
        shards[f"diffusion_pytorch_model-{k % 2 + 1}.safetensors"][name] = tensors[name]
    write_shards(tmp_path, shards, "diffusion_pytorch_model")
    (tmp_path / "config.json").write_text(large.to_json_string())
    growth, counted = memory_of(LOAD, repository[0], tmp_path)
    assert counted > 6e7
    assert 0.9 * counted < growth < 1.3 * counted, f"{growth / counted:.2f} times the model"


# --- text ---------------------------------------------------------------------------------------


def test_the_null_text_is_the_encoded_empty_text(tmp_path):
    model = umt5_model()
    model.save_pretrained(tmp_path)
    write_t5_tokenizer(tmp_path)
    encoder = UMT5(replace(describe_text(str(tmp_path)), dtype="float32"))
    expected = model(input_ids=torch.tensor([[1]])).last_hidden_state[0]  # </s> alone
    assert encoder.null().shape == (1, 32)
    torch.testing.assert_close(encoder.null(), expected)
    assert not encoder.encode([""]).any()  # what marks a dropped text


def test_a_text_of_zeros_is_read_as_the_null_text(repository):
    painter, given = WanDiT(config_of(repository[0])), inputs()
    painter.null_text.copy_(randn(1, 32, seed=9))
    told = torch.zeros(2, 7, 32)
    told[:, 0] = painter.null_text[0]
    given["text"][1] = 0
    told[0] = given["text"][0]
    torch.testing.assert_close(painter(**given), painter(**{**given, "text": told}))


def test_a_negative_text_takes_the_place_of_the_null_text():
    """Guidance leads from its velocity to the prompt's."""

    def dit(z, t, text):
        return text.sum((1, 2)).view(-1, 1, 1, 1, 1).expand_as(z)

    z, t, text = randn(2, 4, 3, 6, 8), torch.rand(2), randn(2, 7, 32)
    negative = randn(2, 7, 32, seed=3)
    found = guided(dit, torch.stack([text, negative]), 2.5)(z, t)
    torch.testing.assert_close(found, 2.5 * dit(z, t, text) - 1.5 * dit(z, t, negative))


def test_texts_are_dropped_less_and_less():
    """Linearly, from the first share to the usual one; the rows' other numbers stay the same."""

    class Clips:
        def text(self, indices):
            return torch.ones(len(indices), 2, 3)

    usual = wan_tiny().stages.base
    changed = replace(usual, text_dropout_start=0.9, text_dropout_steps=100)
    indices = list(range(1000))
    for step, share in ((0, 0.9), (50, 0.5), (100, 0.1), (900, 0.1)):
        rows = [Rows(range(1000), 0, "latent", step) for _ in range(2)]
        found, as_usual = (
            stages.draw_text(Clips(), indices, x, c)
            for x, c in zip(rows, (changed, usual), strict=True)
        )
        dropped = 1 - found.any(2).any(1).float().mean()
        assert dropped == pytest.approx(share, abs=0.05)
        assert rows[0].normal(2).equal(rows[1].normal(2))
        assert step < 100 or found.equal(as_usual)


# --- training -----------------------------------------------------------------------------------

MODES = ("lora", "attention", "all")
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A run whose VAE and encoder are random, and whose base was written as a released one."""
    path = tmp_path_factory.mktemp("pretrained")
    run = Run.create(path / "run", micro_wan())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for stage in ("vae", "encoder", "base"):
            modules = modules_of(run, stage)
            filled(modules)
            run.save(stage, modules.state_dict(), {})
    export(run.path, path / "released")
    return path


def tuned(pretrained: Path, path: Path, mode: str, *settings: str) -> Run:
    """Return a new run that starts from the pre-trained transformer, with VAE and encoder."""
    wan = describe_transformer(str(pretrained / "released"))
    config = micro_wan(f"latent.train={mode}", f"semantic.train={mode}", *settings)
    parts = {x: replace(getattr(config, x), wan=wan) for x in ("latent", "semantic")}
    run = Run.create(path, override(config, **parts))
    for stage in ("vae", "encoder"):
        shutil.copy(pretrained / "run" / f"{stage}.safetensors", path)
    run.device = torch.device("cpu")
    return run


def test_a_base_is_written_as_a_released_transformer(pretrained):
    """diffusers itself loads it, and it is the base."""
    library = diffusers.WanTransformer3DModel.from_pretrained(pretrained / "released/transformer")
    base = Run.open(pretrained / "run").base
    z, t, text = randn(2, 8, 2, 4, 4), torch.rand(2), randn(2, 16, 64)
    with torch.no_grad():
        expected = library(z, 1000 * t, text, return_dict=False)[0]
        assert (base(z, t, text) - expected).abs().max() < 1e-5


@modes
def test_a_stage_starts_from_the_weights_and_keeps_what_it_trained(
    pretrained, tmp_path, mode, monkeypatch
):
    monkeypatch.setattr(HashText, "null", lambda text: torch.ones(1, text.config.dim))
    run = tuned(pretrained, tmp_path / "run", mode)
    train.train(run, ["latent", "semantic", "base"], few(run), seed=0)
    released = load_file(pretrained / "released/transformer/diffusion_pytorch_model.safetensors")
    for stage in ("latent", "semantic", "base"):
        config = getattr(run.config, stage)
        start, stored = WanDiT(config), weights(run, stage)
        learned = {f"dit.{n}" for n, p in start.named_parameters() if p.requires_grad}
        assert {n for n in stored if n.startswith("dit.")} == learned | {"dit.null_text"}
        state = run.load_state(stage)
        for kind in ("modules", "ema"):
            assert {n for n in state[kind] if n.startswith("dit.")} == learned | {"dit.null_text"}
        part = {"latent": "painter", "semantic": "planner"}.get(stage, stage)
        for name, x in getattr(run, part).state_dict().items():
            if f"dit.{name}" in learned:
                assert x.equal(stored[f"dit.{name}"])
                assert "lora_A" in name or not x.equal(start.state_dict()[name])  # it has learned
            elif name == "null_text":
                assert x.equal(stored["dit.null_text"]) and x.equal(torch.ones(1, 64))
            else:
                its = name.removeprefix("wan.").replace(".base_layer", "")
                assert x.equal(released[its])
    lines = metrics(run, "latent")
    assert [x["step"] for x in lines if "influence" in x] == [6]


def test_the_influence_is_the_loss_with_the_next_clips_plan(pretrained, tmp_path):
    """By hand, on the noise and the clips of the step."""
    run = tuned(pretrained, tmp_path / "run", "all")
    source, team = source_for(run, "latent"), train.Team()
    progress = begin(run, "latent", source, {}, 0, None, team)
    progress.step = 5
    found = train.influence(run, progress, source, team.rows(4, 2), team)
    modules, rows = progress.modules, Rows(range(5), 0, "latent", 4)
    x = modules.draw(source, rows)
    x["text"] = source.text(Rows(range(5), 0, "latent", 4).indices(progress.clips))  # none dropped
    losses = []
    for plan in (slice(0, 4), slice(1, 5)):
        z_sem, _ = modules["compressor"](x["features"][plan], x["plan_noise"][plan])
        z_sem = modules["compressor"].perturb(z_sem, x["level"][:4], x["perturbation"][:4])
        clean, noise, t = (x[name][:4] for name in ("latents", "noise", "t"))
        velocity = modules["dit"](flow.path(clean, noise, t), t, x["text"][:4], z_sem)
        losses.append((velocity - (noise - clean)).square().mean().item())
    assert found == pytest.approx(losses[1] - losses[0], abs=2e-6 * losses[0])
    assert abs(found) > 1e-4 * losses[0]


@modes
def test_an_interrupted_stage_ends_as_one_that_never_stopped(
    pretrained, tmp_path, mode, monkeypatch
):
    calm = tuned(pretrained, tmp_path / "calm", mode)
    train.train(calm, ["latent"], few(calm), seed=0)
    run = tuned(pretrained, tmp_path / "run", mode)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(SystemExit):
            train.train(run, ["latent"], few(run), seed=0)
    run = Run.open(run.path)
    train.train(run, ["latent"], few(run), seed=0)
    for name, x in weights(calm, "latent").items():
        assert x.equal(weights(run, "latent")[name]), name
    assert [x["loss"] for x in metrics(run, "latent")] == [
        x["loss"] for x in metrics(calm, "latent")
    ]


@pytest.mark.parametrize("mode, shard", [("lora", True), ("attention", False)])
def test_two_processes_train_as_one_does(pretrained, tmp_path, mode, shard):
    one, two = (tuned(pretrained, tmp_path / x, mode) for x in ("one", "two"))
    one = train_as(1, one.path, "latent")
    two = train_as(2, two.path, "latent", shard=shard)
    assert_same(two, one, "latent", 1e-4)


def test_a_run_stops_with_one_process_and_goes_on_in_shares(pretrained, tmp_path):
    whole, parts = (tuned(pretrained, tmp_path / x, "lora") for x in ("whole", "parts"))
    train_as(1, whole.path, "base")
    train_as(2, parts.path, "base", shard=True, stop=3)
    assert parts.load_state("base")["step"] == 3
    assert_same(train_as(1, parts.path, "base"), whole, "base", 1e-5)


def test_recomputation_attends_with_the_same_kernels(pretrained, tmp_path):
    """On a CPU they are chosen by the context, for more than 256 tokens of text too."""
    settings = ["text.words=300", "stages.latent.checkpoint=true", "stages.latent.steps=1"]
    run = tuned(pretrained, tmp_path / "run", "lora", *settings)
    train.train(run, ["latent"], few(run), seed=0)
    assert run.finished("latent")


@pytest.mark.parametrize("trained", MODES)
def test_memory_by_arithmetic_is_what_a_block_keeps(trained):
    """Bytes a token of what autograd saves in a block of Wan's proportions, bfloat16 products."""
    width, tokens = 96, 2048
    sizes = WanConfig(channels=4, text_dim=8, heads=3, head_width=32, depth=1, ffn=560, waves=32)
    config = WanDiTConfig(channels=4, rate=4.0, text_dim=8, train=trained, rank=2, wan=sizes)
    (block,), kept = WanDiT(config).wan.blocks, {}
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # alive, so that no two share an address
        return x

    x = torch.randn(1, tokens, width).bfloat16().requires_grad_()
    turn = torch.randn(tokens, 16)
    attend = torch.nn.functional.scaled_dot_product_attention
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        block(x, torch.randn(1, 4, width), torch.randn(1, 6, width), (turn, turn, attend))
    found = sum(x.untyped_storage().nbytes() for x in kept.values()) / tokens / width
    assert found == pytest.approx(BLOCK[trained], rel=0.05)


def test_other_weights_than_a_run_was_made_with_are_refused(pretrained, tmp_path):
    released = tmp_path / "released"
    shutil.copytree(pretrained / "released", released)
    run = tuned(pretrained, tmp_path / "run", "lora", "stages.latent.steps=1")
    train.train(run, ["latent"], few(run), seed=0)
    point_to(run, {"dit": describe_transformer(str(released))})  # they have moved
    run.let_go()
    assert run.painter.config.wan.weights == str(released)
    file = released / "transformer/diffusion_pytorch_model.safetensors"
    save_file({n: x + 1 for n, x in load_file(file).items()}, file)
    run.let_go()
    with pytest.raises(UserError, match="other weights"):
        _ = run.painter
    with pytest.raises(UserError, match="another dit"):
        point_to(run, {"dit": describe_transformer(str(released))})
    with pytest.raises(UserError, match="other weights"):
        train.train(run, ["base"], few(run), seed=0)


def test_a_network_trained_as_a_whole_needs_no_other_weights(pretrained, tmp_path):
    run = tuned(pretrained, tmp_path / "run", "all", "stages.latent.steps=1")
    train.train(run, ["latent"], few(run), seed=0)
    gone = WanConfig(**{**vars(run.config.latent.wan), "weights": str(tmp_path / "gone")})
    run.config = replace(run.config, latent=replace(run.config.latent, wan=gone))
    run.let_go()
    assert not any(x.is_meta for x in (*run.painter.parameters(), *run.painter.buffers()))
    found = run.painter(randn(1, 8, 2, 4, 4), torch.rand(1), randn(1, 16, 64), randn(1, 4, 1, 2, 2))
    assert found.isfinite().all()


def test_what_the_command_line_refuses(pretrained, tmp_path, capsys):
    wan, out = ["--dit", pretrained / "released"], ["--out", tmp_path / "run"]
    assert call(train.main, "--stage", "latent", "--tiny", *wan, *out) == 2
    one_line(capsys, "--dit", "Wan's")
    assert call(train.main, "--stage", "latent", "--preset", "wan", *wan, *out) == 2
    one_line(capsys, "text_dim")
    lora = ["--set", "latent.train=lora"]
    assert call(train.main, "--stage", "latent", "--preset", "wan_tiny", *lora, *out) == 2
    one_line(capsys, "needs weights", "--dit")
    assert (
        call(
            train.main,
            "--stage",
            "latent",
            "--preset",
            "wan_tiny",
            *wan,
            *out,
            "--set",
            "latent.train=most",
        )
        == 2
    )
    one_line(capsys, "train=most", "lora, attention, all")
    assert not (tmp_path / "run").exists()


# --- from the run's own base --------------------------------------------------------------------


@pytest.mark.parametrize("alike", [False, True])  # z_sem's channels, and those of a latent token
def test_planner_and_painter_start_from_the_base(tmp_path, alike):
    """All tensors of one name and shape are the base's; the others are as from scratch.

    The planner's projections in and out are others': z_sem's, even where the shapes are the same.
    """
    config = micro()
    token = config.latent.channels * config.latent.patch**2
    channels = ("compressor.channels", "latent.context_channels", "semantic.channels")
    settings = [f"{name}={token}" for name in channels] if alike else []
    done = ("vae", "encoder", "base", "latent")
    run = random_run(tmp_path / "run", "start=base", *settings, stages=done)
    base = run.base.state_dict()
    assert (run.config.semantic.channels == base["latents_in.weight"].shape[1]) == alike
    for stage in ("latent", "semantic"):
        source = clips_in_memory(run, few(run)).first(8)
        dit = begin(run, stage, source, {}, 0, None, train.Team()).modules["dit"]
        torch.manual_seed(text_seed(f"0 {stage}") % 2**63)  # as the stage does
        fresh = learner(run.config, stage, (), run.compressor)["dit"].state_dict()
        new = []
        for name, x in dit.state_dict().items():
            ends = stage == "semantic" and name.startswith(("latents_in.", "latents_out."))
            if name in base and base[name].shape == x.shape and not ends:
                assert x.equal(base[name]), name
            else:
                new.append(name)
                assert x.equal(fresh[name]), name
        assert any("blocks" in name for name in base) and not any("blocks" in n for n in new)
        assert new  # z_sem's own projections


@pytest.mark.parametrize(
    "stages, said_first",
    [
        (["latent", "semantic"], "latent needs base first: training base"),
        (["semantic"], "semantic needs base and latent first: training base and latent"),
    ],
)
def test_the_chain_knows_the_base(tmp_path, stages, said_first):
    """The base is trained first; another one puts painter and planner out of date."""
    run = random_run(tmp_path / "run", "start=base", stages=("vae", "encoder"))
    said = []
    team = train.Team()
    team.say = said.append
    train.train(run, stages, few(run), 0, team)
    assert said_first in said
    for stage in ("latent", "semantic"):
        assert run.note(stage)["made_of"]["base"] == run.note("base")["digest"]
    changed = {name: x + 1 for name, x in weights(run, "base").items()}
    run.save("base", changed, run.note("base"))
    for stage in ("latent", "semantic"):
        with pytest.raises(UserError, match=f"{stage} was trained on another base"):
            check_chain(run, stage)
    run.forget("base")
    assert not run.has("latent") and not run.has("semantic") and run.has("encoder")


# --- the benchmarks, at toy size ------------------------------------------------------------------


def test_fine_tuning_against_the_model_trained_on(tmp_path):
    """All arms are scored, and a second call trains nothing."""
    first = finetune.one_seed(tmp_path, micro_wan(), 0, [4, 2, 2], 2)
    assert set(first["scores"]) == {"the start", "SemanticGen", "Base-CT"}
    assert all("exact" in row for ways in first["scores"].values() for row in ways.values())
    assert first["steps"][:3] == [4, 2, 2] and first["steps"][3] >= 1
    trained = [f"tuned/{stage}" for stage in ("latent", "semantic", "base")] + ["start/base"]
    trained = [tmp_path / f"{name}.safetensors" for name in trained]
    before = [x.stat().st_mtime_ns for x in trained]
    assert finetune.one_seed(tmp_path, micro_wan(), 0, [4, 2, 2], 2) == first
    assert before == [x.stat().st_mtime_ns for x in trained]
    with pytest.raises(UserError, match="other steps, prompts or fields: give another --out"):
        finetune.one_seed(tmp_path, micro_wan(), 0, [4, 2, 2], 4)


@pytest.mark.parametrize("what", ["lora", "attention", "all"])
def test_a_step_of_the_painter_on_wan(what):
    dit, shapes = wan_step.sizes(preset("wan"), toy=True)
    dit = replace(dit, train=what)
    row = wan_step.measure(dit, shapes, preset("wan").stages.latent, torch.device("cpu"), 1)
    assert row["seconds"] > 0 and row["tflop"] > 0 and row["share"] > 0


def test_the_preset_of_another_folder_is_told(tmp_path, capsys):
    """What the folder's networks started from is not taken for a flag that nobody gave."""
    weights = [
        f"{name}.wan.{field}=x"
        for name in ("latent", "semantic")
        for field in ("weights", "digest")
    ]
    Run.create(tmp_path, override(wan_tiny(), weights))
    assert call(train.main, "--stage", "latent", "--tiny", "--out", tmp_path) == 2
    one_line(capsys, f"{tmp_path} was made with other settings")
