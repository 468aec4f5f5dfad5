"""Why something was given up or postponed, in one word: what `reason` of a dead letter may be.

A newer minor version may have more of them. What a human can do stands in the message itself.
"""

CAPTURE = {
    "capture_failed": "a crash could not be captured; the error says why",
    "handshake_failed": "what connected to the recorder was no crash, or the kernel broke it off",
    "process_gone": "the process was gone before it was read, killed while it crashed",
    "spool_unusable": "the process's directory in the spool cannot be used",
    "not_captured": "a process died, and the recorder did not get its core",
    "not_brought_out": "AppScope's files in a container could not be copied before it was gone",
    "appscope_stuck": "AppScope's library handles a crash, and neither writes nor ends",
}
SOURCE = {
    "source_vanished": "a crash file is not on its host any more",
    "source_unreadable": "a crash file cannot be read",
    "source_changed": "a crash file is not what it was when it was first read",
    "state_unusable": "the collector's state cannot be written to",
    "dropped_for_room": "a crash file was removed, undelivered, for want of room in the spool",
    "larger_than_bus": "a core is larger than the room that the bus has for chunks",
}
MESSAGES = {
    "malformed_message": "a message breaks the wire contract",
    "message_too_large": "a message is above the bus's `max_payload`",
    "chunks_missing": "the bus lost chunks of a file",
    "damaged_file": "what is on the bus is not what was announced",
    "destination_not_configured": "no shipper has this destination",
}
DELIVERY = {
    "access_denied": "the key may not do this there",
    "user_suspended": "the key's user is suspended",
    "unknown_access_key": "the server does not know the key",
    "wrong_secret_key": "the secret is not that of the key",
    "expired_key": "the key has expired",
    "no_such_bucket": "there is no such bucket",
    "bucket_of_another": "the bucket belongs to somebody else",
    "bucket_was_missing": "the bucket was not there, and was made",
    "too_many_buckets": "the user may make no more buckets",
    "wrong_region": "the bucket is in another region",
    "quota_exceeded": "a quota is used up",
    "disk_full": "the destination's file system is full",
    "permission_denied": "the shipper's user may not write there",
    "read_only": "the destination's file system is mounted read-only",
    "not_a_directory": "something else lies where a directory should be",
    "is_a_directory": "a directory lies where the file should be",
    "file_system_failed": "the destination's file system failed otherwise",
    "name_too_long": "the destination takes no name that long",
    "file_too_large": "the destination, or the collector's own limit, allows no file that large",
    "core_not_wanted": "a core was to go to a destination that takes none",
    "not_as_written": "what was written is not what is read back",
    "damaged_on_the_way": "what arrived at the server is not what was sent",
    "object_vanished": "an object that was stored is not there",
    "upload_vanished": "an upload that was begun is not there",
    "conflict": "somebody else changed the same object at that moment",
    "name_taken": "another shipper gave the same name to another binary at that moment",
    "clock_skew": "the clocks of shipper and server differ",
    "slow_down": "the server asks for fewer requests",
    "server_unavailable": "the server is not available just now",
    "server_error": "the server failed, or a proxy before it",
    "refused_by_server": "the server refuses, for a reason that is not known here",
    "bad_answer": "what answers is no S3 server",
    "refused": "nothing listens there",
    "unknown_host": "the host's name is not known",
    "timeout": "no answer came in time",
    "stalled": "nothing moved for a while",
    "connection_lost": "the connection broke",
    "not_confirmed": "the receiver did not confirm all bytes in time",
    "not_closed": "the receiver did not close the connection",
    "tls_failed": "TLS could not be spoken",
    "certificate_rejected": "we do not accept the certificate of the other side",
    "certificate_refused": "the other side does not accept our certificate",
    "internal_error": "a fault of the shipper itself",
}

ALL = CAPTURE | SOURCE | MESSAGES | DELIVERY
