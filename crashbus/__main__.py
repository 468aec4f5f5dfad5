"""``python -m crashbus`` is ``crashbus``."""

from crashbus.cli import main

if __name__ == "__main__":
    main()
