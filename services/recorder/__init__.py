"""The recorder: makes the crash files of any process, with nothing attached to it.

Here lie what runs (`service`), one crash from arrival to files (`recording`, `capturing` while its
process is held, `finishing` once it is let go), what is gathered (`facts`, `modules`, `binaries`)
and written (`crash_files`), who owns core_pattern (`core_pattern`), and `watchdog`, which frees
crashing processes when all of this is stuck. The rest, in the order to read it:

- `handover`: how the kernel hands a crash over, and who else gets it;
- `core`: what a core dump holds, how it is copied, and where it goes;
- `taker`: small processes, read whole at once by C;
- `unwinding`: backtraces, the names of their functions, and debug information;
- `kept`: crashes of moments without a recorder, and `helper`, the C program that keeps them.

Where crash files go, and what is taken out of them, are `crash_directory` and `redact` in
`services/common`.
"""
