"""Small base models trained on a drawn world, so that Atelier works and is tested without a download."""
