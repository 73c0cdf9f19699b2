"""Defines the errors of the model and the root of the project's single exception tree.

    TwoTowerError                    every error that this project raises on purpose
    ├── CheckpointError              a checkpoint is missing, incomplete, corrupt, unsupported or too large for memory
    ├── RequestError                 a request, a setting or a call cannot be carried out as given
    ├── KernelError                  a kernel computes wrong results (defined in model.checks.kernels)
    ├── model.requests.EngineError   work for some rows failed in the engine; it names the rows that are lost
    └── pipeline.core.errors …       job files, input, output, storage, cluster (see the tree there)

A message names the thing, its value and what to do about it, so that an operator can act on the message alone.
"""


class TwoTowerError(Exception):
    """The root of all errors that this project raises on purpose."""

    def __init__(self, *args: object, advice: str = "") -> None:
        """`advice`: lines that the command line shows below the message as they stand, such as a part of a job file."""
        super().__init__(*args)
        self.advice = advice


class CheckpointError(TwoTowerError):
    """A checkpoint cannot be used: it cannot be read or loaded, it is not supported, it does not fit in memory, or its
    outputs fail the self-check."""


class RequestError(TwoTowerError, ValueError):
    """A request, a setting or a call cannot be carried out as given: a value is impossible, or it does not suit the
    loaded model, this engine or this machine."""
