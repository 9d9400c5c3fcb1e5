"""What a finished run is used for: asking its adapters and taking them away."""
