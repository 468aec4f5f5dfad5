"""The recorder: makes the crash files of any process, with nothing attached to it.

Read in this order: `service` (what runs), `recording` (one crash from arrival to files),
then what these use: `mechanism` and `core_pattern` (how the kernel is asked), `listener`
and `hold` (how a crash arrives), `facts`, `core_head`, `core_copy`, `spool` (what is
gathered, and where it goes), `crash_files` and `redact` (what is written), `unwinder` and
`unwind_worker` (the backtrace).
"""
