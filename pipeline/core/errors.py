"""Defines the exceptions of the pipeline, and imports those of the model that the pipeline uses.

model.errors.TwoTowerError
├── model.errors.CheckpointError, RequestError; model.requests.EngineError; model.checks.kernels.KernelError
├── JobError                     the job file: unknown key, wrong type, impossible value, unset variable
├── InputError                   input files: none, unreadable, not Parquet, a column missing or of a wrong type
├── OutputError                  the output folder: it belongs to another job, is not writable or has a broken part
├── StorageError                 a storage operation failed and is not retried any more
├── ClusterError                 the Ray cluster cannot run what the job asks for
└── JobFailed                    the job ran and did not succeed: too many errors, a unit out of attempts, stopped
"""

from model.errors import CheckpointError, RequestError, TwoTowerError
from model.requests import EngineError

__all__ = [
    "CheckpointError",
    "ClusterError",
    "EngineError",
    "InputError",
    "JobError",
    "JobFailed",
    "OutputError",
    "RequestError",
    "StorageError",
    "TwoTowerError",
]


class JobError(TwoTowerError):
    """The job file, or a setting in it, is wrong."""


class InputError(TwoTowerError):
    """The input cannot be read in the way that the job file describes."""


class OutputError(TwoTowerError):
    """The output folder cannot be used for this job."""


class StorageError(TwoTowerError):
    """A storage operation failed, and retrying it did not help."""


class ClusterError(TwoTowerError):
    """The cluster cannot run what the job asks for."""


class JobFailed(TwoTowerError):  # noqa: N818 (what happened, not what is wrong with an argument)
    """The job ran and did not succeed. Its finished parts stay, and submitting the job again resumes it."""
