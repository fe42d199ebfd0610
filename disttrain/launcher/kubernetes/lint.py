"""What is wrong with manifests: their shape, and what Kubernetes accepts although the job will hang, fail or run alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from disttrain.errors import ConfigError
from disttrain.launcher.kubernetes import rules
from disttrain.launcher.kubernetes.places import Document, Fault, Place, load
from disttrain.launcher.kubernetes.schemas import KINDS, Schema


def lint(path: str | Path) -> list[Fault]:
    """The faults in a file, by line. A job's Service and its runtime are looked for in the same file.

    Raises:
      ConfigError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return lint_text(text, str(path))


def lint_text(text: str, file: str = "<text>") -> list[Fault]:
    """The same for what a file would hold."""
    try:
        documents = load(text, file)
    except yaml.YAMLError as error:
        return [_not_yaml(error, file)]
    faults = []
    for document in documents:
        shape = list(_shape(document))
        document.sound = not shape
        faults += shape
    # Rules go by the shape: of what is not right yet, they would only find consequences.
    faults += [fault for document in documents if document.sound for fault in rules.check(document, documents)]
    return sorted(faults, key=lambda fault: fault.line)


def _not_yaml(error: yaml.YAMLError, file: str) -> Fault:
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error)
    return Fault(
        file, mark.line + 1 if mark else 1, "yaml", "the file", f"not YAML: {said}", "correct the syntax there"
    )


# Shape ------------------------------------------------------------------------------------------------------------------


def _shape(document: Document) -> Iterator[Fault]:
    if not isinstance(document.value, dict):
        line = document.root.line
        yield Fault(
            document.file, line, "kind", "the document", "it is not a mapping", "begin with apiVersion: and kind:"
        )
        return
    for path, line in document.repeated:
        fault = Place(document, path).fault("repeated-key", "the key is there twice", "keep one of the two")
        yield Fault(fault.file, line, *list(vars(fault).values())[2:])
    root = document.root
    api, kind = str(root["apiVersion"].value), str(root["kind"].value)
    if (api, kind) not in KINDS:
        known = ", ".join(f"{k} ({a})" for a, k in KINDS)
        yield root["kind"].fault("kind", f"{kind} of {api} is not a kind that is checked here", f"those are {known}")
        return
    yield from _check(root, KINDS[api, kind])


def _check(place: Place, schema: Schema) -> Iterator[Fault]:
    value = place.value
    if schema == "any":
        return
    if isinstance(schema, tuple):
        if value not in schema:
            yield place.fault("value", f"{value!r} is not known here", f"use one of {', '.join(map(repr, schema))}")
    elif isinstance(schema, str):
        if not _IS[schema](value):
            yield place.fault("type", f"{_said(value)} is not {_NAMES[schema]}", f"write {_NAMES[schema]}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield place.fault("type", f"{_said(value)} is not a list", "write a list")
        for item in place:
            yield from _check(item, schema[0])
    elif not isinstance(value, dict):
        yield place.fault("type", f"{_said(value)} is not a mapping", "write a mapping")
    else:
        yield from _check_fields(place, schema)


def _check_fields(place: Place, schema: dict[str, Schema]) -> Iterator[Fault]:
    fields = {name.removesuffix("!"): inner for name, inner in schema.items()}
    for item in place:
        if item.key not in fields and "*" not in fields:
            near = next((name for name in fields if name.lower() == str(item.key).lower()), None)
            mend = f"write {near}" if near else f"take it out, or use one of {', '.join(sorted(fields))}"
            yield item.fault("unknown-field", "there is no such field", mend)
        else:
            yield from _check(item, fields.get(item.key, fields.get("*", "any")))
    for name in schema:
        if name.endswith("!") and place[name[:-1]].value is None:
            yield place[name[:-1]].fault("missing-field", "it has to be there", f"add {name[:-1]}:")


def _said(value: Any) -> str:
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value)) or repr(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_QUANTITY = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(n|u|m|k|[MGTPE]i?|Ki|[eE][+-]?[0-9]+)?")
_IS = {
    "string": lambda value: isinstance(value, str),
    "integer": _integer,
    "boolean": lambda value: isinstance(value, bool),
    "port": lambda value: _integer(value) or isinstance(value, str),
    "quantity": lambda value: (
        (_integer(value) or isinstance(value, float | str)) and bool(_QUANTITY.fullmatch(str(value)))
    ),
}
_NAMES = {
    "string": "a string (numbers and true or false in quotes)",
    "integer": "a whole number, without quotes",
    "boolean": "true or false",
    "port": "a port's number or name",
    "quantity": "a quantity, such as 2, 500m or 4Gi",
}
