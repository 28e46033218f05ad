"""Base models on which LoRAs are merged: what they have to offer, and one file a library."""
