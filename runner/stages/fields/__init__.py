"""Tables and fields that several kinds of stages share."""
