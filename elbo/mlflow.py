"""Load a model with `mlflow.pyfunc.load_model("models:/web/1")`, after `elbo push mlflow: web`.

MLflow imports this module by the name in the file MLmodel of the version. The module itself does not need MLflow.
"""

from typing import TYPE_CHECKING

from elbo.model import Model, load
from elbo.sources import Data

if TYPE_CHECKING:
    import pandas as pd


class ScoringModel:
    """The model that `mlflow.pyfunc` calls.

    Args:
        model: the model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: Data) -> "pd.DataFrame":
        """Return the columns score, p_value and is_anomaly for rows in raw units.

        A row is anomalous at the alpha of the model. For another alpha, compare the p-value with it.

        Args:
            model_input: rows as for `elbo.Model`: a frame, or an array [N, D].

        Raises:
            ElboError: the model cannot take the rows.
        """
        import pandas as pd

        found = self.model.judge(model_input)
        return pd.DataFrame({"score": found.score, "p_value": found.p_value, "is_anomaly": found.is_anomaly})


def _load_pyfunc(path: str) -> ScoringModel:
    """Return the model in the file at `path`. MLflow calls this function."""
    return ScoringModel(load(path))
