"""The file that says which series of Prometheus are which features of which model."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import ElboError, first_fault


class MappingError(ElboError):
    """ELBO_REMOTE_WRITE names no file that can be used."""

    code = "mapping_error"


class Target(BaseModel):
    """A table of the file, called as the model that judges the rows (`name` or `name@version`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: dict[str, str] = Field({}, description="a selector for each feature; without it the feature's own name")
    group: list[str] = Field(["instance"], min_length=1, description="labels that tell apart what is watched")
    alpha: float = Field(0.05, gt=0.0, lt=1.0, description="the share of normal rows that may be called anomalous")
    wait_seconds: float = Field(10.0, ge=0.0, le=3600.0, description="how long a row waits for its last sample")


def read(path: Path | None) -> dict[str | None, Target]:
    """The targets by model; without a file the default model with its features' own names. Raises MappingError."""
    if path is None:
        return {None: Target()}
    try:
        tables = tomllib.loads(path.read_text())
        if not tables:
            raise MappingError(f"{path}: expected a table for each model, such as [node], got none")
        return {model: Target.model_validate(table) for model, table in tables.items()}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MappingError(f"{path}: cannot be read as TOML: {error}") from error
    except ValidationError as error:
        fault = first_fault(error)
        raise MappingError(f"{path}: {'.'.join(fault.path)}: {fault.message}, got {fault.value!r}") from error
