"""What a run will take before it is started: memory, bytes on the wire and time."""
