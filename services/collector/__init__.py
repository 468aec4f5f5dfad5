"""The collector: gathers crash files, cuts them into chunks, and puts them on the bus.

The files on this host are the source of truth. What has been asked for and what has been
confirmed stands in a ledger on disk; `delivery` compares the ledger with the bus and does
what is missing, at the first time as after any failure.

Read in this order: `gather` (what lies in the spool), with `found` and `judge` (whether a set is
whole) and `entering` (whose crash it is); `ledger`; `delivery`, with `plan` (what is to be done),
`offering` (what lies on the bus), `answers` (what comes back) and `ending` (report and manifest);
`publish` and `sending` (chunks), `ahead` (a core that is still being written) and `core_streams`
(one that lies nowhere here); `retention`, with `room` (what goes first). `deaths` sees to it that
no death goes untold, `failures` that none is forgotten; `appscope` and `oom` make sets of what the
recorder does not see.
"""
