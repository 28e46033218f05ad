"""What a merge did and what is in LoRA files: data, words, plots and metadata."""
