"""What a trained LoRA is worth: pictures, measures, the score, the best epoch."""
