"""Facts about a model: what its layers are, what they cost, what is tied to what."""
