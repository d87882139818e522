"""Text encoders: strings to tokens that the DiT reads by cross-attention.

The paper does not name its text encoder. Here: `HashText`, a tiny one without weights that takes
any string (our choice for miniatures, where the DiT learns the words itself).
Contract: padding rows are zero and the empty string is all zeros, the null text of guidance.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class TextEncoder(Protocol):
    """What a text encoder offers: `dim`, the width of its tokens, and `encode`."""

    dim: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return float32 tokens (B, L, dim) of B strings; rows of padding are zero."""


@dataclass(frozen=True)
class HashTextConfig:
    """Sizes of HashText."""

    words: int = 16  # L: words read; what comes after is ignored
    dim: int = 64  # width of a word's vector and of its position's, added


def piece_seed(piece: str) -> int:
    """Return a seed, 0 to 2^64, that is a function of the string alone, on every machine."""
    return int.from_bytes(
        hashlib.sha256(piece.encode(errors="surrogatepass")).digest()[:8], "little"
    )


@lru_cache(maxsize=4096)
def piece_vector(piece: str, dim: int) -> np.ndarray:
    """Return the fixed random vector of a string, (dim,), N(0, 1)."""
    generator = np.random.default_rng(piece_seed(piece))
    return generator.standard_normal(dim).astype(np.float32)


def word_vector(word: str, dim: int) -> np.ndarray:
    """Return the sum of a word's own vector and those of its letter triples, at unit variance.

    The triples make words of one stem ("circle", "circles") neighbours, as in fastText.
    """
    marked = f"<{word}>"
    triples = [marked[i : i + 3] for i in range(len(marked) - 2)]
    pieces = dict.fromkeys([word, *triples])  # each once: "red" is a triple of itself
    return np.sum([piece_vector(piece, dim) for piece in pieces], axis=0) / np.sqrt(len(pieces))


class HashText:
    """Fixed random word vectors plus a fixed random vector of the word's place in the sentence."""

    def __init__(self, config: HashTextConfig):
        self.config = config
        self.dim = config.dim

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return tokens (B, L, dim), float32. Case is ignored; an empty string is all zeros."""
        tokens = torch.zeros(len(texts), self.config.words, self.dim)
        for row, text in zip(tokens, texts, strict=True):
            for place, word in enumerate(text.lower().split()[: self.config.words]):
                vector = word_vector(word, self.dim) + piece_vector(f"place {place}", self.dim)
                row[place] = torch.from_numpy(vector)
        return tokens
