"""Defines the exceptions of the pipeline, and imports those of the model that the pipeline uses.

model.errors.TwoTowerError
├── model.errors.CheckpointError, RequestError; model.requests.EngineError; model.checks.kernels.KernelError
├── JobError                     settings of the job: unknown key, wrong type, impossible value, unset variable
├── InputError                   input files: none, changed, not Parquet, a column missing or of a wrong type
├── OutputError                  a folder to write to: it belongs to another job, is not writable or has a broken part
├── StorageError                 a storage operation failed, and retries could not help or did not help
├── ClusterError                 Ray cannot be used, was lost, or has too few GPUs or CPUs for a replica
└── JobFailed                    a job or calibration did not succeed: too many error rows, no attempts left, stopped
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
    """The job file cannot be read, or a setting is wrong, in the job file or on the command line."""


class InputError(TwoTowerError):
    """The input is missing, has changed since it was planned, or cannot be read as the job's settings say."""


class OutputError(TwoTowerError):
    """A folder or file to write to cannot be used: it belongs to another job, is not writable or has broken content."""


class StorageError(TwoTowerError):
    """A storage operation failed. Retrying it did not help, or could not help, as for a URL of an unknown protocol."""


class ClusterError(TwoTowerError):
    """Ray cannot be reached or was lost, or the cluster has no room for a single replica."""


class JobFailed(TwoTowerError):  # noqa: N818 (what happened, not what is wrong with an argument)
    """A job or a calibration began to run and did not succeed. What it has saved stays, and the next run resumes it."""
