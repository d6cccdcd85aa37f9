"""What a reader of the recipe needn't open: the parts of a training."""
