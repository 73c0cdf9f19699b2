"""For all tests: the same random examples on every run, and no time limits that a busy machine would break."""

import contextlib
import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # without a GPU Triton's kernels run in its interpreter, asked for before import
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MAMBA_DETERMINISTIC"] = "1"  # nor does mamba-ssm time variants of its kernels, whoever imports it first

with contextlib.suppress(ImportError):  # tests/gpu runs on machines that have no hypothesis
    from hypothesis import settings

    settings.register_profile("project", derandomize=True, deadline=None, database=None)
    settings.load_profile("project")
