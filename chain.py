"""What belongs together: the weights, the data and the states that may be used with each other.

A run's parts form a chain: encoder and VAE, then compressor and painter, then planner. Each weights
file names the digests of those it was trained on, and each training state too; both name the data.
Where the chain does not hold, one line says which stage is out of date, and what to do.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace

from parts import describe, flag, placed
from plumbing.files import UserError
from stages import ORDER


def again(run, stage: str) -> str:
    """Return the command that trains a stage of a run as it is, on the data that it knows."""
    notes = (run.note(each).get("data") for each in (stage, *run.needs(stage)[::-1]))
    data = next(filter(None, notes), {})
    named = ["--data", data["name"]] if data.get("listing") else []
    return shlex.join(["python", "train.py", "--stage", stage, "--out", str(run.path), *named])


def check_chain(run, stage: str, made_of: dict[str, str] | None = None):
    """Raise UserError if a stage was trained on other weights than are there now.

    made_of: what it was trained on, if not its weights' own. What is not there or damaged, and what
    older weights do not say, is not compared.
    """
    made_of = run.note(stage).get("made_of", {}) if made_of is None else made_of
    for need, digest in made_of.items():
        if run.note(need).get("digest", digest) != digest:
            raise UserError(
                f"{run.path}: {stage} was trained on another {need} than is there now, they do not "
                f"belong together; train {stage} anew: {again(run, stage)} --fresh"
            )


def check_weights(run, part: str):
    """Raise UserError if a part's released weights are not those that a run was made with."""
    config = run.released_parts[part]
    if not config.weights:
        raise UserError(f"{run.path} names no weights: give {flag(part)} PATH_OR_ID")
    try:
        found = describe(part, config.weights)
    except UserError as error:
        raise UserError(f"{error}; {flag(part)} says where the run's are now") from None
    if found.digest != config.digest:
        raise UserError(f"{config.weights} has other weights than {run.path} was made with")


def point_to(run, parts: dict[str, object]):
    """Take released weights from other places than a run names; UserError if they differ."""
    for part, found in parts.items():
        mine = run.released_parts.get(part)
        if getattr(mine, "digest", None) != found.digest:
            raise UserError(f"{found.weights}: {run.path} was made with another {part}")
        moved = {part: replace(mine, weights=found.weights)}
        run.config = replace(run.config, **placed(run.config, moved))


def check_order(run, stages: Sequence[str], say: Callable[[str], None]):
    """Raise UserError, before anything is trained, if a stage could not go on after an earlier one.

    To train a stage puts out of date what was trained on it as it is. Where that is not to be
    trained now, it is said.
    """
    for stage in stages:
        if run.finished(stage) and run.steps_of(stage) >= getattr(run.config.stages, stage).steps:
            continue
        late = [s for s in ORDER if stage in run.needs(s)]
        late = [s for s in late if run.has(s) or run.state_file(s).exists()]
        names = " and ".join(late)
        if late and set(late) & set(stages):
            raise UserError(
                f"{run.path}: {stage} would change, and {names} learned from it as it is: --fresh "
                "trains all of them anew"
            )
        if late:
            say(f"{stage} will change: {names} learned from it as it is, and will be out of date")


def check_begun(run, stages: Sequence[str], data: dict[str, str], seed: int):
    """Raise UserError, before anything is written, if what was trained forbids what is asked.

    States, which are large, are not read here.
    """
    check_order(run, stages, lambda _: None)
    for stage in stages:
        check_origin(run, stage, data, seed, {})


def data_note(dataset) -> dict[str, str]:
    """Return what tells one dataset from another: a name, and a digest of its list of videos."""
    if not hasattr(dataset, "listing"):
        return {"name": "the synthetic world", "listing": ""}
    return {"name": str(dataset.path.resolve()), "listing": dataset.listing}


def check_origin(run, stage: str, data: dict[str, str], seed: int, state: dict | None):
    """Raise UserError if a stage that was begun cannot go on as the command says.

    It cannot with other weights than it was begun on, with data of another place and another list
    of videos and captions, with another seed, or without its state.
    """
    for begun in (run.note(stage), state or {}):
        check_chain(run, stage, begun.get("made_of", {}))
        old = begun.get("data")
        # The same list under another name is a folder that has moved.
        if old and old["name"] != data["name"] and old["listing"] != data["listing"]:
            raise UserError(
                f"{run.path}: {stage} learned from {old['name']}, not from {data['name']}: give "
                "the same --data, another --out, or --fresh to start over"
            )
        if begun.get("seed", seed) != seed:
            raise UserError(
                f"{run.path}: {stage} was trained with --seed {begun['seed']}: give the same, "
                "another --out, or --fresh to start over"
            )
    steps = getattr(run.config.stages, stage).steps
    if state is None and run.has(stage) and run.steps_of(stage) < steps:
        raise UserError(
            f"{run.path}: {stage} has weights of {run.steps_of(stage)} steps but no training state "
            f"to go on from to {steps}: --fresh starts over"
        )
