"""How the toybox is made: `python -m toybox.train`."""
