"""All metrics of the recorder."""

from prometheus_client import Counter, Gauge, Histogram

CAPTURES = Counter(
    "crashbus_recorder_captures_total",
    "Crashes that arrived, by what became of them",
    ["result"],  # complete, truncated, failed
)
CORE_BYTES = Counter("crashbus_recorder_core_bytes_total", "Bytes of cores read, holes included")
CORES = Counter(
    "crashbus_recorder_cores_total",
    "Cores by where their memory was read: the process's own (memory), or the kernel's stream, "
    "for which it is held several times longer",
    ["source"],
)
TO_BUS = Counter(
    "crashbus_recorder_cores_to_bus_total",
    "Cores that were to go straight to the bus, by what became of them: sent, or failed, which "
    "leaves what the disk has room for",
    ["result"],
)
HELD = Gauge("crashbus_recorder_held", "Processes held now, by stage", ["stage"])
HOLD_SECONDS = Histogram(
    "crashbus_recorder_hold_seconds",
    "From arrival until the process was let go",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
LET_GO = Counter(
    "crashbus_recorder_let_go_total",
    "Processes let go early: their capture stood still or took too long",
)
CHAINED = Counter(
    "crashbus_recorder_chained_total",
    "Crashes for the former owner of core_pattern (CRASHBUS_RECORDER_CHAIN), by what became of its "
    "handler; skipped: none was started",
    ["result"],  # done, failed, timed_out, skipped
)
CHAIN_SECONDS = Histogram(
    "crashbus_recorder_chain_seconds",
    "Time that such a handler took, and the process was held for it",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
RUNTIME_ANSWERS = Counter(
    "crashbus_recorder_runtime_answers_total",
    "Questions to the container runtime, by what became of them",
    ["result"],  # answered, failed
)
BINARIES = Counter("crashbus_recorder_binaries_total", "Programs and libraries copied to the spool")
DEBUGINFO = Counter(
    "crashbus_recorder_debuginfo_total",
    "Debug information asked of debuginfod servers and buckets, by what became of it",
    ["result"],  # fetched, missing, refused, failed
)
BACKTRACES = Counter(
    "crashbus_recorder_backtraces_total", "Backtraces, by what became of them", ["result"]
)
BACKTRACE_SECONDS = Histogram(
    "crashbus_recorder_backtrace_seconds", "Time that one backtrace took, start of its worker on"
)
BACKTRACES_WAITING = Gauge("crashbus_recorder_backtraces_waiting", "Crashes waiting for theirs")
DEAD_LETTERS = Counter("crashbus_recorder_dead_letters_total", "Dead letters", ["result"])

# A counter that begins with its first event has no rise that an alert could see.
for _result in ("complete", "truncated", "failed"):
    CAPTURES.labels(_result)
for _result in ("done", "failed", "timed_out", "skipped"):
    CHAINED.labels(_result)
for _result in ("sent", "failed"):
    TO_BUS.labels(_result)
for _result in ("published", "dropped"):
    DEAD_LETTERS.labels(_result)
