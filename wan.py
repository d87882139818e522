"""Planner, painter and base on Wan's released text-to-video transformer, which they start from.

SemanticGen Sec. 3.1 to 3.3: both stages are fine-tuned from a pre-trained text-to-video model. The
paper's is not public; Wan2.1's is. diffusers (extra `wan`) has its blocks, which are not those of
App. A: they have no spatial attention, and shifts, scales and gates from t. Ours are the streams,
their positions, the windows, and the choice of what is trained. `WanDiT` is called as model.py's
DiT is.

Painter: z_sem joins the latents in context (Sec. 3.2) through a projection of its own. Planner:
z_sem takes the place of the latents, so the projections in and out are new. Base: Wan as it is.

Letters: B batch; C T h w channels, frames, height, width of what is denoised; K S hs ws those of
the context; N tokens; D width; A heads; d width of a head; L text tokens.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor, nn

from model import DiT, DiTConfig, Grid, attention, attention_over_time, to_tokens
from plumbing.files import UserError, require, write_file
from plumbing.weights import digest, fill, loading, locate, read_settings, size, tensor_files

TRAINED = ("lora", "attention", "all")
LORA = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")  # all but norms, ends
ENDS = ("wan.patch_embedding.", "wan.proj_out.")  # the projections in and out
SIZES = {  # fields of WanConfig -> diffusers' names of them, and its defaults
    "channels": ("in_channels", 16),
    "text_dim": ("text_dim", 4096),
    "heads": ("num_attention_heads", 40),
    "head_width": ("attention_head_dim", 128),
    "depth": ("num_layers", 40),
    "ffn": ("ffn_dim", 13824),
    "waves": ("freq_dim", 256),
}
USUAL = {  # settings that Wan's text-to-video models share, and that are read nowhere else
    **{"patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"},
    **{"eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None},
}


@dataclass(frozen=True)
class WanConfig:
    """Which released transformer, and its sizes; `describe_transformer` reads them off it."""

    weights: str = ""  # folder or hub id, with it inside or in its folder transformer; "" = none
    digest: str = ""  # stands for the content of its weights
    channels: int = 16  # of the latents that it denoises
    text_dim: int = 4096
    heads: int = 12  # A
    head_width: int = 128  # d; D = A d
    depth: int = 30
    ffn: int = 8960  # hidden width
    waves: int = 256  # sines and cosines of t

    def __post_init__(self):
        if self.head_width % 2:
            raise ValueError(f"head_width {self.head_width}: RoPE turns pairs, it must be even")

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_width


@dataclass(frozen=True)
class WanDiTConfig:
    """One network on Wan's transformer. Fields of DiTConfig mean here what they mean there."""

    channels: int  # C
    rate: float
    text_dim: int
    context_channels: int = 0
    context_rate: float = 0.0
    patch: int = 2  # Wan's; the planner's is 1
    window: float | None = None
    of_plans: bool = False  # the planner: z_sem is what is denoised, at z_sem's positions
    latent_rate: float = 4.0  # latent frames per second: Wan's axis of time counts them
    latent_zero: float = 0.375  # where second 0 is on that axis
    rows: int = 30  # tokens of a latent frame each way: its axes of space count them
    columns: int = 52
    train: str = "lora"  # or attention: self-attention; or all. What is new is always trained
    rank: int = 32  # of lora
    wan: WanConfig = WanConfig()

    def __post_init__(self):
        if self.train not in TRAINED:
            raise ValueError(f"train={self.train}: choose {', '.join(TRAINED)}")

    def layout(self, latents: Sequence[int], context: Sequence[int] | None) -> list[Grid]:
        """Return the streams' grids as `DiTConfig.layout` does. The plan may be left out."""
        for name in ("text_dim",) if self.of_plans else ("text_dim", "channels"):
            if getattr(self, name) != (its := getattr(self.wan, name)):
                raise ValueError(f"Wan's {name} is {its}, the other parts' {getattr(self, name)}")
        given = self if context is not None else replace(self, context_channels=0)
        return DiTConfig.layout(given, latents, context)

    @property
    def without_plan(self) -> "WanDiTConfig":
        """The base's network."""
        return replace(self, context_channels=0)


# --- the released transformer -------------------------------------------------------------------


def transformer_files(weights: str) -> tuple[str, dict[str, Path]]:
    """Return the name of its settings, in a pipeline's repository or alone; {tensor: file}."""
    folder = "transformer/" if locate(weights, "transformer/config.json") else ""
    return f"{folder}config.json", tensor_files(weights, stem=f"{folder}diffusion_pytorch_model")


