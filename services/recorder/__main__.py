"""``python -m services.recorder``: run the recorder."""

from services.common.service import run
from services.recorder import hardening
from services.recorder.service import work
from services.recorder.settings import RecorderSettings


def main() -> None:
    """Run the recorder until SIGTERM."""
    hardening.never_dump_core()
    run("recorder", RecorderSettings, work, lambda settings: settings.http)


if __name__ == "__main__":
    main()
