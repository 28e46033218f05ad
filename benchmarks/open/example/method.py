"""All changes added, at a part of their strength: what a folder of a method looks like."""

from iteris_core import merge_loras


def merge(host, concepts, calibration, scale):
    """``host`` runs the base, ``concepts`` have the LoRAs; the merged one comes back."""
    settings = {"scale": scale}
    return merge_loras(host, concepts, "task-arithmetic", settings=settings).lora
