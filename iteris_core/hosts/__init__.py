"""Base models on which LoRAs are merged: their interface, and one file per library."""
