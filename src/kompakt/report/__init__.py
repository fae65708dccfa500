"""What a person reads: tables, plots, one self-contained page."""
