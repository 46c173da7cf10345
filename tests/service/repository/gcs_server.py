"""A server that speaks the protocol of Google Cloud Storage, with the bucket `models` in memory.

    .venv-remote/bin/python -m tests.service.repository.gcs_server PORT

The emulator ignores the parameter `ifGenerationMatch` of uploads. This program adds it, as Google documents it: an
upload with another generation than that of the object has the status 412, and 0 means that there is no object.
"""

import sys
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

insert_anyway = objects.insert


def generation_of(storage: Any, bucket: str, name: str) -> str:
    """Return the generation of an object; "0" if there is none."""
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def insert(request: Any, response: Any, storage: Any, *arguments: Any, **options: Any) -> None:
    """Insert an object if its generation is that of the request."""
    if "ifGenerationMatch" in request.query:
        (expected,) = request.query["ifGenerationMatch"]
        names = request.query.get("name")
        name = unquote(names[0]) if names else request.data["meta"]["name"]
        if generation_of(storage, request.params["bucket_name"], name) != expected:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
    insert_anyway(request, response, storage, *arguments, **options)


objects.insert = insert  # before the import of the server, which puts it into its routes

if __name__ == "__main__":
    from gcp_storage_emulator.server import create_server

    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="models").run()