def describe_transformer(weights: str) -> WanConfig:
    """Return the configuration of a released transformer, in a folder or under a hub id.

    UserError if it is not one of Wan's for text to video, in safetensors.
    """
    name, tensors = transformer_files(weights)
    settings = read_settings(weights, name)
    kind = settings.get("_class_name")
    if kind != "WanTransformer3DModel":
        raise UserError(f"{weights} holds a {kind!r}, not WanTransformer3DModel")
    odd = [name for name, usual in USUAL.items() if settings.get(name, usual) != usual]
    if odd:
        raise UserError(f"{weights}: {odd[0]} is {settings[odd[0]]!r}: no text-to-video model here")
    sizes = {mine: size(weights, settings, x, default=d) for mine, (x, d) in SIZES.items()}
    files = {locate(weights, name), *tensors.values()}
    return WanConfig(weights, digest(files), **sizes)


def build_transformer(config: WanConfig) -> nn.Module:
    """Return diffusers' model, with its weights if the configuration names some.

    On the meta device it has no values. UserError if any tensor is missing or foreign.
    """
    diffusers = require("diffusers", "wan")
    empty = torch.get_default_device().type == "meta"
    sizes = {its: getattr(config, mine) for mine, (its, _) in SIZES.items()}
    with torch.device("meta") if config.weights else contextlib.nullcontext():
        model = diffusers.WanTransformer3DModel(out_channels=config.channels, **sizes)
    model.rope = nn.Identity()  # positions are ours
    if config.weights and not empty:
        with loading(config.weights, "Wan's transformer"):
            fill(model, config.weights, transformer_files(config.weights)[1], torch.float32)
    return model


# --- positions and attention --------------------------------------------------------------------


