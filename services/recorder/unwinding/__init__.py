"""Backtraces: frames, their names, and the debug information they come from."""
