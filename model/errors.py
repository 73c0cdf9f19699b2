"""Defines the errors of the model and the root of the project's single exception tree.

    TwoTowerError                    every error that this project raises on purpose
    ├── CheckpointError              a checkpoint is missing, incomplete, corrupt or does not fit in memory
    ├── RequestError                 a request or a generation setting can never run
    ├── KernelError                  a kernel computes wrong results (model.checks.kernels)
    ├── model.requests.EngineError   a step of the engine failed; it names the rows that are lost
    └── pipeline.core.errors …       job files, input, output, storage, cluster (see the tree there)

A message names the thing, its value and what to do about it, so that an operator can act on the message alone.
"""


class TwoTowerError(Exception):
    """The root of all errors that this project raises on purpose."""


class CheckpointError(TwoTowerError):
    """A checkpoint cannot be loaded as it is."""


class RequestError(TwoTowerError, ValueError):
    """A request, or one of its settings, can never run on any engine."""
