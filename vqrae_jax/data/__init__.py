"""Files and datasets of images and codes, and batches for training, evaluation and tokenizing."""
