"""The collector: gathers crash files, cuts them into chunks, and puts them on the bus.

The files on this host are the source of truth. What has been asked for and what has been
confirmed stands in a ledger on disk; `delivery` compares the ledger with the bus and does
what is missing, at the first time as after any failure.
"""
