"""LoRA tools besides merging: resize, extract, convert, bake."""
