"""The core dump: what it holds, how it is copied, and where it goes."""
