"""The Hugging Face Hub: downloads, pushes of releases with their receipts, rollbacks, and model cards.

A token is read and sent, and never written anywhere, including messages.
"""
