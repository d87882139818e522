"""Change flow.py, swin.py and the Compressor in small ways, one at a time: do the tests notice?

    pip install mutmut                                        # no dependency of the project
    nice python benchmarks/mutants.py                         # all three: 7 minutes of one core
    nice python benchmarks/mutants.py swin.py --only 47 54    # these two again, with what failed

The changes are those of mutmut 3 (an argument dropped or None, a number one more, an operator or a
default exchanged, ...) and the loss of a decorator. mutmut itself leaves out functions with a
decorator and the bodies of classes: the core of swin.py, what measures the Compressor's statistics,
every default of its configuration. So they are made here, by its operators; annotations and
docstrings stay. A file is tested by its own test file only, each mutant in a fork of a process that
has imported torch and collected the tests: first with 5 examples of each property, and if it
survives that, with all of them. The files themselves are not touched.

    mutmut 3.8.1, torch 2.13.0    killed / all    before the tests were strengthened
    flow.py                       108 / 108       107
    swin.py                       259 / 278       242
    semantic.py, the compressor   214 / 214       204

The 19 survivors, all in swin.py:
- 15: `strict=` of a zip False, None or gone. Its arguments have equal lengths always: it is there
  for the reader, and for the day when that is no longer so.
- 2: fractions limited to denominators of one more than 10 000 and 1 000 000: any such number will
  do. 1: a cache of 65 instead of 64; that it has an end is tested.
- 1: indices that stay on the CPU in `partition`: only a GPU would refuse (in `merge` the meta
  device does, too).
"""

import argparse
import ast
import difflib
import gc
import os
import resource
import sys
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process without threads can fork
import libcst as cst
import pytest
import torch
from _pytest.main import pytest_runtestloop
from hypothesis import Phase, settings
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import NEVER_MUTATE_FUNCTION_CALLS
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {  # file -> the classes to change (none: everything), its tests
    "flow.py": ((), "tests/test_flow.py"),
    "swin.py": ((), "tests/test_swin.py"),
    "semantic.py": (("CompressorConfig", "Compressor"), "tests/test_semantic.py"),
}
ARGUMENTS = ["-x", "-q", "-p", "no:cacheprovider", "-s"]
ARGUMENTS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is imported already
EXAMPLES = 5, 100  # few of each property kill most; the survivors see as many as the suite has
PLACES = str(ROOT), str(ROOT / "tests")  # of modules that may hold parts of what is changed
SLOW = "compiled"  # a test for the survivors only
SECONDS = 60  # of processor time: a mutant that needs more is caught, too


def without_decorator(node: cst.FunctionDef | cst.ClassDef) -> Iterator[cst.CSTNode]:
    """Drop one decorator: mutmut has no such operator."""
    for i in range(len(node.decorators)):
        yield node.with_changes(decorators=node.decorators[:i] + node.decorators[i + 1 :])


OPERATORS = [*mutation_operators, ((cst.FunctionDef, cst.ClassDef), without_decorator)]


class Mutations(cst.CSTVisitor):
    """Collect (line, node, its replacement) of all operators on all nodes but annotations."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, classes: tuple[str, ...]):
        super().__init__()
        self.classes = classes
        self.inside = not classes
        self.found: list[tuple[int, cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.ClassDef) and node.name.value in self.classes:
            self.inside = True
        called = isinstance(node, cst.Call) and getattr(node.func, "value", None)
        if isinstance(node, cst.Annotation) or called in NEVER_MUTATE_FUNCTION_CALLS:
            return False
        if self.inside:
            line = self.get_metadata(PositionProvider, node).start.line
            for kinds, operator in OPERATORS:
                if isinstance(node, kinds):
                    self.found += [(line, node, other) for other in operator(node)]
        return True

    def on_leave(self, node: cst.CSTNode):
        if isinstance(node, cst.ClassDef) and node.name.value in self.classes:
            self.inside = False


def mutants(source: str, classes: tuple[str, ...]) -> list[tuple[int, str]]:
    """Return (line, source) of every mutant that is Python, and different from all others."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    visitor = Mutations(classes)
    wrapper.visit(visitor)
    seen, kept = {ast.dump(ast.parse(source))}, []
    for line, node, other in visitor.found:
        changed = wrapper.module.deep_replace(node, other).code
        try:
            tree = ast.dump(ast.parse(changed))
        except SyntaxError:
            continue
        if tree not in seen:
            seen.add(tree)
            kept.append((line, changed))
    return kept


