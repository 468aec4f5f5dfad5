"""The systemd units of deploy/systemd/, as far as they can be had without systemd."""

from pathlib import Path

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"


def values(unit: str, key: str) -> list[str]:
    """Return all values of a key, in order."""
    lines = (UNITS / unit).read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def confined(service: str) -> list[str]:
    """Return a command that gives its arguments no more capabilities than the service's unit."""
    unit = f"crashbus-{service}{'@' if service == 'shipper' else ''}.service"
    (kept,) = values(unit, "CapabilityBoundingSet")
    bounds = ",".join(["-all", *(f"+{name[4:].lower()}" for name in kept.split())])
    # None may come to others by way of exec either.
    return ["setpriv", "--no-new-privs", "--bounding-set", bounds, "--inh-caps", "-all"]
