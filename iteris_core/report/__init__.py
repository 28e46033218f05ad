"""Reports on merges and on LoRA files: data, words, plots and metadata."""
