"""The four services of Crashbus, each runnable alone: ``python -m services.<name>``."""
