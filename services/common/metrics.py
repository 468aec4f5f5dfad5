"""Metrics of what services share."""

from prometheus_client import Counter

PUT_ASIDE = Counter("crashbus_spool_put_aside", "Things in the spool that stood in a crash's place")
