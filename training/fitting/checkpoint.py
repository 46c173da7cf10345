"""Checkpoints: the state of a training run on disk, so that a killed run can resume."""

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.staging import PREFIX, staging_folder
from training.errors import FitError

FILE_NAME = "checkpoint.pt"
FOLD = "fold-"  # prefix of the folders with the checkpoints of folds


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoint file of one training run.

    Args:
        folder: the folder of the file, created when needed.
        identity: a hash of the data and the options. A checkpoint with another identity is refused.
        resume: whether training starts from the checkpoint in `folder`.
        interval_seconds: time between two checkpoints.
    """

    folder: Path
    identity: str
    resume: bool = False
    interval_seconds: float = 30.0

    @property
    def path(self) -> Path:
        """The checkpoint file."""
        return self.folder / FILE_NAME

    def of_fold(self, fold: int) -> "CheckpointStore":
        """Return the store of the model that scores the rows of fold number `fold`.

        It resumes if this store resumes and the fold has a checkpoint of this run.
        """
        identity = f"{self.identity} fold {fold}"
        store = replace(self, folder=self.folder / f"{FOLD}{fold}", identity=identity, resume=False)
        return replace(store, resume=self.resume and store.belongs_to_run())

    def exists(self) -> bool:
        """Return whether there is a checkpoint file, of any run."""
        return self.path.is_file()

    def belongs_to_run(self) -> bool:
        """Return whether there is a checkpoint that this run can resume from."""
        try:
            self.load()
        except FitError:
            return False
        return True

    def is_finished(self) -> bool:
        """Return whether this run has a checkpoint with networks that are trained to the end."""
        try:
            return bool(self.load().get("finished"))
        except FitError:
            return False

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically: a reader sees either the old or the new file, never a partial file.

        Args:
            state: a tree of dictionaries and lists that contain tensors and plain values.

        Raises:
            OSError: the disk is full, or the folder is not writable. The previous checkpoint is still there.
        """
        content = io.BytesIO()  # torch.save turns the OSError of a full disk into a RuntimeError
        torch.save({"identity": self.identity, **state}, content)
        self.folder.mkdir(parents=True, exist_ok=True)
        with staging_folder(self.folder) as staging:
            complete = staging / FILE_NAME
            with complete.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            complete.replace(self.path)

    def load(self) -> dict[str, Any]:
        """Return the saved state. No code in the file is executed.

        Raises:
            FitError: there is no checkpoint, it is damaged, or it belongs to another run.
        """
        if not self.exists():
            raise FitError(f"nothing to resume: {self.path} does not exist; train without --resume")
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as error:  # torch.load raises exceptions of many types for a damaged file
            raise FitError(
                f"the checkpoint {self.path} is damaged ({type(error).__name__}): train without --resume"
            ) from error
        if identity != self.identity:
            raise FitError(
                f"the checkpoint {self.path} belongs to a run with other data or options: "
                "repeat the command with that data and those options, or train without --resume"
            )
        return state

    def remove(self) -> None:
        """Delete the checkpoint and those of its folds, and each folder that is then empty.

        Also delete parts of checkpoints that killed processes of earlier releases left in these folders. Ignore errors:
        the published model does not need this.
        """
        for folder in self.folder.glob(f"{FOLD}*/"):
            replace(self, folder=folder).remove()
        for path in (self.path, *self.folder.glob(f"{FILE_NAME}.*")):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Reserve `folder` for this process while the context lasts. Yield false if another process has reserved it.

    Before that, delete the parts of checkpoints that killed runs left in `folder` and in the folders in it. The lock is
    on the folder itself and ends with the process. Yield true, too, if the folder cannot be opened or the file system
    has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # `save` reports folders that are not writable
        yield True
        return
    alone = True
    try:
        _remove_parts(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError:
            pass
        yield alone
    finally:
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()  # if it is empty


def _remove_parts(run_folder: Path) -> None:
    """Delete the parts of checkpoints that killed runs left in `run_folder` and in the folders in it."""
    for folder in (run_folder, *run_folder.glob("*/"), *run_folder.glob(f"*/{FOLD}*/")):
        if not any(folder.glob(f"{PREFIX}*")):
            continue
        with suppress(OSError), staging_folder(folder):
            pass
        if folder != run_folder:
            with suppress(OSError):
                folder.rmdir()  # if it is empty
