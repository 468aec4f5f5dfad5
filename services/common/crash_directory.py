from services.recorder.spool import create_file, open_crash

__all__ = ["create_file", "open_crash"]
