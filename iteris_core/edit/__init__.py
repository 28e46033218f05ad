"""What is done with LoRAs beside merging: resize, extract, convert, bake."""
