"""The root of Elbo's error tree, and the branch that concerns artifacts.

ElboError
├── ArtifactError
│   ├── ArtifactMissing     no such model, version or file
│   ├── ArtifactForeign     a file, but not one that Elbo wrote
│   ├── ArtifactCorrupt     truncated or altered since it was sealed
│   ├── ArtifactTooNew      written by a later format than this program reads
│   └── ArtifactMismatch    intact, yet it does not reproduce its own golden answers here
├── DeviceMissing
├── training.errors.DataError and training.errors.FitError
└── the HTTP errors of service.errors
"""


class ElboError(Exception):
    """Base of every error that Elbo raises on purpose. `str(error)` is one line: expected, got, what to do."""

    code = "elbo_error"


class DeviceMissing(ElboError):
    """The device that was asked for is not there."""

    code = "device_missing"


class ArtifactError(ElboError):
    """An artifact cannot be found, read or trusted."""

    code = "artifact_error"


class ArtifactMissing(ArtifactError):
    """No such model, version or file."""

    code = "artifact_missing"


class ArtifactForeign(ArtifactError):
    """The file was not written by Elbo."""

    code = "artifact_foreign"


class ArtifactCorrupt(ArtifactError):
    """The file is truncated, or was altered after it was sealed."""

    code = "artifact_corrupt"


class ArtifactTooNew(ArtifactError):
    """The file's format version is later than this program understands."""

    code = "artifact_too_new"


class ArtifactMismatch(ArtifactError):
    """The model does not reproduce the golden answers that were recorded when it was published."""

    code = "artifact_mismatch"
