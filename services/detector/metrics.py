"""All metrics of the detector."""

from prometheus_client import Counter, Gauge, Histogram

EVENTS = Counter(
    "crashbus_detector_events_total", "signal events taken from the kernel", ["disposition"]
)
COUNTED = Counter(
    "crashbus_detector_counted_signals_total", "handled signals that were only counted"
)
UNKNOWN = Counter(
    "crashbus_detector_counted_signals_unknown_total",
    "counted signals of processes that could not be named any more",
)
MALFORMED = Counter("crashbus_detector_malformed_records_total", "unreadable kernel records")
RING_LOST = Counter("crashbus_detector_ring_buffer_lost_total", "events the kernel had no room for")
DELAY = Histogram(
    "crashbus_detector_delay_seconds",
    "from the signal to its event in the outbox",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1, 10),
)
OUTBOX_MESSAGES = Gauge("crashbus_detector_outbox_messages", "messages that wait for the bus")
OUTBOX_BYTES = Gauge("crashbus_detector_outbox_bytes", "payload bytes that wait for the bus")
OUTBOX_LOST = Gauge(
    "crashbus_detector_outbox_lost", "messages that found no room in the outbox since the start"
)
OUTBOX_CORRUPTED = Gauge(
    "crashbus_detector_outbox_corrupted", "damaged outboxes moved aside since the start"
)

# A counter that begins with its first event has no rise that an alert could see.
for _disposition in ("default", "handled", "oom_kill"):
    EVENTS.labels(_disposition)
