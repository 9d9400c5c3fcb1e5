"""Records, a client's own files, their tokens, and the question sets."""
