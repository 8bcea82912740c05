"""An archive of pictures in, a PreparedDataset out. Knows nothing of the models that are trained."""
