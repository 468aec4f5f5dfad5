"""Crashes of moments without a recorder: what is left of them, and the crash files made of it."""
