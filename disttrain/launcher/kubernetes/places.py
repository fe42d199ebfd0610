"""YAML that remembers its lines: documents, places in them, and what is wrong there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True)
class Fault:
    """What is wrong, where, and what to do about it."""

    file: str
    line: int  # counts from 1
    rule: str  # a short name, such as launcher-replicas
    where: str  # such as "MPIJob digits, spec.slotsPerWorker"
    message: str
    mend: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.where}: {self.message}; {self.mend} [{self.rule}]"


@dataclass
class Document:
    """One YAML document. `lines` says where each path begins, a path being the keys and indices that lead there."""

    file: str
    value: Any = None
    sound: bool = True  # whether it has the shape of its kind
    lines: dict[tuple, int] = field(default_factory=dict)
    repeated: list[tuple[tuple, int]] = field(default_factory=list)  # paths that are there already, and their lines

    @property
    def root(self) -> Place:
        return Place(self, ())

    @property
    def kind(self) -> str:
        return self.root["kind"].value

    @property
    def name(self) -> str:
        return str(self.root["metadata"]["name"].value or "")


@dataclass(frozen=True)
class Place:
    """A place in a document, whether something is there or not."""

    document: Document
    path: tuple

    def __getitem__(self, key: str | int) -> Place:
        return Place(self.document, (*self.path, key))

    def __iter__(self) -> Iterator[Place]:
        """Over the places in a list, or in a mapping."""
        value = self.value
        keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        return (self[key] for key in keys)

    @property
    def value(self) -> Any:
        """What is there; None: nothing."""
        value = self.document.value
        for key in self.path:
            inside = key in value if isinstance(value, dict) else isinstance(value, list) and key in range(len(value))
            if not inside:
                return None
            value = value[key]
        return value

    @property
    def key(self) -> str | int:
        return self.path[-1]

    @property
    def line(self) -> int:
        """Of this place or, where nothing is there, of the nearest one around it."""
        path = self.path
        while path not in self.document.lines:
            path = path[:-1]
        return self.document.lines[path]

    def fault(self, rule: str, message: str, mend: str) -> Fault:
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.path).removeprefix(".")
        document = " ".join(filter(None, map(str, (self.document.value.get("kind"), self.document.name))))
        where = ", ".join(filter(None, (document, path)))
        return Fault(self.document.file, self.line, rule, where, message, mend)


def load(text: str, file: str) -> list[Document]:
    """The documents that are not empty.

    Raises:
      yaml.YAMLError: the text is not YAML.
    """
    documents = []
    for node in yaml.compose_all(text, yaml.SafeLoader):
        if node is not None and node.tag != "tag:yaml.org,2002:null":
            documents.append(document := Document(file))
            try:
                document.value = _build(node, (), document)
            except RecursionError:
                raise yaml.MarkedYAMLError(
                    problem="an anchor that holds itself", problem_mark=node.start_mark
                ) from None
    return documents


def _build(node: yaml.Node, path: tuple, document: Document) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), document) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    value: dict[Any, Any] = {}
    for key_node, item in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key that is not a word", problem_mark=key_node.start_mark)
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in value:
            document.repeated.append(((*path, key), line))
            continue
        document.lines[(*path, key)] = line
        value[key] = _build(item, (*path, key), document)
    return value


def _scalar(node: yaml.ScalarNode) -> Any:
    if node.tag == "tag:yaml.org,2002:timestamp":  # to Kubernetes, a string
        return node.value
    return yaml.SafeLoader("").construct_object(node)
