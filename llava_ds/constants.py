"""Words that every layer shares."""

IGNORE_INDEX = -100
"""Label of a position that is not supervised (the default ``ignore_index`` of PyTorch's cross entropy)."""

IMAGE_TOKEN_INDEX = -200
"""Stands in ``input_ids`` at every patch position of an image; it is never a row of the embedding table."""

PAD_ROW, IMAGE_ROW = -1, -2
"""Stand in a row plan's ``src`` where a row is padding, or a patch."""

IMAGE_PLACEHOLDER = "<image>"
"""Stands in the text of a record where an image belongs."""

COMPLETE_MARKER = "COMPLETE"
"""File that is written last into a directory; a directory without it is unfinished."""

FINISHED_MARKER = "FINISHED"
"""File that is written last into a run's folder, when all its steps are done and saved."""
