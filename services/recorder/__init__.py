"""The recorder: makes the crash files of any process, with nothing attached to it.

Read in this order: `service` (what runs), `recording` (one crash from arrival to files),
then what these use: `mechanism` and `core_pattern` (how the kernel is asked), `listener`
and `hold` (how a crash arrives), `facts`, `modules`, `core_head`, `fault_address`, `core_copy`
(what is gathered; `taking` does it at once for small processes, `orphan` has it of crashes that
nobody took), `crash_files` (what is written), `unwinder` and `unwind_worker` (the backtrace;
`unwind_server` has such workers ready), and `watchdog`, which frees crashing processes when all of
this is stuck. Where it goes, and what is taken out of it, are `crash_directory` and `redact` in
`services/common`.
"""
