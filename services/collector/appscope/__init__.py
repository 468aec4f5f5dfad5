"""AppScope's files inside a container: brought out while the process still lives.

Its library writes to ``/tmp/appscope/<pid>`` below the process's own root, where nobody
outside looks and which is gone with the container. After the core it sleeps for two seconds;
in that time the files are copied to the spool, with a capture record, and are from then on
like any other set. Nothing is written inside the container.
"""
