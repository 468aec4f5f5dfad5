"""A set of crash files as the recorder begins and ends it, of a process that need not be."""

import os
from pathlib import Path

from crashbus import crash_id
from crashbus.parts import Process
from services.common import capture
from services.common.capture import CapturedFile, CaptureRecord

EPOCH = 1795388839


def process(pid: int, boot_id: str = "boot", start_ticks: int = 1, comm: str = "x") -> Process:
    """Return a process that only its record tells of."""
    return Process(
        boot_id=boot_id, pid=pid, ns_pid=pid, start_ticks=start_ticks, uid=0, gid=0, comm=comm
    )


class Writing:
    """A set with a record that says that files will come.

    Attributes:
        place: the directory, which is made.
    """

    def __init__(
        self, spool: Path, of: Process, epoch: int = EPOCH, host: str = "test-host"
    ) -> None:
        self._record = CaptureRecord(
            state="writing",
            crash_id=crash_id(of.boot_id, of.pid, of.start_ticks),
            host=host,
            crashed_at=float(epoch),
            process=of,
            signal=11,
            signal_name="SIGSEGV",
        )
        self.place = spool / str(of.pid)
        self.place.mkdir(mode=0o755)
        directory = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._lock = capture.create(directory, epoch, self._record)
        finally:
            os.close(directory)

    @property
    def crash_id(self) -> str:
        return self._record.crash_id

    def note(self, *notes: str, **files: CapturedFile) -> None:
        """Keep in the record what there is so far."""
        self._record = self._record.model_copy(update={"files": files, "notes": notes})
        capture.write(self._lock, self._record)

    def complete(self, files: dict[str, CapturedFile]) -> None:
        """Say that all files are there."""
        told = {"state": "complete", "files": self._record.files | files}
        capture.write(self._lock, self._record.model_copy(update=told))
        self.end()

    def end(self) -> None:
        """Unlock the record, as the kernel does for a recorder that was killed."""
        os.close(self._lock)
