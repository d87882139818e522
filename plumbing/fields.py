"""Nested dataclasses as flat fields, `{"latent.width": 128, ...}`, as text, and back.

A field that may hold one of several dataclasses says which in one more flat field, `NAME.class`.
"""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from functools import lru_cache

from plumbing.files import UserError

CLASS = "class"  # name of the flat field that tells which dataclass a part is of


@lru_cache
def parts(kind: type) -> dict[str, tuple[object, list[type]]]:
    """Return {field: (its declared type, the dataclasses that it may hold)}."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        choices = typing.get_args(hint) or (hint,)
        found[name] = hint, [choice for choice in choices if dataclasses.is_dataclass(choice)]
    return found


def flat_fields(config, prefix: str = "", **instead) -> dict[str, object]:
    """Return {"latent.width": 128, ...} for every leaf of nested dataclasses.

    instead: values of its own fields that are taken in place of those it has.
    """
    fields = {}
    for name, (_, choices) in parts(type(config)).items():
        value = instead.get(name, getattr(config, name))
        if len(choices) > 1:
            fields[f"{prefix}{name}.{CLASS}"] = type(value).__name__
        fields |= flat_fields(value, f"{prefix}{name}.") if choices else {prefix + name: value}
    return fields


def part_class(choices: list[type], values: Mapping, prefix: str) -> type:
    """Return which of the dataclasses a part is of; the first where the values do not say."""
    named = values.get(prefix + CLASS, choices[0].__name__)
    for choice in choices:
        if choice.__name__ == named:
            return choice
    raise UserError(f"{prefix}{CLASS}={named}: choose {', '.join(c.__name__ for c in choices)}")


def field_types(kind: type, values: Mapping, prefix: str = "") -> dict[str, object]:
    """Return the declared type of every flat field of the dataclass that values are of."""
    found = {}
    for name, (hint, choices) in parts(kind).items():
        inside = f"{prefix}{name}."
        if len(choices) > 1:
            found[inside + CLASS] = str
        if choices:
            found |= field_types(part_class(choices, values, inside), values, inside)
        else:
            found[prefix + name] = hint
    return found


def check_types(kind: type, values: Mapping):
    """Raise UserError if a flat field has another type than it declares."""
    for name, hint in field_types(kind, values).items():
        kinds = typing.get_args(hint) or (hint,)
        fits = (*kinds, int) if float in kinds else kinds
        if name in values and type(values[name]) not in fits:
            raise UserError(f"{name}={values[name]!r}: expected {kinds[0].__name__}")


def build(kind: type, values: Mapping, prefix: str = ""):
    """Build a dataclass from flat fields.

    A field that is not there (in a file older than the field) has its default; KeyError if it has
    none.
    """
    made = {}
    for field in dataclasses.fields(kind):
        try:
            made[field.name] = build_field(kind, field.name, values, prefix)
        except KeyError:
            if field.default is dataclasses.MISSING:
                raise
    return kind(**made)


def build_field(kind: type, name: str, values: Mapping, prefix: str = ""):
    """Build one field of a dataclass from flat fields; KeyError if something of it is missing."""
    inside = f"{prefix}{name}."
    if choices := parts(kind)[name][1]:
        return build(part_class(choices, values, inside), values, inside)
    return values[prefix + name]


def command_line(told: str) -> argparse.ArgumentParser:
    """Return a parser of flags whose --help begins with this text, as it is laid out."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=told, formatter_class=layout)


def add_set_flag(parser: argparse.ArgumentParser):
    """Add --set FIELD=VALUE ..., which may be given more than once."""
    told = "fields of the preset: those that a run's config.json lists"
    more = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument("--set", metavar="FIELD=VALUE", dest="settings", help=told, **more)


def find_field(name: str, values: Mapping) -> str:
    """Return the one flat field that a name, or its last part, means; UserError names near ones."""
    settable = [field for field in values if not field.endswith(f".{CLASS}")]
    matches = [name] if name in settable else [x for x in settable if x.endswith(f".{name}")]
    if len(matches) == 1:
        return matches[0]
    near = matches or difflib.get_close_matches(name, settable, 4, 0.4)
    near = near or [field for field in settable if name.split(".")[-1] in field][:4]
    problem = "could be any of" if matches else "no such field; near ones:"
    raise UserError(f"--set {name}: {problem} {', '.join(near) or 'none'}")


def parse_value(text: str, hint, name: str):
    """Read a field's value by its declared type; UserError if the text does not fit."""
    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    kind = kinds[0]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise UserError(f"{name}={text}: expected {kind.__name__}") from None


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Return the fields in which two mappings differ, as "name old -> new"."""
    return [
        f"{name} {old.get(name)} -> {new.get(name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
