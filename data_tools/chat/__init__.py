"""Conversations into documents whose answers alone are learned: formats, checks, chat templates, masks."""
