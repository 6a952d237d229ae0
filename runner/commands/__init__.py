"""One file per command of the command line; adding a file adds a command. `_` in its name is `-` on the command line.

A file has `add_options(sub)`, which adds the command's arguments, and `main(options)`, which runs it and returns an exit code.
The docstring of `main` is the command's help. Slow imports are made inside functions.
"""
