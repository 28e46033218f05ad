"""How papers of 2026 measure merged LoRAs, for any world of concepts.

`world` says what a world must offer, `plan` what is run in which order, `runs` runs it and keeps
it, `table` makes the figures of what is kept; `tuning` looks for the rivals' settings, which
`settings` keeps; `command` is what a world's own commands call. `toybox` and `emoji` are worlds.
"""
