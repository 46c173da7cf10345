"""Start the trial process of a server with the settings of the server."""

from models.trial import IS_POSSIBLE, TrialLimits
from service.inference.model_loader import ModelLoader
from service.inference.trial import TrialClient, start_trial_process
from service.settings import Settings


def start_trials(settings: Settings) -> TrialClient | None:
    """Fork the process that tries artifacts out before the server loads them. See `service.inference.trial`.

    Return None on a system where no trial is possible.

    The trial runs on the CPU, also for a server with a GPU: a driver that works in one process does not work in its
    children.
    """
    if not IS_POSSIBLE:
        return None
    loader = ModelLoader(
        backend=settings.backend,
        max_batch_rows=settings.max_batch_rows,
        max_batch_bytes=settings.max_batch_bytes,
    )
    loader.prepare_trials()
    return start_trial_process(loader.try_out, TrialLimits(settings.trial_seconds, settings.trial_bytes))
