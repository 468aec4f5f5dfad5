"""Metrics of what services share."""

from prometheus_client import Counter, Gauge

PUT_ASIDE = Counter("crashbus_spool_put_aside", "Things in the spool that stood in a crash's place")
HEALTHY = Gauge("crashbus_healthy", "1 while the service can do its job, else 0")
