"""Chat with any OpenAI-compatible endpoint: concurrent, limited, retried, paid once."""
