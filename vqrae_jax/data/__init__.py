"""Files and datasets in, batches of uint8 images out; grain, TFDS, PIL, skimage and sklearn live here only."""
