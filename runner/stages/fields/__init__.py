"""Tables and fields that several kinds of stages share, and how they become arguments of `llm`."""
