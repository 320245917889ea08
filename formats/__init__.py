"""How a conversation becomes tokens and labels, and how generated text becomes calls again."""


class FormatError(ValueError):
    """A conversation, tokenizer or format file that cannot be used together; the text says which and what to do."""
