"""Base models that are known: one file each, and tables that several share."""
