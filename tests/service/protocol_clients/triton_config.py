"""Read the files config.pbtxt that are the arguments as Triton does, and print them as one JSON list.

This program runs in the environment .venv-clients, so it imports nothing of this project. The schema of the files is
that in Triton's client.
"""

import json
import sys
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig


def main(paths: list[str]) -> None:
    """Print the configurations."""
    found = [text_format.Parse(Path(path).read_text(), ModelConfig()) for path in paths]
    print(json.dumps([json_format.MessageToDict(config, preserving_proto_field_name=True) for config in found]))


if __name__ == "__main__":
    main(sys.argv[1:])
