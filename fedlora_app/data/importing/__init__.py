"""From somebody's data set to per-client Alpaca files, split without near-duplicates."""
