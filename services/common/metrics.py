"""Metrics of what services share."""

from prometheus_client import Counter, Gauge, Info

PUT_ASIDE = Counter("crashbus_spool_put_aside", "Things in the spool that stood in a crash's place")
CERTIFICATE_END = Gauge(
    "crashbus_bus_certificate_end_seconds",
    "Unix time at which the certificate of the NATS server ends that we are connected to; "
    "0: it showed none",
)
HEALTHY = Gauge("crashbus_healthy", "1 while the service can do its job, else 0")
BUILD = Info("crashbus_build", "1; its labels tell the version and what the host is called")
