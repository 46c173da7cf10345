"""The trial process and the limit on connections, where the system refuses what they need."""

import resource
import sys
from pathlib import Path

import pytest

from models.errors import ArtifactUnreadable
from service.inference.trial import TrialClient, connected_sockets
from service.server.connections import DEFAULT_LIMIT, RESERVED_FILES, connection_limit
from service.server.trials import SETTINGS_OF_LOADER, SETTINGS_OF_TRIALS, _start_keeper
from service.settings import Settings
from tests.models.publishing import publish_twin


def test_artifact_is_not_loaded_and_no_file_stays_open_if_no_trial_process_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = Settings().model_dump(include={*SETTINGS_OF_LOADER, *SETTINGS_OF_TRIALS})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    artifact = publish_twin(tmp_path, "pca")
    client, server = connected_sockets()
    server.close()  # as if the trial process and its keeper had been killed
    trials = TrialClient(client, lambda: _start_keeper(values))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):  # at the second try, no process is started, because the first try is recent
        with pytest.raises(ArtifactUnreadable, match="has ended and cannot be started again"):
            trials.try_out(artifact)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    trials.close()


@pytest.mark.parametrize(
    ("files", "setting", "limit"),
    [
        (resource.RLIM_INFINITY, None, DEFAULT_LIMIT),
        (resource.RLIM_INFINITY, 20_000, 20_000),
        (2**20, None, DEFAULT_LIMIT),
        (2**20, 20_000, 20_000),
        (1024, None, 1024 - RESERVED_FILES),
        (1024, 50, 50),
        (120, None, 60),  # half of the files, because RESERVED_FILES would leave too few
    ],
)
def test_limit_on_connections_follows_the_setting_and_the_files_that_may_be_open(
    monkeypatch: pytest.MonkeyPatch, files: int, setting: int | None, limit: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connection_limit(setting) == limit
