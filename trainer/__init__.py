"""A PreparedDataset in, an adapter out. Knows nothing of archives of pictures."""
