"""What a trained model is, the same for training and serving."""
