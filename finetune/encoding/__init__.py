"""Conversations to token ids and labels for whole data sets, cached on disk."""
