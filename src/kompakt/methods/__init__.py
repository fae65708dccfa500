"""How plans are chosen: one file a method."""
