"""Progress of long work in commands without a live view: a bar on a terminal, else a log line every half minute."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from qlora_train.utils.run_events import Event, Progress, amount
from qlora_train.utils.visible_text import visible

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 30.0


class ProgressLines:
    """Logs unfinished work every SECONDS_PER_LINE."""

    def __init__(self) -> None:
        self._name, self._last_seconds = "", 0.0

    def receive(self, event: Event) -> None:
        """Take in an event."""
        if not isinstance(event, Progress):
            return
        now = time.monotonic()
        if event.name != self._name or event.is_complete:
            self._name, self._last_seconds = "" if event.is_complete else event.name, now
        elif now - self._last_seconds >= SECONDS_PER_LINE:
            self._last_seconds = now
            fields = {"done": event.done, "total": event.total, "unit": event.unit}
            logger.info("%s: %s", event.name, amount(event), extra={"metrics": fields})


class ProgressBar:
    """Draws unfinished work as one bar, which disappears when it is done."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task = TaskID(0)

    def receive(self, event: Event) -> None:
        """Take in an event; while a live view has the terminal, standard error is none."""
        if not isinstance(event, Progress) or not sys.stderr.isatty():
            return
        if event.is_complete:
            self.stop()
            return
        if self._bars is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}"))
            console = Console(stderr=True)
            self._bars = Bars(*columns, TimeRemainingColumn(), console=console, transient=True, refresh_per_second=4)
            self._task = self._bars.add_task(visible(event.name), amount="")
            self._bars.start()
        self._bars.update(
            self._task, description=visible(event.name), completed=event.done, total=event.total, amount=amount(event)
        )

    def stop(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
