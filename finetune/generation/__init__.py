"""From prompts to answers, with common prefixes computed once."""
