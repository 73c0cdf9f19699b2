"""Errors of the model and the root of the project's one exception tree.

    TwoTowerError                    everything this project raises on purpose
    ├── CheckpointError              a checkpoint is missing, incomplete, corrupt or does not fit in memory
    ├── RequestError                 a request or a generation setting that can never run
    ├── KernelError                  a kernel does not compute what it must (model.checks.kernels)
    ├── model.requests.EngineError   a step of the engine failed; names the rows it held
    └── pipeline.core.errors …       job files, input, output, storage, cluster (drawn there)

A message names the thing, its value and what to do about it: it is read at 3 a.m.
"""


class TwoTowerError(Exception):
    """Root of every error this project raises on purpose."""


class CheckpointError(TwoTowerError):
    """A checkpoint cannot be loaded as it is."""


class RequestError(TwoTowerError, ValueError):
    """A request, or one of its settings, that no engine could ever run."""
