"""The pipeline's part of the project's exception tree.

model.errors.TwoTowerError
├── model.errors.CheckpointError, RequestError, EngineError; model.checks.kernels.KernelError
├── JobError                     the job file: unknown key, wrong type, impossible value, unset variable
├── InputError                   input files: none, unreadable, not Parquet, a column missing or of a wrong type
├── OutputError                  the output folder: another job's, not writable, a broken part
├── StorageError                 a storage operation failed for good
├── ClusterError                 the Ray cluster cannot run what the job asks for
└── JobFailed                    the job ran and ended badly: too many errors, a unit out of attempts, stopped
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
    """The job file is wrong."""


class InputError(TwoTowerError):
    """The input cannot be read as the job says."""


class OutputError(TwoTowerError):
    """The output folder cannot take this job."""


class StorageError(TwoTowerError):
    """A storage operation failed and trying again did not help."""


class ClusterError(TwoTowerError):
    """The cluster cannot run what the job asks for."""


class JobFailed(TwoTowerError):  # noqa: N818 (what happened, not what is wrong with an argument)
    """The job ran and did not succeed; its finished parts stay and submitting again resumes."""
