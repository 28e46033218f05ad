"""How merged LoRAs are measured, for any world of concepts, on prompts that no calibration row had.

`world` says what a world must offer, `plan` what is run in which order, `runs` runs it and keeps
it, `figures` makes means and paired intervals of what is kept. `toybox`, `styles` and
`emoji` are worlds.
"""
