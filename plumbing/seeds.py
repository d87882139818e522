"""Seeds that are a function of a text, on every machine."""

import hashlib


def piece_seed(piece: str) -> int:
    """Return a seed, 0 to 2^64, that is a function of the string alone, on every machine."""
    return int.from_bytes(
        hashlib.sha256(piece.encode(errors="surrogatepass")).digest()[:8], "little"
    )
