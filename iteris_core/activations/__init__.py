"""What a model shows at its sites while it runs, for reference rows and merged rows at once."""