def install(name: str, source: str) -> None:
    """Run a mutant's source as a new module, and put its parts wherever the old one's are."""
    old = sys.modules[name]
    new = types.ModuleType(name)
    new.__file__ = old.__file__
    sys.modules[name] = new
    exec(compile(source, old.__file__, "exec"), vars(new))
    replaced = {id(old): new}
    for key, value in vars(old).items():
        if getattr(value, "__module__", None) == name:
            replaced[id(value)] = vars(new).get(key)
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", None)).rpartition("/")[0] in PLACES:
            for key, value in list(vars(module).items()):
                if id(value) in replaced and module is not new:
                    setattr(module, key, replaced[id(value)])


def few_examples(session: pytest.Session, number: int) -> None:
    """Give each property so many examples at most, and no search for a smaller one."""
    if number == EXAMPLES[0]:
        session.items = [item for item in session.items if SLOW not in item.name]
    for item in session.items:
        test = getattr(item.obj, "__func__", item.obj)
        if hasattr(test, "hypothesis"):
            old = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(
                old,
                max_examples=min(number, old.max_examples),
                phases=(Phase.explicit, Phase.generate),
            )


class Mutants:
    """A pytest plugin: instead of the tests once, run them in a fork for each mutant."""

    def __init__(self, file: str, numbers: list[int] | None, quick: bool):
        self.file, self.numbers, self.quick = file, numbers, quick
        self.counts: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        source = (ROOT / self.file).read_text()
        found = mutants(source, TARGETS[self.file][0])
        gc.collect()
        gc.freeze()  # the forks share what is there
        if self.outcome(session, source) != "survives":
            pytest.exit(f"{self.file}: its tests fail without any mutant")
        for number in self.numbers or range(len(found)):
            line, changed = found[number]
            print(f"{self.file} {number}/{len(found)}", end="\r", file=sys.stderr, flush=True)
            end = self.outcome(session, changed, show=bool(self.numbers))
            self.counts[end] += 1
            if end != "killed" or self.numbers:
                print(
                    f"{self.file}:{line} mutant {number}: {end}",
                    *difference(source, changed),
                    flush=True,
                )
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport):
        if report.failed:
            print(f"\n{report.nodeid}", report.longreprtext, sep="\n", flush=True)

    def outcome(self, session: pytest.Session, source: str, show: bool = False) -> str:
        """Say how the tests of a mutant end: first with few examples, then with all of them."""
        for examples in EXAMPLES[: 1 if self.quick else 2]:
            sys.stdout.flush()
            child = os.fork()
            if not child:
                code = 2
                try:
                    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
                    if not show:
                        quiet = os.open(os.devnull, os.O_WRONLY)
                        os.dup2(quiet, 1)
                        os.dup2(quiet, 2)
                    install(Path(self.file).stem, source)
                    few_examples(session, examples)
                    code = 1
                    pytest_runtestloop(session)
                    code = 0
                except session.Failed:
                    pass
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                return "killed, too slow"
            if os.WEXITSTATUS(status):
                return "killed" if os.WEXITSTATUS(status) == 1 else "killed by its import"
        return "survives"


def difference(before: str, after: str) -> list[str]:
    """Return the changed lines, each on a line of its own."""
    pair = before.splitlines(), after.splitlines()
    return ["\n    " + line for line in list(difflib.unified_diff(*pair, lineterm="", n=0))[3:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help=f"of {', '.join(TARGETS)}; all without")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of mutants; shows their tests")
    parser.add_argument("--quick", action="store_true", help="few examples only: a lower bound")
    parser.add_argument("--list", action="store_true", help="show all mutants and run none")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    for file in options.files or TARGETS:
        classes, tests = TARGETS[file]
        if options.list:
            source = (ROOT / file).read_text()
            for number, (line, changed) in enumerate(mutants(source, classes)):
                print(f"{file}:{line} mutant {number}", *difference(source, changed))
            continue
        plugin = Mutants(file, options.only, options.quick)
        pytest.main([*ARGUMENTS, "--tb=short" if options.only else "--tb=no", tests], [plugin])
        print(f"{file}: {dict(plugin.counts)} of {plugin.counts.total()}", flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{used.ru_utime + used.ru_stime:.0f} s of processor time")


if __name__ == "__main__":
    main()
