"""Read an object of the Prometheus Operator from standard input, and print what the models of the operator know of it.

This program runs in the environment .venv-kubernetes.
"""

import json
import sys

from cloudcoil.models.prometheus_operator import v1

document = json.load(sys.stdin)
found = getattr(v1, document["kind"]).model_validate(document)
print(found.model_dump_json(by_alias=True, exclude_unset=True))
