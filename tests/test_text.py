"""text.py: its contract (padding and the empty string are zeros) for any string, and golden values.

HashText has no weights: a word's vector must be the same on every machine and for ever, or weights
trained today lose their words. One vector is therefore written down here.
"""

import hashlib

import pytest
import torch
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st

from plumbing.seeds import text_seed
from toy.text import HashText, HashTextConfig, piece_vector, word_vector

TEXT = HashText(HashTextConfig())
SMALL = HashText(HashTextConfig(words=4, dim=8))
words = st.sampled_from(["a", "red", "blue", "circle", "circles", "moves", "left", "and", "grows"])
sentences = st.lists(words, max_size=6).map(" ".join)


def cosine(a: str, b: str) -> float:
    a, b = (torch.from_numpy(word_vector(word, 64)) for word in (a, b))
    return torch.cosine_similarity(a, b, 0).item()


def test_golden_values():
    """If these change, every DiT trained before has forgotten what its prompts mean.

    Python's own `hash` would give others in every process.
    """
    golden = torch.tensor([0.138545, 1.657937, -0.896230])
    assert_close(TEXT.encode(["red"])[0, 0, :3], golden, 1e-5)
    golden = torch.tensor([-1.702770, -0.969107, 1.382226])
    assert_close(TEXT.encode(["a red circle moves left"])[0, 4, -3:], golden, 1e-5)
    assert text_seed("red") == 14816874794390844849


@pytest.mark.parametrize("word", ["a", "red", "aaaa", "circle", "triangle"])
def test_words_of_every_length_have_unit_variance(word):
    """A piece that occurs twice ("red" is its own middle triple) counts once."""
    assert abs(word_vector(word, 65536).var() - 1) < 0.05


@given(st.lists(st.text(), max_size=4))
def test_any_strings_give_finite_tokens_and_zeros_for_padding(texts):
    tokens = SMALL.encode(texts)
    assert tokens.shape == (len(texts), 4, 8) and tokens.dtype == torch.float32
    assert tokens.isfinite().all()
    for row, text in zip(tokens, texts, strict=True):
        used = len(text.split())
        assert row.ne(0).any(1).tolist() == [place < used for place in range(4)]
        assert SMALL.count(text) == used  # more than 4 are not read


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000"])
def test_nothing_said_is_all_zeros(text):
    """The null text of guidance."""
    assert TEXT.encode([text]).equal(torch.zeros(1, 16, 64))


@given(st.lists(sentences, min_size=1, max_size=4))
def test_a_text_does_not_depend_on_its_batch(texts):
    assert TEXT.encode(texts).equal(torch.cat([TEXT.encode([text]) for text in texts]))


@given(sentences)
def test_case_and_spacing_are_ignored(text):
    tokens = TEXT.encode([text])
    assert TEXT.encode([text.upper()]).equal(tokens)
    assert TEXT.encode([f"  {text.title()} ".replace(" ", "  ")]).equal(tokens)


@given(sentences, sentences)
def test_different_sentences_have_different_tokens(a, b):
    """Order matters, and so does each word."""
    a, b = a.split()[:4], b.split()[:4]
    same = SMALL.encode([" ".join(a)]).equal(SMALL.encode([" ".join(b)]))
    assert same == (a == b)


def test_a_word_is_its_vector_plus_that_of_its_place():
    vectors = [torch.from_numpy(word_vector(word, 64)) for word in ("red", "blue")]
    places = [torch.from_numpy(piece_vector(f"place {place}", 64)) for place in (0, 1)]
    tokens = TEXT.encode(["red blue", "blue red"]).double()
    assert_close(tokens[0, :2], torch.stack([vectors[0] + places[0], vectors[1] + places[1]]), 1e-6)
    assert_close(tokens[1, :2], torch.stack([vectors[1] + places[0], vectors[0] + places[1]]), 1e-6)


@given(st.lists(words, min_size=5, max_size=9))
def test_what_comes_after_the_last_place_is_ignored(many):
    assert SMALL.encode([" ".join(many)]).equal(SMALL.encode([" ".join(many[:4])]))


@pytest.mark.parametrize("near", [("circle", "circles"), ("grow", "grows"), ("move", "moves")])
def test_words_of_one_stem_are_neighbours(near):
    far = max(cosine(near[0], word) for word in ("left", "blue", "yellow", "and"))
    assert cosine(*near) > far + 0.15, f"{near}: {cosine(*near):.2f}, unrelated ones {far:.2f}"


def test_words_are_of_unit_variance_whatever_their_length():
    """The mean of a word's n vectors alone would shrink with n."""
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(300)]
    for length in (1, 5, 20):
        vectors = [torch.from_numpy(word_vector(d[:length], 64)) for d in digests]
        variance = torch.stack(vectors).square().mean().item()
        assert abs(variance - 1) < 0.15, f"variance {variance:.2f} of {length} letters"


def test_pieces_are_not_changed_by_who_holds_them():
    """They are cached: a caller that writes into its tokens must not write into the cache."""
    first = TEXT.encode(["red"])
    kept = first.clone()
    first.zero_()
    assert TEXT.encode(["red"]).equal(kept)


def test_a_token_may_tell_of_the_words_before():
    """Each neighbour adds a vector of its own for its distance; the first word has none."""
    aware = HashText(HashTextConfig(words=4, dim=64, before=2))
    plain = HashText(HashTextConfig(words=4, dim=64))
    told = (aware.encode(["a red circle"]) - plain.encode(["a red circle"]))[0]
    one, two = (torch.from_numpy(piece_vector(x, 64)) for x in ("1 before: red", "2 before: a"))
    assert_close(told[2], one + two, 1e-6)
    assert_close(told[1], torch.from_numpy(piece_vector("1 before: a", 64)), 1e-6)
    assert not told[0].any() and not told[3].any()
    assert not aware.encode([""]).any()
