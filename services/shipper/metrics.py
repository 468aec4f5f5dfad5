"""All metrics of the shipper."""

from prometheus_client import Counter, Gauge, Histogram

RESULTS = ("delivered", "already_delivered", "handed_back", "dead_lettered")
DELIVERIES = Counter(
    "crashbus_shipper_deliveries",
    "Work items settled: delivered, already_delivered, handed_back, dead_lettered, or in_hand: "
    "given out again while it was being delivered here.",
    ["destination", "result"],
)
BYTES_IN = Counter("crashbus_shipper_bytes_in", "Bytes of chunks taken from the bus.")
BYTES_OUT = Counter(
    "crashbus_shipper_bytes_out",
    "Bytes of chunks of files that were delivered and verified.",
    ["destination"],
)
PART_BYTES = Counter(
    "crashbus_shipper_part_bytes",
    "Bytes of parts of large S3 objects: sent, or found where another try had sent them.",
    ["how"],
)
FAILURES = Counter(
    "crashbus_shipper_failures", "Tries that failed, by reason.", ["destination", "reason"]
)
RETRIES = Counter("crashbus_shipper_retries", "Tries after the first.", ["destination"])
CIRCUIT = Gauge(
    "crashbus_shipper_circuit",
    "Circuit breaker: 0 closed, 1 half open (one item is tried), 2 open (nothing is tried).",
    ["destination"],
)
SECONDS = Histogram(
    "crashbus_shipper_delivery_seconds",
    "From taking a work item to its acknowledgement.",
    ["destination"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)
IN_HAND = Gauge("crashbus_shipper_items_in_hand", "Work items being delivered now.")
QUEUE = Gauge(
    "crashbus_shipper_queue_items",
    "Work items of a destination on the bus, in hand or not, seen every 10 s.",
    ["destination"],
)
MALFORMED = Gauge(
    "crashbus_shipper_malformed_items", "Malformed work items put aside since the start."
)
