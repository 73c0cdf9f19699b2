"""Passes pictures of a run (pipeline.monitoring.live.Live) on to `_job/live.json` and to sinks such as Ray's metrics.

A sink that fails is reported once and removed; it never ends a job.
"""

from collections.abc import Callable, Sequence

from pipeline.core.text import one_line
from pipeline.monitoring.live import Live, LiveFile
from pipeline.monitoring.telemetry import Telemetry

SAMPLE_S = 2.0
"""Seconds between two pictures of the run, the same as between two reports of a replica."""
Sink = Callable[[Live], None]
"""A function that receives each picture of the run, for example a workers.cluster.metrics.RayMetrics."""


class Reporter:
    """The connection from a run's telemetry to live.json and the sinks: it passes on a picture every SAMPLE_S seconds.

    The driver's loop calls `turn` once per turn, and `close` follows at the end of the run.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        file: LiveFile,
        sinks: Sequence[Sink] = (),
        tell: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Pass on the first picture. `tell` shows the operator a message, if a sink fails."""
        self._telemetry, self._file, self._sinks, self._tell = telemetry, file, list(sinks), tell
        self._report()

    def turn(self) -> None:
        """Pass on a new picture if the last one is SAMPLE_S seconds old."""
        if self._telemetry.clock() - self._reported_at >= SAMPLE_S:
            self._report()

    def close(self, ended: str | None) -> None:
        """Pass on the last picture. `ended`: COMPLETE, or the reason why the run ended. If another driver owns the job,
        pass None: then nothing more is passed on or written."""
        live = None if ended is None else self._telemetry.picture(ended)
        if live is not None:
            self._pass_on(live)
        self._file.close(live)

    def _report(self) -> None:
        self._reported_at = self._telemetry.clock()
        live = self._telemetry.picture()
        self._file.show(live)
        self._pass_on(live)

    def _pass_on(self, live: Live) -> None:
        for sink in list(self._sinks):
            try:
                sink(live)
            except Exception as error:  # whatever a sink raises, the job continues without it
                self._sinks.remove(sink)
                self._tell(f"metrics are off from now on: {type(error).__name__}: {one_line(error)}")
