"""What a loaded artifact shows: accuracy, latency, size, parity."""
