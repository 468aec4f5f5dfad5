"""A small process, read whole at once by C, so that it is let go before anything is written."""
