"""The collector's metrics, all of them."""

from prometheus_client import Counter, Gauge, Histogram

CRASHES = Counter("crashbus_collector_crashes", "Crashes gathered", ["source"])
FILES = Counter("crashbus_collector_files", "Crash files put on the bus", ["kind"])
AHEAD = Counter("crashbus_collector_ahead", "Cores sent while they were still being written")
STREAMED = Counter(
    "crashbus_collector_streamed", "Cores taken straight from the recorder, with no copy on disk"
)
BYTES_READ = Counter("crashbus_collector_read_bytes", "Bytes read from crash files")
BYTES_SENT = Counter("crashbus_collector_sent_bytes", "Bytes of chunks put on the bus")
REFUSED = Counter(
    "crashbus_collector_refused", "Things found among crash files and not touched", ["reason"]
)
NOT_CAPTURED = Counter(
    "crashbus_collector_not_captured", "Deaths seen by the detector that left no crash files"
)
CUT_SHORT = Counter("crashbus_collector_cut_short", "Crash files gathered incomplete")
UNDELIVERED = Gauge(
    "crashbus_collector_undelivered_crashes",
    "Crashes that wait for a destination's receipt, beyond what failed for good",
)
OLDEST_UNDELIVERED = Gauge(
    "crashbus_collector_oldest_undelivered_seconds", "Age of the oldest of these"
)
DELIVERED = Counter("crashbus_collector_delivered", "Crashes confirmed by every destination")
LATENCY = Histogram(
    "crashbus_collector_delivery_seconds",
    "From the crash until a file of it lay verified at a destination",
    ["part"],  # small; large: cores and binaries; whole: the manifest, which comes last
    buckets=(0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200),
)
FAILED = Counter("crashbus_collector_failed_files", "Crash files given up by a shipper")
LATE = Counter(
    "crashbus_collector_late",
    "Times that chunks or items were removed of a crash that had been delivered",
)
DROPPED = Counter(
    "crashbus_collector_dropped_files",
    "Crash files removed for want of room before they were delivered",
    ["loss"],  # copy: its chunks on the bus are delivered all the same; large; small
)
BUS_FULL = Counter("crashbus_collector_bus_full", "Times a chunk was refused for want of room")
FAULTS = Counter("crashbus_collector_faults", "Faults of our own, each told in the log", ["task"])

# A counter that begins with its first event has no rise that an alert could see.
for _loss in ("copy", "large", "small"):
    DROPPED.labels(_loss)
for _part in ("small", "large", "whole"):
    LATENCY.labels(_part)
for _task in ["deaths", "deliver", "receipts", "containers", "gather", "cores", "failures", "late"]:
    FAULTS.labels(_task)