def angles(places: Tensor, head_width: int) -> Tensor:
    """Return Wan's RoPE angles (N, d/2) of places (N, 3) on its axes of time, y and x, float64."""
    side = 2 * (head_width // 6)
    widths = (head_width - 2 * side, side, side)
    waves = [
        10_000.0 ** -(torch.arange(0, n, 2, device=places.device) / n).double() for n in widths
    ]
    return torch.cat([places[:, [k]] * wave for k, wave in enumerate(waves)], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring features, as pairs, by their token's angles. x (..., N, d)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def gained(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Normalise x (B, N, D) over all heads, in its own precision whatever the gain's is."""
    with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # CUDA's is in float32
        return nn.functional.rms_norm(x, x.shape[-1:], norm.weight.to(x), norm.eps)


def attend_in_wan(attn, x, text=None, mask=None, rotary: tuple | None = None) -> Tensor:
    """Compute a WanAttention, as diffusers' processors do, x (B, N, D) -> (B, N, D).

    rotary: cos and sin (N, d/2), and who sees whom; None across to the text (B, L, D).
    """
    cos, sin, attend = rotary or (None, None, attention)
    source = x if text is None else text
    q, k, v = attn.to_q(x), attn.to_k(source), attn.to_v(source)
    q, k = gained(q, attn.norm_q), gained(k, attn.norm_k)
    q, k, v = (rearrange(y, "b n (a d) -> b a n d", a=attn.heads) for y in (q, k, v))
    if rotary:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return attn.to_out[0](rearrange(attend(q, k, v), "b a n d -> b n (a d)"))


# --- the network --------------------------------------------------------------------------------


class WanDiT(nn.Module):
    """Velocity of noisy latents or plans, given time, text and, for the painter, semantics."""

    def __init__(self, config: WanDiTConfig):
        """Load what the network starts from, if it is named. UserError if it is not readable."""
        super().__init__()
        self.config, width = config, config.wan.width
        self.wan = build_transformer(config.wan)
        self.wan.set_attn_processor(attend_in_wan)
        ends = (self.wan.patch_embedding.weight, self.wan.patch_embedding.bias)
        scale = sum(x.detach().square().sum() for x in ends).sqrt()  # norm of a token of N(0, 1)
        if config.of_plans:
            self.wan.patch_embedding = nn.Conv3d(config.channels, width, 1)
            self.wan.proj_out = nn.Linear(width, config.channels)
            nn.init.zeros_(self.wan.proj_out.weight)
            nn.init.zeros_(self.wan.proj_out.bias)
            set_norm(self.wan.patch_embedding.weight, scale)
        if config.context_channels:
            self.context_in = nn.Linear(config.context_channels, width, bias=False)
            self.type_embedding = nn.Parameter(torch.zeros(width))  # of the semantics
            self.null_context = nn.Parameter(torch.empty(width))  # stands where a plan is dropped
            set_norm(self.context_in.weight, scale)
            set_norm(self.null_context, scale)
        # The encoded empty text, which Wan's training dropped captions to: </s> alone.
        self.register_buffer("null_text", torch.zeros(1, config.text_dim))
        self.run_block = nn.Module.__call__  # or another way to run it, that saves memory or time
        self.choose_trained()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.wan.blocks

    def choose_trained(self):
        """Freeze what is not to be trained; what Wan does not have always is."""
        trained = self.config.train
        if trained == "lora":
            peft = require("peft", "lora")
            rank = self.config.rank
            lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA))
            peft.inject_adapter_in_model(lora, self.wan)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(
                not name.startswith("wan.")
                or (self.config.of_plans and name.startswith(ENDS))
                or trained == "all"
                or (trained == "attention" and ".attn1." in name)
                or ".lora_" in name
            )

    def join_streams(
        self, z: Tensor, context: Tensor | None, keep_context: Tensor | None
    ) -> Tensor:
        """Return latents and semantics as one sequence (Sec. 3.2: [z_t, z_sem]), (B, N, D)."""
        latents = self.wan.patch_embedding(z).flatten(2).transpose(1, 2)  # (B, T h/p w/p, D)
        if context is None:
            return latents.contiguous()
        semantics = self.context_in(to_tokens(context))  # (B, S hs ws, D)
        if keep_context is not None:
            semantics = semantics.where(keep_context[:, None, None], self.null_context.to(latents))
        return torch.cat([latents, semantics + self.type_embedding.to(latents)], 1)

    def place(self, grids: Sequence[Grid], start: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return RoPE's cos and sin (N, d/2) of all tokens.

        A token of z_sem lies where its middle is on Wan's axes, between the latents' whole numbers.
        """
        config, found = self.config, []
        for grid, of_plans in zip(grids, (config.of_plans, True), strict=False):
            axes = [torch.arange(n, device=self.null_text.device).double() for n in grid[:3]]
            if of_plans:
                seconds = (axes[0] + 0.25) / grid.rate  # midway between a pair's two frames
                axes[0] = seconds * config.latent_rate + config.latent_zero
                axes[1] = (axes[1] + 0.5) * config.rows / grid.height - 0.5
                axes[2] = (axes[2] + 0.5) * config.columns / grid.width - 0.5
            axes[0] = axes[0] + start * config.latent_rate
            found.append(torch.cartesian_prod(*axes))  # (frames height width, 3)
        turned = angles(torch.cat(found), config.wan.head_width)
        return turned.cos().float(), turned.sin().float()

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        text: Tensor,
        context: Tensor | None = None,
        keep_context: Tensor | None = None,
        start: Tensor | float = 0.0,
    ) -> Tensor:
        """Return the velocity of z, (B, C, T, h, w). The arguments are those of `DiT.forward`."""
        grids = self.config.layout(z.shape[2:], None if context is None else context.shape[2:])
        x = self.join_streams(z, context, keep_context)  # (B, N, D)
        rotary = self.place(grids, start)
        attends = attention_over_time(grids, self.config.window, self.null_text.device)
        null = nn.functional.pad(self.null_text, (0, 0, 0, text.shape[1] - 1))  # (L, text_dim)
        text = text.float().where(text.any(2).any(1)[:, None, None], null)
        kind = "cpu" if z.is_meta else z.device.type
        with torch.autocast(kind, enabled=False):  # Wan keeps this in float32
            time, scales, text, _ = self.wan.condition_embedder(1000 * t.float(), text)
        scales = scales.unflatten(1, (6, -1))  # (B, 6, D)
        for layer, block in enumerate(self.wan.blocks):
            x = self.run_block(block, x, text, scales, (*rotary, attends[layer % 2]))
        x = x[:, : grids[0].tokens]  # the semantics have done their work
        shift, scale = (self.wan.scale_shift_table + time[:, None]).chunk(2, 1)  # (B, 1, D)
        x = (self.wan.norm_out(x.float()) * (1 + scale) + shift).to(x)
        (T, h, w, _), p = grids[0], self.config.patch
        sizes = {"t": T, "h": h, "w": w, "p": p, "q": p}
        return rearrange(self.wan.proj_out(x), "b (t h w) (p q c) -> b c t (h p) (w q)", **sizes)


@torch.no_grad()
def set_norm(weight: Tensor, norm: Tensor):
    """Draw a weight whose norm is given: it makes unit inputs to tokens of that norm."""
    weight.normal_()
    weight.mul_(norm / weight.norm())


def write_released(dit: WanDiT, folder: Path):
    """Write a network's transformer as released ones are laid out: `--dit FOLDER` reads it."""
    for module in dit.wan.modules():
        if hasattr(module, "merge"):  # lora
            module.merge()
    tensors = {n: x.contiguous() for n, x in dit.wan.state_dict().items() if ".lora_" not in n}
    tensors = {name.replace(".base_layer", ""): x for name, x in tensors.items()}
    content, folder = save(tensors, {"format": "pt"}), folder / "transformer"
    write_file(folder / "diffusion_pytorch_model.safetensors", content)
    write_file(folder / "config.json", dit.wan.to_json_string().encode())


def build_dit(config: DiTConfig | WanDiTConfig) -> DiT | WanDiT:
    """Return the network of a configuration."""
    return WanDiT(config) if isinstance(config, WanDiTConfig) else DiT(config)
