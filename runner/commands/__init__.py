"""One file per verb of the command line; adding a file adds a verb. `_` in its name is `-` on the command line.

A file has `add_options(sub)`, which says what may follow the verb, and `main(options)`, which does it and returns an exit
code; the docstring of `main` is the verb's help. What is slow to import is imported inside.
"""
