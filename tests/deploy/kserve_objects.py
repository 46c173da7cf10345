"""Read objects of KServe from standard input, and print the fields that the models of KServe's client do not have.

This program runs in the environment .venv-clients.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from kserve import models
from kubernetes.client import models as of_kubernetes

LIST = re.compile(r"list\[(.*)\]", re.IGNORECASE)
MAP = re.compile(r"dict[(\[]str, (.*)[)\]]", re.IGNORECASE)
SCALARS: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def unknown_fields(value: Any, kind: str, place: str) -> Iterator[str]:
    """Yield the places in `value` that a model of the type `kind` does not have, or that have another type."""
    if kind == "object" or kind == "IntstrIntOrString":
        return
    if kind in SCALARS:
        if not isinstance(value, SCALARS[kind]):
            yield f"{place}: not {kind}"
    elif found := LIST.fullmatch(kind):
        for index, element in enumerate(value):
            yield from unknown_fields(element, found[1], f"{place}/{index}")
    elif found := MAP.fullmatch(kind):
        for name, element in value.items():
            yield from unknown_fields(element, found[1], f"{place}/{name}")
    else:
        yield from unknown_fields_of_model(value, kind, place)


def unknown_fields_of_model(value: Any, kind: str, place: str) -> Iterator[str]:
    """Yield the unknown fields of an object."""
    model: Any = getattr(models, kind, None) or getattr(of_kubernetes, kind)
    attributes = {name: attribute for attribute, name in model.attribute_map.items()}
    for name, element in value.items():
        if name in attributes:
            yield from unknown_fields(element, model.openapi_types[attributes[name]], f"{place}/{name}")
        else:
            yield f"{place}/{name}"


faults: list[str] = []
for document in json.load(sys.stdin):
    version = document["apiVersion"].rpartition("/")[2]
    kind = f"{version.capitalize()}{document['kind']}"
    faults += unknown_fields(document, kind, kind)
print(json.dumps(faults))
