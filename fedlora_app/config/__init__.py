"""The experiment: its settings, how they are read, and what a round consists of."""
