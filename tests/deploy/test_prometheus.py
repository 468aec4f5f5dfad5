"""Alert rules: valid, told in the documentation, and they fire when they should."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.prometheus import DEPLOY
from tests.support.requirements import need_program

RULES = DEPLOY / "prometheus" / "alerts.yml"
OPERATIONS = DEPLOY.parent / "docs" / "operations.md"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def promtool(*arguments: str | Path) -> None:
    need_program("promtool")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_each_alert_leads_to_what_to_do() -> None:
    page = OPERATIONS.read_text()
    for alert in ALERTS:
        name = alert["alert"]
        assert f"\n### {name}\n" in page
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


def series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


H1 = 'instance="h1", job="crashbus"'
S3 = 'destination="s3://a/b", instance="h1", job="crashbus"'
LONG = "0+0x20 1+1x60"  # nothing for 20 minutes, then one more each minute
# What a service has from its start on.
EACH_SERVICE = [
    series(f"{name}{{{H1}}}", "0x80")
    for name in (
        "crashbus_detector_outbox_messages",
        "crashbus_recorder_backtraces_waiting",
        "crashbus_collector_undelivered_crashes",
        "crashbus_shipper_items_in_hand",
    )
]
FIRING = {
    "CrashbusDown": [series(f"up{{{H1}}}", "0x80"), *EACH_SERVICE],
    "CrashbusMissing": EACH_SERVICE[1:],
    "CrashbusNotHealthy": [series(f"crashbus_healthy{{{H1}}}", "0x80")],
    "CrashesNotCaptured": [series(f"crashbus_collector_not_captured_total{{{H1}}}", LONG)],
    "SignalEventsLost": [series(f"crashbus_detector_outbox_lost{{{H1}}}", LONG)],
    "CrashFilesDropped": [
        series(f'crashbus_collector_dropped_files_total{{{H1}, loss="large"}}', LONG)
    ],
    "CrashesNotDelivered": [
        series(f"crashbus_collector_oldest_undelivered_seconds{{{H1}}}", "0+60x80")
    ],
    "DeadLetters": [
        series(f'crashbus_shipper_deliveries_total{{{S3}, result="dead_lettered"}}', LONG)
    ],
    "DestinationFails": [
        series(f'crashbus_shipper_failures_total{{{S3}, reason="timeout"}}', LONG),
        series(f'crashbus_shipper_deliveries_total{{{S3}, result="delivered"}}', "7x80"),
    ],
    "QueueGrows": [series(f"crashbus_shipper_queue_items{{{S3}}}", "0+100x80")],
    "BusFull": [series(f"crashbus_collector_bus_full_total{{{H1}}}", LONG)],
    "ProcessesHeldLong": [
        series(f'crashbus_recorder_hold_seconds_bucket{{{H1}, le="10"}}', "0x80"),
        series(f'crashbus_recorder_hold_seconds_bucket{{{H1}, le="30"}}', LONG),
        series(f'crashbus_recorder_hold_seconds_bucket{{{H1}, le="+Inf"}}', LONG),
    ],
    "CrashStorm": [
        series(f'crashbus_recorder_captures_total{{{H1}, result="complete"}}', "0+100x80")
    ],
    "CertificateEnds": [series(f"crashbus_bus_certificate_end_seconds{{{H1}}}", "864000x80")],
    "CrashbusFault": [series(f'crashbus_collector_faults_total{{{H1}, task="gather"}}', LONG)],
}
# All is well: services up, crashes captured and delivered.
CALM = [
    *EACH_SERVICE,
    series(f"up{{{H1}}}", "1x80"),
    series(f"crashbus_healthy{{{H1}}}", "1x80"),
    series(f"crashbus_bus_certificate_end_seconds{{{H1}}}", "0x80"),  # a bus without TLS
    series('crashbus_bus_certificate_end_seconds{instance="h2"}', "8640000x80"),
    series(f'crashbus_recorder_captures_total{{{H1}, result="complete"}}', "0+1x80"),
    series(f'crashbus_recorder_hold_seconds_bucket{{{H1}, le="10"}}', "0+1x80"),
    series(f'crashbus_recorder_hold_seconds_bucket{{{H1}, le="+Inf"}}', "0+1x80"),
    series(f'crashbus_shipper_deliveries_total{{{S3}, result="delivered"}}', "0+6x80"),
    series(f'crashbus_shipper_failures_total{{{S3}, reason="timeout"}}', "0+1x80"),
    # What nobody takes from the queue is of no destination.
    series(
        f'crashbus_shipper_failures_total{{{H1}, destination="unknown", reason="unclaimed"}}',
        "0+1x80",
    ),
    series(f"crashbus_shipper_queue_items{{{S3}}}", "3x80"),
    series(f"crashbus_collector_oldest_undelivered_seconds{{{H1}}}", "5x80"),
    series(f'crashbus_collector_dropped_files_total{{{H1}, loss="copy"}}', "0+1x80"),
]


def check(directory: Path, given: list[dict[str, str]], expression: str, expected: float) -> None:
    """Have promtool see how many alerts an expression finds after an hour."""
    found = [{"labels": "{}", "value": expected}] if expected else []
    test = {
        "interval": "1m",
        "input_series": given,
        "promql_expr_test": [{"expr": expression, "eval_time": "60m", "exp_samples": found}],
    }
    path = directory / "test.yml"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "tests": [test]}))
    promtool("test", "rules", path)


def test_no_alert_fires_while_all_is_well(tmp_path: Path) -> None:
    check(tmp_path, CALM, 'count(ALERTS{alertstate="firing"})', 0)


def test_each_alert_has_an_occasion() -> None:
    assert set(FIRING) == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("gone", range(len(EACH_SERVICE)))
def test_a_service_that_is_found_nowhere_is_missing(gone: int, tmp_path: Path) -> None:
    there = [one for number, one in enumerate(EACH_SERVICE) if number != gone]
    told = EACH_SERVICE[gone]["series"].split("_")[1]
    firing = f'count(ALERTS{{alertname="CrashbusMissing", service="{told}", severity="warning"}})'
    check(tmp_path, [series(f"up{{{H1}}}", "1x80"), *there], firing, 1)


def test_metrics_that_tell_of_a_service_are_there() -> None:
    page = OPERATIONS.read_text()
    for one in EACH_SERVICE:
        assert f"| `{one['series'].partition('{')[0]}` | gauge |  |" in page


@pytest.mark.parametrize("alert", FIRING)
def test_an_alert_fires(alert: str, tmp_path: Path) -> None:
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    check(tmp_path, FIRING[alert], firing, 1)
