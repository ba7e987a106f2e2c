"""Training data from captions and boxes: by a language model that never sees the picture, or by the naive rule."""
