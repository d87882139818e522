"""A clock for the functions of a program; as a command: where the time of sample.py goes.

    python benchmarks/clock.py "a red circle moves left" --out samples/red.webp

Standard library only: the import of torch is on the clock, too.
"""

import functools
import inspect
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


class Clock:
    """Counts seconds by label; a label's are without those of labels inside it."""

    def __init__(self):
        self.labels = ["rest"]
        self.start()

    def start(self):
        """Forget all seconds so far."""
        self.seconds: Counter[str] = Counter()
        self.since = time.perf_counter()

    def book(self):
        """Add the time since the last booking to the innermost label."""
        now = time.perf_counter()
        self.seconds[self.labels[-1]] += now - self.since
        self.since = now

    def begin(self, label: str):
        self.book()
        self.labels.append(label)

    def end(self):
        self.book()
        self.labels.pop()

    @contextmanager
    def on(self, label: str) -> Iterator[None]:
        """Count what is done in this context."""
        self.begin(label)
        try:
            yield
        finally:
            self.end()

    def watch(self, owner: object, name: str, label: str):
        """Put a module's function or a class's method on the clock, whoever calls it.

        AttributeError if there is none of that name.
        """
        setattr(owner, name, self.watched(getattr(owner, name), label))

    def watched(self, function: Callable, label: str) -> Callable:
        """Return a function whose calls, and the steps of whose generators, are counted."""

        @functools.wraps(function)
        def counted(*args, **kwargs):
            with self.on(label):
                result = function(*args, **kwargs)
            return self.each(result, label) if inspect.isgenerator(result) else result

        return counted

    def each(self, items: Iterator, label: str) -> Iterator:
        """Yield the items of a generator; count the time that it takes to make them."""
        while True:
            with self.on(label):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


def main():
    """Run sample.py on the clock; the last line printed is {label: seconds} as JSON."""
    clock = Clock()
    with clock.on("import of torch"):
        import torch  # noqa: F401
    with clock.on("other imports"):
        import sample
        from run import Run
        from toy.vae import TinyVAE
    clock.watch(Run, "_load", "loading weights")
    clock.watch(TinyVAE, "decode_pieces", "VAE decoder")
    for name, label in {
        "arguments": "reading the command line",
        "open_run": "opening the run",
        "encode_prompts": "text encoder",
        "sample_plans": "planner",
        "paint_latents": "painter",
        "write_video": "writing the video",
        "contact_sheet": "drawing the sheet",
    }.items():
        clock.watch(sample, name, label)
    sample.main()
    clock.book()
    print(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()
