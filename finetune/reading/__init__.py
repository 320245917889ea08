"""From files, databases and the Hub, in any usual shape, to rows of canonical messages and tools."""
