"""The Hugging Face Hub as seen from here: which one, whose token, and the place on it that a release goes to.

Nothing here talks to it; that is `runner.hub.push`, `runner.hub.rollback` and `runner.hub.download`. A token is read, sent, and never
written anywhere, messages included.
"""
