"""Methods that IterIS is compared with, one file each, registered as those of :mod:`..methods` are.

Nothing else in the package imports them; a file that is taken away takes its method with it.
"""
