"""What a federation costs over many rounds and with many clients; see ``__main__``."""
