"""Text encoders: strings to tokens that the DiT reads by cross-attention.

The paper does not name its text encoder. Here it is `UMT5`, which Wan2.1 uses; the miniature's is
`HashText` in toy/text.py, which has no weights. Of all of them, rows of padding are zero, and the
tokens of the empty string are all zero: they are the null text of guidance.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from plumbing.files import UserError, require
from plumbing.weights import (
    digest,
    load_text_model,
    loading,
    locate,
    read_settings,
    size,
    tensor_files,
    tokenizer_files,
)


class TextConfig(Protocol):
    """What the configuration of a text encoder says."""

    words: int  # L: tokens read of a text; what comes after is ignored
    dim: int  # width of a token


class TextEncoder(Protocol):
    """What a text encoder offers."""

    config: TextConfig

    def count(self, text: str) -> int:
        """Return how many tokens a text has; of more than config.words, the first are read."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return float32 tokens (B, L, dim) of B strings; rows of padding are zero."""

    def null(self) -> Tensor:
        """Return the one token (1, dim) that a released transformer knows as the empty text."""


# --- released text encoders ---------------------------------------------------------------------

HEADS = re.compile(r"(pooler|decoder|lm_head|cls|vocab_\w+)\.")  # tensors that are not needed here


@dataclass(frozen=True)
class UMT5Config:
    """Which text encoder, and its sizes; `describe_text` reads them off its weights."""

    weights: str = ""  # folder or hub id, with the encoder in it or in text_encoder and tokenizer
    digest: str = ""  # stands for the content of its weights
    words: int = 512  # L: tokens read; what comes after is ignored
    dim: int = 4096
    dtype: str = "bfloat16"  # of its weights in memory


def text_folders(weights: str) -> tuple[str, str]:
    """Return the folders of encoder and tokenizer: of a pipeline's repository, or none ("")."""
    pipeline = locate(weights, "text_encoder/config.json") is not None
    return ("text_encoder/", "tokenizer/") if pipeline else ("", "")


def describe_text(weights: str) -> UMT5Config:
    """Return the configuration of a released text encoder, in a folder or under a hub id.

    UserError if it has no readable settings, no safetensors or no tokenizer.
    """
    folder, tokenizer = text_folders(weights)
    settings = read_settings(weights, f"{folder}config.json")
    dim = size(weights, settings, "d_model", "hidden_size")
    longest = size(weights, settings, "max_position_embeddings", default=512)  # T5 has no limit
    if "quantization_config" in settings:
        raise UserError(f"{weights}: quantised weights (quantization_config) are not read here")
    files = [
        locate(weights, f"{folder}config.json"),
        *tensor_files(weights, stem=f"{folder}model").values(),
        *tokenizer_files(weights, tokenizer),
    ]
    return UMT5Config(weights, digest(files), min(512, longest), dim)


def cleaned(text: str) -> str:
    """Return a text in one line, without double spaces and lone surrogates (no tokenizer's)."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


class UMT5(nn.Module):
    """umT5, or another text encoder that transformers can load (T5, BERT, ...); extra `text`.

    As in Wan2.1: up to 512 tokens, and the places after the last one are zero.
    """

    def __init__(self, config: UMT5Config, device: torch.device | str = "cpu"):
        """Load weights and tokenizer. UserError if either is not readable or not complete."""
        super().__init__()
        self.config = config
        transformers = require("transformers", "text")
        weights, (folder, tokenizer) = config.weights, text_folders(config.weights)
        with loading(weights, "a text encoder"):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                tokenizer_files(weights, tokenizer)[0].parent, trust_remote_code=False
            )
            self.model = load_text_model(weights, folder, getattr(torch, config.dtype), HEADS)
        self.to(device).eval().requires_grad_(False)

    def count(self, text: str) -> int:
        """Return how many tokens a text has, </s> included; config.words of them are read."""
        text = cleaned(text)
        return len(self.tokenizer(text).input_ids) if text else 0

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return tokens (B, L, dim) float32; rows of padding, and all of an empty string's, are 0.

        One text at a time: without padding, and no text depends on its company.
        """
        words, dim = self.config.words, self.config.dim
        tokens = torch.zeros(len(texts), words, dim, device=self.model.device)
        for row, text in zip(tokens, map(cleaned, texts), strict=True):
            if text:
                hidden = self._hidden(text)
                row[: len(hidden)] = hidden
        return tokens

    def null(self) -> Tensor:
        """Return what the model makes of the empty text, (1, dim) float32: one token, </s>."""
        return self._hidden("")[:1]

    @torch.no_grad()
    def _hidden(self, text: str) -> Tensor:
        """Return the tokens that the model makes of a text, (l, dim) float32."""
        ids = self.tokenizer(
            text, truncation=True, max_length=self.config.words, return_tensors="pt"
        )
        return self.model(**ids.to(self.model.device)).last_hidden_state[0].float()
