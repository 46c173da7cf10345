"""The file that maps Prometheus series to the features of models (ELBO_REMOTE_WRITE)."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import ElboError, first_fault


class MappingError(ElboError):
    """The file in ELBO_REMOTE_WRITE cannot be read or is not valid."""

    code = "mapping_error"


class SeriesMapping(BaseModel):
    """One table of the file. The table is named after the model that scores the rows: `name` or `name@version`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: dict[str, str] = Field(
        {}, description="a selector per feature; by default the feature's name is the metric's name"
    )
    group: list[str] = Field(["instance"], min_length=1, description="the labels that distinguish groups (hosts)")
    alpha: float = Field(
        0.05,
        gt=0.0,
        lt=1.0,
        description="the false-alarm rate: the share of normal rows flagged; for a model with a budget of alarms, the "
        "default is the alpha that keeps it",
    )
    extrapolated: bool = Field(
        False, description="whether rows may be anomalous at an alpha below the model's smallest possible p-value"
    )
    wait_seconds: float = Field(10.0, ge=0.0, le=3600.0, description="how long a row waits for its last sample")


def read_mappings(path: Path | None) -> dict[str | None, SeriesMapping]:
    """Return the mappings in a TOML file, by model. Raises MappingError.

    Without a file, the only mapping is for the default model, under the key None. This mapping assigns each series to
    the feature with the same name.
    """
    if path is None:
        return {None: SeriesMapping()}
    try:
        tables = tomllib.loads(path.read_text())
        if not tables:
            raise MappingError(f"{path}: the file has no tables: expected one per model, such as [node]")
        return {model: SeriesMapping.model_validate(table) for model, table in tables.items()}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MappingError(f"{path}: the file cannot be read as TOML: {error}") from error
    except ValidationError as error:
        fault = first_fault(error)
        raise MappingError(f"{path}: {'.'.join(fault.path)}: {fault.message}, got {fault.value!r}") from error
