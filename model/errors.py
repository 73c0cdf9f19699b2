"""Errors of the model and the root of the project's one exception tree.

    TwoTowerError                    everything this project raises on purpose
    ├── CheckpointError              a checkpoint is missing, incomplete, corrupt or does not fit in memory
    ├── RequestError                 a request or a generation setting that can never run
    ├── KernelError                  a kernel does not compute what it must (model.kernels.check)
    ├── EngineError                  a step of the engine failed; names the rows it held
    └── pipeline.errors …            job files, input, output, storage, cluster (drawn there)

A message names the thing, its value and what to do about it: it is read at 3 a.m.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.params import Completion


class TwoTowerError(Exception):
    """Root of every error this project raises on purpose."""


class CheckpointError(TwoTowerError):
    """A checkpoint cannot be loaded as it is."""


class RequestError(TwoTowerError, ValueError):
    """A request, or one of its settings, that no engine could ever run."""


class EngineError(TwoTowerError):
    """A step of the engine failed.

    `keys` are the rows that it took down, all of them out of the engine now; `completions` are the rows that had ended
    earlier in the same step. Both are the caller's to deal with; all other rows go on with the next step.
    """

    def __init__(self, message: str, keys: tuple[str, ...] = (), completions: "tuple[Completion, ...]" = ()) -> None:
        super().__init__(message)
        self.keys = keys
        self.completions = completions
