"""What a federation costs: time, memory, bytes and loads; see ``__main__``."""
