"""Start the trial process of a server with the settings of the server.

    python -m service.server.trials DESCRIPTOR SETTINGS

runs the keeper in this process. A worker starts it so if the first keeper and its trial process have been killed.
DESCRIPTOR is the number of the open socket to the worker, and SETTINGS are the settings below, as JSON.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from threading import Thread
from typing import Any

from models.trial import IS_POSSIBLE, TrialLimits
from service.inference.model_loader import ModelLoader
from service.inference.registry import begin_first_trial
from service.inference.trial import TrialClient, connected_sockets, import_early, keep_and_exit, start_trial_process
from service.settings import Settings

SETTINGS_OF_LOADER = ("backend", "max_batch_rows", "max_batch_bytes")
SETTINGS_OF_TRIALS = ("trial_seconds", "trial_bytes")


def start_trials(settings: Settings) -> TrialClient | None:
    """Fork the process that tries artifacts out before the server loads them. See `service.inference.trial`.

    Return None on a system where no trial is possible.

    The trial runs on the CPU, also for a server with a GPU: a driver that works in one process does not work in its
    children.
    """
    if not IS_POSSIBLE:
        return None
    values = settings.model_dump(include={*SETTINGS_OF_LOADER, *SETTINGS_OF_TRIALS})
    trials = start_trial_process(_loader(values).try_out, _limits(values), lambda: _start_keeper(values))
    begin_first_trial(settings.artifact_folder, ModelLoader(trials=trials), settings.trusted_keys)
    return trials


def _loader(values: Mapping[str, Any]) -> ModelLoader:
    loader = ModelLoader(**{name: values[name] for name in SETTINGS_OF_LOADER})
    loader.prepare_trials()
    return loader


def _limits(values: Mapping[str, Any]) -> TrialLimits:
    return TrialLimits(values["trial_seconds"], values["trial_bytes"])


def _start_keeper(values: Mapping[str, Any]) -> socket.socket:
    """Start a keeper that runs this module. Return the socket to it. Raises OSError if no process can be started."""
    client, server = connected_sockets()
    with server:
        number = server.fileno()
        command = [sys.executable, "-m", "service.server.trials", str(number), json.dumps(values)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # finds the same modules
        try:
            process = subprocess.Popen(command, pass_fds=[number], env=environment)  # noqa: S603 - its own module
        except OSError:
            client.close()
            raise
    Thread(target=process.wait, daemon=True).start()  # otherwise a killed keeper would stay as a zombie
    return client


def _keep(number: str, values: str) -> None:
    """Run the keeper in this process. See the docstring of this module."""
    settings = json.loads(values)
    loader, server = _loader(settings), socket.socket(fileno=int(number))
    import_early()
    keep_and_exit(server, loader.try_out, _limits(settings))


if __name__ == "__main__":
    _keep(*sys.argv[1:])
