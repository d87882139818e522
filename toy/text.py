"""A text encoder without weights that takes any string: the DiT learns the words by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from plumbing.seeds import text_seed


@dataclass(frozen=True)
class HashTextConfig:
    """Sizes of HashText."""

    words: int = 16  # L: words read; what comes after is ignored
    dim: int = 64  # width of a word's vector and of its position's, added
    before: int = 0  # words before it that a word's token tells of, too


@lru_cache(maxsize=4096)
def piece_vector(piece: str, dim: int) -> np.ndarray:
    """Return the fixed random vector of a string, (dim,), N(0, 1)."""
    generator = np.random.default_rng(text_seed(piece))
    return generator.standard_normal(dim).astype(np.float32)


def word_vector(word: str, dim: int, longest: int = 64) -> np.ndarray:
    """Return the sum of a word's own vector and those of its letter triples, at unit variance.

    The triples make words of one stem ("circle", "circles") neighbours, as in fastText. Of what is
    no word but very long, the first letters count.
    """
    marked = f"<{word[:longest]}>"
    triples = [marked[i : i + 3] for i in range(len(marked) - 2)]
    pieces = dict.fromkeys([word, *triples])  # each once: "red" is a triple of itself
    return np.sum([piece_vector(piece, dim) for piece in pieces], axis=0) / np.sqrt(len(pieces))


class HashText:
    """Fixed random vectors of a word, of its place in the sentence and of the words before it.

    The last say which noun an adjective belongs to wherever they stand, as the tokens of a trained
    encoder do; in short sentences the places suffice.
    """

    def __init__(self, config: HashTextConfig):
        self.config = config

    def count(self, text: str) -> int:
        """Return how many words a text has; of more than config.words, the first are read."""
        return len(text.split())

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return tokens (B, L, dim), float32. Case is ignored; an empty string is all zeros."""
        dim = self.config.dim
        tokens = torch.zeros(len(texts), self.config.words, dim)
        for row, text in zip(tokens, texts, strict=True):
            words = text.lower().split()[: self.config.words]
            for place, word in enumerate(words):
                vector = word_vector(word, dim) + piece_vector(f"place {place}", dim)
                for k in range(1, min(self.config.before, place) + 1):
                    vector = vector + piece_vector(f"{k} before: {words[place - k]}", dim)
                row[place] = torch.from_numpy(vector)
        return tokens

    def null(self) -> Tensor:
        """Return the empty text's token, (1, dim): zeros."""
        return torch.zeros(1, self.config.dim)
