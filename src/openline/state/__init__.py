"""What is remembered: the conversation, the connection's cache, the store."""
