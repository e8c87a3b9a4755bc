"""The world that shows learning without pretrained weights: a base model that knows four skills, and a new word."""
