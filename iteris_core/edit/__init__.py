"""Tools for LoRAs beside merging: resize, extract, convert, bake."""
