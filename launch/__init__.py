"""From a recipe to a trained model: reading, data, engine, checkpoints, metrics."""
