"""The response of POST /backtest."""

from pydantic import BaseModel, Field

from service.backtest.report import Report
from service.schemas import ModelAnswer, RowProblem


class BacktestDrawings(BaseModel):
    """Drawings of a report, each an SVG document."""

    groups: list[str] = Field(
        description="the severities of each of the first groups of the report over time, with their alerts; at most 24"
    )
    alerts: list[str] = Field(
        description="for each of the `worst_false_alerts` of the report, the values of the feature that caused it; an "
        "empty text if this feature is unknown"
    )


class BacktestAnswer(ModelAnswer):
    """The alerts that the server would have sent for the rows if each row had arrived at its time."""

    report: Report
    drawings: BacktestDrawings | None = Field(description="null if `drawings` is false")
    errors: list[RowProblem] = Field(description="the first rows that cannot be judged, at most 20")
